"""The samplers on real processes: each finds its own slice without being told its rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_dml.datamodules.samplers.evaluation import UnpaddedDistributedSampler
from lightning_dml.datamodules.samplers.hierarchical import HierarchicalPKBatchSampler
from lightning_dml.datamodules.samplers.pk import PKBatchSampler
from tests.helpers import run_ranks

LABELS = np.repeat(np.arange(24), 5)


def batches_of(rank: int | None = None, ranks: int | None = None) -> list[list[Any]]:
    """Batches of every sampler in epoch 2, by rank or by the process group."""
    options: dict[str, Any] = {"classes_per_batch": 4, "samples_per_class": 2, "num_replicas": ranks, "rank": rank}
    samplers = [
        PKBatchSampler(LABELS, **options),
        PKBatchSampler(LABELS, **options, class_weights="sqrt"),
        HierarchicalPKBatchSampler(LABELS, LABELS // 12, **options),
    ]
    for sampler in samplers:
        sampler.set_epoch(2)
    evaluation = UnpaddedDistributedSampler(31, num_replicas=ranks, rank=rank)
    batches = [[[(int(index), index.seed) for index in batch] for batch in sampler] for sampler in samplers]  # type: ignore[attr-defined]
    return [*batches, list(evaluation)]


def by_process_group(rank: int, ranks: int) -> list[list[Any]]:
    """Batches that the samplers of one process draw."""
    return batches_of()


def test_processes_draw_the_slices_of_their_ranks() -> None:
    """Images on two ranks, or on none, would make another global batch than the one that was planned."""
    results = run_ranks(2, by_process_group)
    assert results == [batches_of(rank, 2) for rank in range(2)]
    for first, second in zip(results[0][:3], results[1][:3], strict=True):
        assert len(first) == len(second) == 9
        for mine, other in zip(first, second, strict=True):
            assert not {LABELS[index] for index, _ in mine} & {LABELS[index] for index, _ in other}
    assert sorted(results[0][3] + results[1][3]) == list(range(31))
