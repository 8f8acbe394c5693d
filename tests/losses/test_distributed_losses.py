"""Two and three real ranks against one process with the whole batch: value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss
from tests.helpers import run_ranks

LOSSES = {"contrastive": ContrastiveLoss(0.2), "multi-similarity": MultiSimilarityLoss(2.0, 10.0, 0.2)}
SIZES = {2: (5, 11), 3: (4, 1, 11)}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator)
    labels = torch.arange(16) % 5
    indices = torch.arange(16) % 13  # some samples twice
    bank = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    return x, labels, indices, bank, torch.arange(30) % 6, torch.arange(30)


def total(model: nn.Module, loss: nn.Module, rows: slice) -> Tensor:
    x, labels, indices, bank, bank_labels, bank_indices = data()
    embeddings = F.normalize(model(x[rows]), dim=1)
    in_batch = loss(embeddings, labels[rows], indices=indices[rows])
    against_bank = loss(embeddings, labels[rows], bank, bank_labels, indices=indices[rows], ref_indices=bank_indices)
    value: Tensor = in_batch + 0.7 * against_bank
    return value


def gradient(model: nn.Module, name: str, reduction: str, rows: slice) -> tuple[float, list[Any]]:
    loss = LOSSES[name]
    loss.reduction = reduction  # type: ignore[assignment]
    model.zero_grad()
    value = total(model, loss, rows)
    value.backward()
    return float(value.detach()), [parameter.grad.numpy().copy() for parameter in model.parameters()]


CASES = [(name, reduction) for name in LOSSES for reduction in ("anchors", "active_anchors", "pairs")]


def on_rank(rank: int, ranks: int) -> list[tuple[float, list[Any]]]:
    model = DistributedDataParallel(net())
    start = sum(SIZES[ranks][:rank])
    rows = slice(start, start + SIZES[ranks][rank])
    # One set of processes for all cases: starting them takes longer than the cases.
    return [gradient(model, name, reduction, rows) for name, reduction in CASES]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process_would(ranks: int) -> None:
    alone = [gradient(net(), name, reduction, slice(0, 16)) for name, reduction in CASES]
    for results in run_ranks(ranks, on_rank):
        for case, (value, gradients), (expected, expected_gradients) in zip(CASES, results, alone, strict=True):
            assert value == pytest.approx(expected, abs=1e-6), case
            for ours, right in zip(gradients, expected_gradients, strict=True):
                np.testing.assert_allclose(ours, right, rtol=0, atol=1e-6, err_msg=str(case))


def alone(rank: int, ranks: int) -> float:
    x, labels, indices, *_ = data()
    rows = slice(0, 7) if rank == 0 else slice(7, 16)
    if rank == 1:
        return float("nan")  # calls nothing: a loss that keeps to itself must not wait for this rank
    return float(ContrastiveLoss(0.2, gather=False)(F.normalize(x[rows], dim=1), labels[rows]))


def test_without_gather_a_rank_needs_no_other() -> None:
    x, labels, *_ = data()
    expected = ContrastiveLoss(0.2)(F.normalize(x[:7], dim=1), labels[:7])
    assert run_ranks(2, alone)[0] == pytest.approx(float(expected), abs=1e-6)
