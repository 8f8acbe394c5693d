"""The same evaluation by one process and by several, with one thread each: what sharding the queries brings."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn as untyped_spawn

from lightning_dml.retrieval import RetrievalMetrics

spawn: Callable[..., Any] = untyped_spawn


def compute_seconds(ranks: int, columns: tuple[Tensor, ...], rounds: int) -> tuple[list[float], dict[str, float]]:
    """Seconds that `compute` takes in each round, from the first rank's start to the last one's end, and the values.

    Args:
        ranks: processes on this machine; each collects every ranks-th row and has one thread.
        columns: the arguments of `RetrievalMetrics.update` for all rows.
        rounds: how often.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(columns, Path(folder) / "columns.pt")
        spawn(_worker, (ranks, folder, rounds), nprocs=ranks)
        outcomes = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    if any(values != outcomes[0][1] for _, values in outcomes):
        raise RuntimeError("the ranks came to different values")
    return [max(by_rank) for by_rank in zip(*(seconds for seconds, _ in outcomes), strict=True)], outcomes[0][1]


def _worker(rank: int, ranks: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(minutes=10),
    )
    columns = torch.load(Path(folder) / "columns.pt")
    seconds, values = [], {}
    for _ in range(rounds):
        metrics = RetrievalMetrics()
        metrics.update(*(column[rank::ranks] for column in columns))
        dist.barrier()
        start = time.perf_counter()
        values = metrics.compute()
        seconds.append(time.perf_counter() - start)
    torch.save((seconds, values), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
