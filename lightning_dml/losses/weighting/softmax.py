"""Weightings of the softmax family: the negatives of an anchor share one total by the exponentials of S.

Whatever the loss, and however many positives each face the negatives, the weight of a negative is the row's softmax
times one number per row. So nothing of positives x negatives is ever made, and one exponential per pair is enough.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dml.checks import check_choice, check_number
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.distance import MIN_DISTANCE
from lightning_dml.losses.weighting.rows import Positives, row_softmax, side_softmax, softplus

PositivesReduction = Literal["mean", "sum"]


class NPairWeighting(Weighting):
    r"""Softmax weights of each positive against all negatives; see `NPairLoss` and `NTXentLoss`.

    With :math:`\ell_i` the log-sum-exp of :math:`s S` over the negatives and :math:`z_j` the logit of a positive, here
    :math:`s S_{ij}`, a positive is missed with probability :math:`\sigma(\ell_i - z_j)`. This is its weight but for the
    scale; the sum over the positives is the total that the negatives share by softmax.
    """

    def __init__(self, scale: float = 16.0, *, positives: PositivesReduction = "mean") -> None:
        super().__init__()
        check_number("scale", scale, "the sharpness of a softmax over similarities such as 16.0", above=0)
        check_choice(
            "positives",
            positives,
            get_args(PositivesReduction),
            "it says whether the terms of an anchor's positives are averaged or summed",
        )
        self.scale = scale
        self.positives: PositivesReduction = positives

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        push = row_softmax(similarity.mul_(self.scale), negative)
        cosines, slopes = self.target(pairs.values)
        excess = push.log_sum[pairs.row] - self.scale * cosines
        losses, misses = softplus(excess), self.scale * torch.sigmoid(excess)
        if self.positives == "mean":
            share = pairs.counts.to(similarity.dtype).reciprocal()[pairs.row]
            losses, misses = losses * share, misses * share
        weights = push.shared(pairs.sums(misses))
        weights[pairs.row, pairs.column] = -misses * slopes
        return pairs.sums(losses), weights

    def target(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """Stand-in for the similarities (E,) of positives in the softmax, and its derivative by them."""
        return values, 1.0

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"scale={self.scale}, positives={self.positives!r}"


class TupletMarginWeighting(NPairWeighting):
    r"""The weights of `NPairWeighting` with the angle of the positive less a margin; see `TupletMarginLoss`."""

    def __init__(self, scale: float = 64.0, margin: float = 5.73, *, positives: PositivesReduction = "mean") -> None:
        super().__init__(scale, positives=positives)
        check_number("margin", margin, "an angle in degrees such as 5.73", least=0, most=90)
        self.margin = margin

    def target(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of the angle less the margin, and its derivative by the cosine of the angle."""
        cosine, sine = math.cos(math.radians(self.margin)), math.sin(math.radians(self.margin))
        squared = ((1 - values) * (1 + values)).clamp_(min=MIN_DISTANCE**2)
        sines = squared.sqrt()
        lean = (values / sines).masked_fill_(squared <= MIN_DISTANCE**2, 0)
        return values * cosine + sines * sine, cosine - sine * lean

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"scale={self.scale}, margin={self.margin}, positives={self.positives!r}"


class SupConWeighting(Weighting):
    """Softmax over positives and negatives less a target shared by the positives; see `SupConLoss`."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        push = row_softmax(similarity.div_(self.temperature), negative)
        logits = pairs.values / self.temperature
        everything = torch.logaddexp(push.log_sum, side_softmax(pairs, logits).log_sum)
        # A row without positives has no loss, and without any pair no probabilities either.
        share = (push.log_sum - everything).exp_().masked_fill_(pairs.counts == 0, 0)
        weights = push.shared(share / self.temperature)
        surprise = everything[pairs.row] - logits
        target = pairs.counts.to(similarity.dtype).reciprocal()[pairs.row]
        weights[pairs.row, pairs.column] = (torch.exp(-surprise) - target) / self.temperature
        return pairs.sums(surprise * target), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"temperature={self.temperature}"


class NCAWeighting(Weighting):
    """Softmax weights within each side, with the same total on both; see `NCALoss`."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        check_number("scale", scale, "the sharpness of a softmax over similarities such as 2.0", above=0)
        self.scale = scale

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        push = row_softmax(similarity.mul_(self.scale), negative)
        pull = side_softmax(pairs, self.scale * pairs.values)
        excess = (push.log_sum - pull.log_sum).masked_fill_(pairs.counts == 0, -torch.inf)
        total = self.scale * torch.sigmoid(excess)
        weights = push.shared(total)
        weights[pairs.row, pairs.column] = -pull.shared(total)[pairs.row, pairs.slot]
        return softplus(excess), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"scale={self.scale}"


def check_temperature(temperature: float) -> None:
    """Raises `InputError` unless the temperature is finite and positive."""
    check_number("temperature", temperature, "what similarities are divided by before a softmax, such as 0.1", above=0)
