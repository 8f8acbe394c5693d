"""Helpers of many tests: real gloo processes, commands, the largest tensor of a call, and comparisons."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes as untyped_start_processes
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
"""The repository."""

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
"""Starts a script on two ranks."""

start_processes: Callable[..., Any] = untyped_start_processes

# Ranks are forked from one process that has imported everything and done nothing: a rank that imports it all for itself
# takes longer than most tests.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["lightning_dml.callbacks", "lightning_dml.datamodules", "lightning_dml.commands.dml_cli", "tests.helpers"]
)


def _worker(
    rank: int, ranks: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        outcome: tuple[bool, Any] = (True, function(rank, ranks, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    with open(Path(folder) / f"{rank}.pkl", "wb") as file:
        pickle.dump(outcome, file)
    if not outcome[0]:
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Runs `function(rank, ranks, *args)` in `ranks` gloo processes and returns what each returned, by rank.

    `function` must be defined at module level; it and its results are pickled. No collective may take longer than
    `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _worker, (ranks, folder, timeout, function, args), nprocs=ranks, join=False, start_method="forkserver"
        )
        failed = None
        try:
            while not context.join():
                pass
        except Exception as error:
            failed = error
        results = {}
        for rank in range(ranks):
            path = Path(folder) / f"{rank}.pkl"
            if path.exists():
                results[rank] = pickle.loads(path.read_bytes())
        for rank, (passed, value) in results.items():
            if not passed:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        if failed is not None:
            raise failed
        return [results[rank][1] for rank in range(ranks)]


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most entries of any tensor that an operation returns while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at its results."""
        outcome = func(*args, **(kwargs or {}))
        for result in outcome if isinstance(outcome, tuple | list) else (outcome,):
            if isinstance(result, Tensor):
                self.entries = max(self.entries, result.numel())
        return outcome


def run(*command: str, folder: Path) -> str:
    """Runs a command as a user would, in its own processes, and shows its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same(ours: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    """Compares name by name, so that a failure tells which tensor differs."""
    assert ours.keys() == right.keys()
    for name, tensor in right.items():
        if isinstance(tensor, str):
            assert ours[name] == tensor, name
            continue
        torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(tensor), rtol=0, atol=tolerance)
