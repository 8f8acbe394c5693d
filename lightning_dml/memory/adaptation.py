"""Moment adaptation: it keeps stored embeddings at the mean and the variance of current ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.labels import UNLABELLED
from lightning_dml.memory.bank import MemoryBank

MIN_STD = 1e-4
"""Columns with less spread than this, in the bank or in the batch, are moved but not stretched."""


class MomentAdaptation:
    r"""Maps a bank so that its mean and standard deviation, column by column, are those of the current embeddings.

    Drift is taken for a change of distribution, and the stored embeddings are updated at each iteration to match the
    first and second moments of the current ones (Adaptive Cross Batch Normalization, arXiv 2303.17127):

    .. math:: v \leftarrow (v - \mu_{bank}) \, \sigma / \sigma_{bank} + \mu

    and back to unit length. Only the paper's abstract was at hand: the unit length, the limits and the filter below are
    ours.

    The moments of one batch are noisy. With `kalman`, they are measurements of moments that take a random walk: a
    Kalman filter for each column smooths them. A batch of n rows measures the mean with variance s^2 / n and the
    standard deviation with s^2 / 2n, and a step moves either by a variance of `process_noise` s^2.

    Args:
        kalman: smooth the moments over the batches.
        process_noise: variance of a step of the random walk, as a share of the column's variance; small values
            smooth more.

    Raises:
        InputError: if `process_noise` is not positive and finite.

    Examples:
        >>> bank = MemoryBank(size=4, dim=2)
        >>> bank.enqueue(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 1]))
        >>> MomentAdaptation()(bank, torch.tensor([[0.0, 1.0], [-0.8, 0.6]]), torch.tensor([0, 1]))
        >>> bank.embeddings.sum(dim=0)  # that of the batch is (-0.8, 1.6); unit length takes a little of it away
        tensor([-0.6247,  1.7809])
    """

    def __init__(self, kalman: bool = False, process_noise: float = 1e-3) -> None:
        check_number("process_noise", process_noise, "a share of the variance, such as 0.001", above=0)
        self.kalman = kalman
        self.process_noise = process_noise
        self._filtered: Tensor | None = None  # (2, D): mean and standard deviation
        self._variance: Tensor | None = None  # (2, D): variance of either estimate

    @torch.no_grad()
    def __call__(self, bank: MemoryBank, embeddings: Tensor, labels: Tensor) -> None:
        """Maps `bank`, in place, to the moments of a batch.

        Args:
            bank: left as it is while it has no rows.
            embeddings: (n, D) float current embeddings of all ranks; those that are not finite do not count.
            labels: (n,) int64; rows with label -1 do not count.
        """
        used = torch.isfinite(embeddings).all(dim=1) & (labels != UNLABELLED)
        rows = torch.where(used[:, None], embeddings.float(), 0.0)
        count = used.sum()
        target = torch.stack(_moments(rows, used, count))
        enough = count > 1  # a single row has no spread
        if self.kalman:
            target = self._smoothed(target, count, enough)
        if not bank.store.count:
            return
        mean, std = bank.moments()
        stretch = torch.where((std > MIN_STD) & (target[1] > MIN_STD), target[1] / std.clamp_min(MIN_STD), 1.0)
        scale = torch.where(enough, stretch, 1.0)
        shift = torch.where(enough, target[0] - mean * scale, 0.0)
        bank.transform(scale, shift)

    def reset(self) -> None:
        """Forgets the smoothed moments."""
        self._filtered = self._variance = None

    def state_dict(self) -> dict[str, Any]:
        """The smoothed moments and their uncertainty."""
        return {"filtered": self._filtered, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state."""
        self._filtered, self._variance = state["filtered"], state["variance"]

    def _smoothed(self, measured: Tensor, count: Tensor, enough: Tensor) -> Tensor:
        """One step of the filter: predict, weigh the measurement by its variance, correct."""
        spread = measured[1].clamp_min(MIN_STD).square()
        noise = torch.stack((spread / count.clamp_min(1), spread / (2 * count.clamp_min(1))))
        noise = torch.where(enough, noise, 1.0)  # of a batch without spread nothing is known
        if self._filtered is None or self._variance is None or self._filtered.shape != measured.shape:
            self._filtered, self._variance = measured, noise
            return measured
        filtered, variance = self._filtered.to(measured), self._variance.to(measured)
        predicted = variance + self.process_noise * spread
        gain = torch.where(enough, predicted / (predicted + noise), 0.0)
        self._filtered = filtered + gain * (measured - filtered)
        self._variance = (1 - gain) * predicted
        return self._filtered


def _moments(rows: Tensor, used: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.sum(dim=0) / count.clamp_min(1)
    variance = ((rows - mean).square() * used[:, None]).sum(dim=0) / count.clamp_min(1)
    return mean, variance.sqrt()
