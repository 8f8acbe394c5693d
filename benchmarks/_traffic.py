"""The bytes that a memory sends between ranks: those of every collective of a step, counted where torch is called.

Two or more gloo processes take one step against a full bank. What DDP sends for the gradients of the model is no part.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss as PeerContrastiveLoss
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.losses import MultiSimilarityLoss as PeerMultiSimilarityLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor
from torch.multiprocessing.spawn import spawn as untyped_spawn
from torch.nn import functional as F

from lightning_dml import distributed
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, PairWeightingLoss
from lightning_dml.losses.sharded import bytes_sent
from lightning_dml.memory import MemoryBank

spawn: Callable[..., Any] = untyped_spawn
MODES = ("replicated", "sharded", "peer")


class Traffic(NamedTuple):
    """Bytes that one rank receives from the others in a step.

    Attributes:
        mode: one of `MODES`.
        loss: name of the loss.
        size: slots of the bank.
        enqueue: to bring the rows of all ranks into the bank; of the peer, the gather before its loss.
        loss_bytes: of the loss against the bank, forward and backward.
        calls: collectives of the step.
    """

    mode: str
    loss: str
    size: int
    enqueue: int
    loss_bytes: int
    calls: int


def losses() -> dict[str, PairWeightingLoss]:
    """The losses that are measured: one whose pairs are independent, one that needs whole rows."""
    return {"contrastive": ContrastiveLoss(0.5), "multi-similarity": MultiSimilarityLoss()}


def measure(ranks: int, batch: int, dim: int, sizes: list[int]) -> list[Traffic]:
    """Counts the bytes of one step for each mode, loss and size of the bank.

    Args:
        ranks: number of processes, on this machine.
        batch: anchors of each rank.
        dim: columns of the embeddings.
        sizes: slots of the banks, over all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (ranks, folder, batch, dim, sizes), nprocs=ranks)
        read = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
        of_ranks = [[Traffic(*row) for row in results] for results in read]
    # Of equal batches all ranks receive the same; where a share is one row longer, the most counts.
    return [max(rows, key=lambda row: row.enqueue + row.loss_bytes) for rows in zip(*of_ranks, strict=True)]


def formula(traffic: Traffic, ranks: int, batch: int, dim: int) -> int:
    """The bytes that follow from the shapes, of float32 keys with indices.

    (W - 1)(N (4 D + 16) + 8) bring in the rows: each other rank's keys with label and index, and how many they are.
    Any loss then sums one number of 8 bytes over the ranks. A sharded one moves anchors and their gradients, or
    similarities and their weights: `lightning_dml.losses.sharded.bytes_sent` has that formula.
    """
    if traffic.mode == "peer":
        return (ranks - 1) * batch * (4 * dim + 8)
    total = (ranks - 1) * (batch * (4 * dim + 16) + 8) + 8 * 2 * (ranks - 1) // ranks
    if traffic.mode == "sharded":
        separable = losses()[traffic.loss].weighting.separable
        total += bytes_sent(batch, traffic.size, dim, ranks, separable=separable)
    return total


def _worker(rank: int, ranks: int, folder: str, batch: int, dim: int, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    results = [
        _step(mode, name, size, rank, ranks, batch, dim) for mode in MODES for name in losses() for size in sizes
    ]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _step(mode: str, name: str, size: int, rank: int, ranks: int, batch: int, dim: int) -> Traffic:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(size, dim), dim=1)  # the same on every rank, as a bank is
    labels, indices = torch.arange(size) % (size // 4), torch.arange(size)
    everyone = F.normalize(torch.randn(ranks * batch, dim), dim=1)
    mine = slice(rank * batch, (rank + 1) * batch)
    leaf = everyone[mine].requires_grad_()
    own_labels, own_indices = torch.arange(ranks * batch)[mine] // 4, torch.arange(ranks * batch)[mine] + size
    if mode == "peer":
        return _peer_step(name, size, rows, labels, leaf, own_labels)
    bank = MemoryBank(size, dim, share=(rank, ranks) if mode == "sharded" else (0, 1))
    bank.enqueue(rows, labels, indices)
    with counted() as enqueue:  # as MemoryBankCallback does
        counts = distributed.row_counts(batch, leaf.device)
        keys = distributed.gather_rows(leaf.detach(), counts)
        identity = distributed.gather_rows(torch.stack((own_labels, own_indices), dim=1), counts)
    bank.enqueue(keys, identity[:, 0], identity[:, 1])
    with counted() as against:
        loss = losses()[name](
            leaf,
            own_labels,
            bank.embeddings,
            bank.labels,
            indices=own_indices,
            ref_indices=bank.indices,
            ref_sharded=mode == "sharded",
        )
        loss.backward()
    return Traffic(mode, name, size, sum(enqueue), sum(against), len(enqueue) + len(against))


def _peer_step(name: str, size: int, rows: Tensor, labels: Tensor, leaf: Tensor, own_labels: Tensor) -> Traffic:
    inner = (
        PeerContrastiveLoss(1.0, 0.5, distance=CosineSimilarity())
        if name == "contrastive"
        else PeerMultiSimilarityLoss(2.0, 50.0, 0.5)
    )
    memory = CrossBatchMemory(inner, rows.shape[1], memory_size=size)
    memory.add_to_memory(rows, labels, size)
    with counted() as received:
        DistributedLossWrapper(memory)(leaf, own_labels).backward()
    return Traffic("peer", name, size, sum(received), 0, len(received))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Lists the bytes that this rank receives in each collective that is called from Python meanwhile.

    Gathers and exchanges count the others' parts, a sum what a ring receives, 2 (W - 1) / W of the tensor.
    """
    received: list[int] = []
    ranks = dist.get_world_size()
    share = {
        "all_gather": lambda args: sum(_bytes(part) for part in args[0]) * (ranks - 1) // ranks,
        "all_gather_into_tensor": lambda args: _bytes(args[0]) * (ranks - 1) // ranks,
        "all_to_all_single": lambda args: _bytes(args[0]) * (ranks - 1) // ranks,
        "all_to_all": lambda args: sum(_bytes(part) for part in args[0]) * (ranks - 1) // ranks,
        "all_reduce": lambda args: _bytes(args[0]) * 2 * (ranks - 1) // ranks,
        "reduce_scatter_tensor": lambda args: _bytes(args[1]) * (ranks - 1) // ranks,
        "reduce_scatter": lambda args: sum(_bytes(part) for part in args[1]) * (ranks - 1) // ranks,
        "broadcast": lambda args: _bytes(args[0]),
    }
    originals = {name: getattr(dist, name) for name in share}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            received.append(share[name](args))
            return originals[name](*args, **options)

        return call

    for name in share:
        setattr(dist, name, counting(name))
    try:
        yield received
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
