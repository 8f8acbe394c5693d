"""Moment adaptation against the formula in numpy, and the filter against a scalar one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank, MomentAdaptation
from tests.tolerances import rounding


def unit(rows: int, shift: float = 0.0, seed: int = 0, dim: int = 4) -> Tensor:
    """Random unit rows about a common direction."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator) + shift, dim=1)


def filled(rows: Tensor) -> MemoryBank:
    """A bank that holds them, each of a class of its own."""
    bank = MemoryBank(len(rows), rows.shape[1])
    bank.enqueue(rows, torch.arange(len(rows)), torch.arange(len(rows)))
    return bank


def mapped(stored: Tensor, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The textbook formula, row by row."""
    old = stored.double().numpy()
    new = (old - old.mean(axis=0)) / old.std(axis=0) * std + mean
    return np.stack([row / np.linalg.norm(row) for row in new])


def test_stored_rows_take_the_moments_of_the_batch() -> None:
    """Off by the unbiased deviation or by the order of shift and scale, the bank lies beside the batch."""
    stored, batch = unit(50), unit(20, shift=0.5, seed=1)
    bank = filled(stored)
    MomentAdaptation()(bank, batch, torch.arange(20))
    rows = batch.double().numpy()
    # The moments are summed in float64; then come a product and a sum of magnitudes up to 2, four squares, a root and a
    # division by lengths of about 1.
    expected = mapped(stored, rows.mean(axis=0), rows.std(axis=0))
    np.testing.assert_allclose(bank.embeddings, expected, rtol=0, atol=rounding(8, 2.0))
    assert torch.equal(bank.labels, torch.arange(50))


def test_rows_that_do_not_count_move_nothing() -> None:
    """A NaN in the batch would otherwise be in every row of the bank a step later."""
    stored, batch = unit(50), unit(20, shift=0.5, seed=1)
    spoilt = torch.cat((batch, torch.full((1, 4), torch.nan), unit(1, shift=9.0)))
    clean, other = filled(stored), filled(stored)
    MomentAdaptation()(clean, batch, torch.arange(20))
    MomentAdaptation()(other, spoilt, torch.tensor([*range(20), 3, -1]))
    torch.testing.assert_close(other.embeddings, clean.embeddings)


@pytest.mark.parametrize("kalman", [False, True])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_spread_changes_nothing(rows: int, kalman: bool) -> None:
    """One row has no variance: all columns of the bank would collapse onto it."""
    stored = unit(10)
    bank = filled(stored)
    adaptation = MomentAdaptation(kalman=kalman)
    adaptation(bank, unit(rows, seed=2), torch.arange(rows))
    torch.testing.assert_close(bank.embeddings, stored)


def test_an_empty_bank_stays_empty() -> None:
    """The first batch of a training finds no rows to map."""
    bank = MemoryBank(4, 4)
    MomentAdaptation()(bank, unit(5), torch.arange(5))
    assert len(bank) == 0


def test_a_column_without_spread_is_moved_and_not_stretched() -> None:
    """Dead columns are common early in training; a division by their deviation would blow the bank up."""
    stored = F.normalize(torch.cat((unit(30), torch.ones(30, 1)), dim=1), dim=1)
    stored[:, 4] = 0.5
    bank, batch = MemoryBank(30, 5), unit(20, seed=3, dim=5)
    bank.enqueue(stored, torch.arange(30))
    MomentAdaptation()(bank, batch, torch.arange(20))
    assert torch.isfinite(bank.embeddings).all()
    torch.testing.assert_close(bank.embeddings.norm(dim=1), torch.ones(30))


def kalman(measurements: list[float], noises: list[float], steps: list[float]) -> list[float]:
    """A filter of one number that takes a random walk, in plain Python."""
    estimates, variance = [measurements[0]], noises[0]
    for measured, noise, step in zip(measurements[1:], noises[1:], steps[1:], strict=True):
        variance += step
        gain = variance / (variance + noise)
        estimates.append(estimates[-1] + gain * (measured - estimates[-1]))
        variance *= 1 - gain
    return estimates


def test_the_filter_is_the_textbook_one() -> None:
    """The bank's mean after each batch shows which moments the filter holds; the oracle is scalar and slow."""
    batches = [unit(16, shift=0.1 * step, seed=step) for step in range(12)]
    adaptation = MomentAdaptation(kalman=True, process_noise=0.01)
    for batch in batches:
        adaptation(MemoryBank(4, 4), batch, torch.arange(16))
    filtered = adaptation.state_dict()["filtered"].double()
    for column in range(4):
        values = [batch[:, column].double() for batch in batches]
        variances = [float(value.var(unbiased=False)) for value in values]
        means = kalman(
            [float(value.mean()) for value in values],
            [variance / 16 for variance in variances],
            [0.01 * variance for variance in variances],
        )
        deviations = kalman(
            [math.sqrt(variance) for variance in variances],
            [variance / 32 for variance in variances],
            [0.01 * variance for variance in variances],
        )
        assert float(filtered[0, column]) == pytest.approx(means[-1], abs=1e-5)
        assert float(filtered[1, column]) == pytest.approx(deviations[-1], abs=1e-5)


def test_the_filter_is_steadier_than_one_batch_and_follows_a_change() -> None:
    """Smoothing that never arrives would keep the bank where the network no longer is."""
    adaptation = MomentAdaptation(kalman=True)
    plain, smooth = [], []
    for step in range(200):
        batch = unit(16, shift=0.0 if step < 100 else 1.0, seed=step)
        adaptation(MemoryBank(4, 4), batch, torch.arange(16))
        plain.append(float(batch[:, 0].mean()))
        smooth.append(float(adaptation.state_dict()["filtered"][0, 0]))
    assert np.std(smooth[50:100]) < 0.5 * np.std(plain[50:100])
    assert abs(smooth[-1] - np.mean(plain[100:])) < 0.05


def test_the_state_continues_the_filter() -> None:
    """A resumed run must not start to smooth from its first batch again."""
    whole, first, second = (MomentAdaptation(kalman=True) for _ in range(3))
    batches = [unit(8, seed=step) for step in range(6)]
    for part, adaptation in ((batches, whole), (batches[:3], first)):
        for batch in part:
            adaptation(MemoryBank(4, 4), batch, torch.arange(8))
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second(MemoryBank(4, 4), batch, torch.arange(8))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    whole.reset()
    assert whole.state_dict() == {"filtered": None, "variance": None}


def test_a_noise_that_cannot_be_is_named() -> None:
    """A process noise of zero would freeze the moments after the first batches."""
    with pytest.raises(InputError, match=r"process_noise.*0"):
        MomentAdaptation(process_noise=0.0)
