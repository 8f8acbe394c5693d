"""Two and three real ranks against one process with the whole batch: value and gradient."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_dml import distributed, losses
from lightning_dml.losses import ContrastiveLoss
from tests.helpers import run_ranks
from tests.losses.cases import LOSSES, grad_of, net

SIZES = {2: (5, 11), 3: (4, 1, 11)}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same 16 rows on every rank, some of one class and some of one sample, and a bank."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(16) % 5
    indices = torch.arange(16) % 13  # some samples twice
    bank = F.normalize(torch.randn(30, 8, generator=generator, dtype=torch.float64), dim=1)
    return x, labels, indices, bank, torch.arange(30) % 6, torch.arange(30)


def total(model: nn.Module, loss: nn.Module, rows: slice) -> Tensor:
    """The in-batch loss and the loss against the bank together, as the module adds them."""
    x, labels, indices, bank, bank_labels, bank_indices = data()
    embeddings = F.normalize(model(x[rows]), dim=1)
    in_batch = loss(embeddings, labels[rows], indices=indices[rows])
    against_bank = loss(embeddings, labels[rows], bank, bank_labels, indices=indices[rows], ref_indices=bank_indices)
    value: Tensor = in_batch + 0.7 * against_bank
    return value


def gradient(model: nn.Module, name: str, reduction: losses.base.Reduction, rows: slice) -> tuple[float, list[Any]]:
    """Value and gradient of every weight, as NumPy so that they can be sent between processes."""
    loss = LOSSES[name]
    loss.reduction = reduction
    model.zero_grad()
    loss.zero_grad()
    value = total(model, loss, rows)
    torch.autograd.backward(value)
    gradients = [grad_of(parameter) for parameter in model.parameters()]
    for parameter in loss.parameters():  # DDP takes the mean of these as well, once they are part of the model
        mean = distributed.all_reduce_sum(grad_of(parameter)) / distributed.world_size()
        gradients.append(mean)
    return float(value.detach()), [gradient.numpy().copy() for gradient in gradients]


CASES = [(name, reduction) for name in LOSSES for reduction in get_args(losses.base.Reduction)]


def on_rank(rank: int, ranks: int) -> list[tuple[float, list[Any]]]:
    """Values and gradients that one rank gets from its uneven share of the rows."""
    model = DistributedDataParallel(net())
    start = sum(SIZES[ranks][:rank])
    rows = slice(start, start + SIZES[ranks][rank])
    # One set of processes for all cases: starting them takes longer than the cases.
    return [gradient(model, name, reduction, rows) for name, reduction in CASES]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process_would(ranks: int) -> None:
    """More GPUs must not change the loss; a wrong factor would act like another learning rate."""
    alone = [gradient(net(), name, reduction, slice(0, 16)) for name, reduction in CASES]
    for results in run_ranks(ranks, on_rank):
        for case, (value, gradients), (expected, expected_gradients) in zip(CASES, results, alone, strict=True):
            assert value == pytest.approx(expected, abs=1e-9), case
            for ours, right in zip(gradients, expected_gradients, strict=True):
                np.testing.assert_allclose(ours, right, rtol=0, atol=1e-9, err_msg=str(case))


def lifted(model: nn.Module, rows: slice) -> tuple[float, list[Any]]:
    """The original lifted structure loss couples anchors of different ranks, and works in-batch only."""
    x, labels, indices, *_ = data()
    model.zero_grad()
    loss = losses.LiftedStructureLoss(variant="original", measure="distance")
    value = loss(F.normalize(model(x[rows]), dim=1), labels[rows], indices=indices[rows])
    torch.autograd.backward(value)
    return float(value.detach()), [grad_of(parameter).numpy().copy() for parameter in model.parameters()]


def lifted_on_rank(rank: int, ranks: int) -> tuple[float, list[Any]]:
    """The coupled loss on this rank's share of the batch."""
    start = sum(SIZES[ranks][:rank])
    return lifted(DistributedDataParallel(net()), slice(start, start + SIZES[ranks][rank]))


def test_rows_that_are_coupled_are_coupled_over_ranks() -> None:
    """The statistics of a positive on another rank must come from there."""
    expected, expected_gradients = lifted(net(), slice(0, 16))
    for value, gradients in run_ranks(2, lifted_on_rank):
        assert value == pytest.approx(expected, abs=1e-9)
        for ours, right in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(ours, right, rtol=0, atol=1e-9)


def alone(rank: int, ranks: int) -> float:
    """Only rank 0 computes a loss."""
    x, labels, *_ = data()
    rows = slice(0, 7) if rank == 0 else slice(7, 16)
    if rank == 1:
        return float("nan")  # calls nothing: a loss that keeps to itself must not wait for this rank
    return float(ContrastiveLoss(0.2, gather=False)(F.normalize(x[rows], dim=1), labels[rows]))


def test_without_gather_a_rank_needs_no_other() -> None:
    """A loss that waits for a rank that never calls it hangs the job."""
    x, labels, *_ = data()
    expected = ContrastiveLoss(0.2)(F.normalize(x[:7], dim=1), labels[:7])
    assert run_ranks(2, alone)[0] == pytest.approx(float(expected), abs=1e-9)
