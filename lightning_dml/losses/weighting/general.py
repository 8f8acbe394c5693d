"""The weighting of `GeneralPairWeightingLoss`: a shape for each side, by name, on similarity or on distance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dml.checks import check_choice, check_number
from lightning_dml.errors import InputError
from lightning_dml.losses.measure import UnsquaredMeasure, check_unsquared_measure
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.distance import distance_and_slope
from lightning_dml.losses.weighting.rows import LEAST_EXPONENT, row_softmax

ShapeName = Literal["constant", "linear", "power", "exponential", "sigmoid", "softmax", "softmax_with_one"]
Normalization = Literal["none", "mean", "sum", "nonzero"]


@dataclass(frozen=True)
class Shape:
    """Weight of a pair as a function of its violation v, the amount by which it is on the wrong side of a threshold.

    Attributes:
        name: constant 1, linear [v]+, power [v]+^exponent, exponential e^(rate v), sigmoid 1/(1 + e^(-rate v)), softmax
            e^(rate v) / sum, softmax_with_one e^(rate v) / (1 + sum), sums over the anchor's kept pairs of the side.
        threshold: where v is 0.
        rate: of the exponentials.
        exponent: of the power.
    """

    name: ShapeName
    threshold: float
    rate: float = 10.0
    exponent: float = 2.0

    def __post_init__(self) -> None:
        check_choice("weighting", self.name, get_args(ShapeName))
        check_number("threshold", self.threshold, "a number in the units of the measure, such as 0.5")
        check_number("rate", self.rate, "the sharpness of an exponential such as 10.0", above=0)
        check_number("exponent", self.exponent, "the exponent of a power such as 2.0", above=0)

    def __call__(self, violation: Tensor, mask: Tensor) -> Tensor:
        """Weights (n, M) for violations (n, M), 0 where `mask` (n, M) is False."""
        if self.name in ("softmax", "softmax_with_one"):
            return row_softmax(self.rate * violation, mask, with_one=self.name == "softmax_with_one").shares()
        if self.name == "constant":
            weights = torch.ones_like(violation)
        elif self.name == "linear":
            weights = violation.relu()
        elif self.name == "power":
            weights = violation.relu().pow_(self.exponent)
        elif self.name == "exponential":
            weights = torch.exp((self.rate * violation).clamp_(max=-LEAST_EXPONENT))
        else:
            weights = torch.sigmoid(self.rate * violation)
        return weights.masked_fill_(~mask, 0)


class GeneralWeighting(Weighting):
    """Named weightings on both sides; see `GeneralPairWeightingLoss`."""

    def __init__(
        self,
        positive: Shape,
        negative: Shape,
        *,
        normalization: Normalization = "none",
        measure: UnsquaredMeasure = "similarity",
    ) -> None:
        super().__init__()
        check_choice("normalization", normalization, get_args(Normalization))
        check_unsquared_measure(measure)
        self.positive = positive
        self.negative = negative
        self.normalization = normalization
        self.measure = measure

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M)."""
        # Oriented so that both sides read alike: positives violate where it is small, negatives where it is large.
        sign, closeness, slope = 1.0, similarity, None
        if self.measure == "distance":
            distance, slope = distance_and_slope(similarity)
            sign, closeness = -1.0, -distance
        push = self.negative(closeness - sign * self.negative.threshold, negative)
        pull = self.positive(sign * self.positive.threshold - closeness, positive)
        weights = self._normalized(push, negative) - self._normalized(pull, positive)
        losses = (weights * closeness).sum(dim=1)
        return losses, weights if slope is None else weights * slope

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"{self.positive}, {self.negative}, normalization={self.normalization!r}, measure={self.measure!r}"

    def _normalized(self, weights: Tensor, mask: Tensor) -> Tensor:
        if self.normalization == "none":
            return weights
        if self.normalization == "mean":
            divisor = mask.to(weights.dtype).sum(dim=1, keepdim=True)
        elif self.normalization == "sum":
            divisor = weights.sum(dim=1, keepdim=True)
        else:
            divisor = (weights != 0).to(weights.dtype).sum(dim=1, keepdim=True)
        return weights / divisor.masked_fill(divisor == 0, 1)


def shape(argument: str, name: ShapeName, threshold: float, settings: Mapping[str, float] | None) -> Shape:
    """A `Shape` from a name and a config's settings; errors name `argument`."""
    settings = {"threshold": threshold, **(settings or {})}
    known = [field.name for field in fields(Shape) if field.name != "name"]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise InputError(f"{argument}_args knows {', '.join(known)}, got {unknown[0]!r}")
    try:
        return Shape(name, **settings)
    except InputError as error:
        raise InputError(f"{argument}: {error}") from error
