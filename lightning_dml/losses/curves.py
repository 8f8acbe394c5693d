"""Weight curves: weight of a pair as a function of its similarity alone (arXiv 2103.14003, after its abstract).

The paper studies positive and negative weights apart by assigning them directly; its printed functions could not
be read, so these shapes and their names are this library's reconstruction. A curve is any callable from
similarities to weights of the same shape; those below also plot, print and come from YAML.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.errors import InputError


@dataclass(frozen=True)
class Curve:
    """A weight curve. Called with similarities of any shape, it returns weights of that shape."""

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, float | int) and not isinstance(value, bool):
                check_number(f"{own.name} of {type(self).__name__}", value)

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities; floating dtype and shape are kept."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(similarity)")


@dataclass(frozen=True)
class Constant(Curve):
    """The same weight everywhere: w(S) = value.

    >>> Constant(2.0)(torch.tensor([-1.0, 0.5]))
    tensor([2., 2.])
    """

    value: float = 1.0

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return torch.full_like(similarity, self.value)


@dataclass(frozen=True)
class Step(Curve):
    """A step, `value` beyond the threshold and 0 before it: w(S) = value 1[S > threshold].

    With `above=False` the weighted side is S < threshold. On negatives this is the contrastive loss.

    >>> Step(0.5)(torch.tensor([0.4, 0.6]))
    tensor([0., 1.])
    """

    threshold: float = 0.5
    value: float = 1.0
    above: bool = field(default=True, kw_only=True)

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return _scaled_(unit_step_(_beyond(similarity, self.threshold, self.above)), self.value)


@dataclass(frozen=True)
class Linear(Curve):
    """A ramp that grows linearly beyond the threshold: w(S) = slope [S - threshold]+, or slope [threshold - S]+.

    >>> Linear(0.5, slope=2.0)(torch.tensor([0.25, 0.75]))
    tensor([0.0000, 0.5000])
    """

    threshold: float = 0.5
    slope: float = 1.0
    above: bool = field(default=True, kw_only=True)

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return _scaled_(_beyond(similarity, self.threshold, self.above), self.slope)


@dataclass(frozen=True)
class Power(Curve):
    """A power beyond the threshold: w(S) = value [S - threshold]+^exponent, or of [threshold - S]+.

    >>> Power(0.0, exponent=2.0)(torch.tensor([-1.0, 0.5]))
    tensor([0.0000, 0.2500])
    """

    threshold: float = 0.5
    exponent: float = 2.0
    value: float = 1.0
    above: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("exponent of Power", self.exponent, above=0, hint="for 0 use Step")

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return _scaled_(_beyond(similarity, self.threshold, self.above).pow_(self.exponent), self.value)


@dataclass(frozen=True)
class Exponential(Curve):
    """An exponential: w(S) = value exp(rate (S - threshold)); a negative rate falls with similarity.

    >>> Exponential(rate=1.0, threshold=0.5)(torch.tensor([0.5]))
    tensor([1.])
    """

    rate: float = 10.0
    threshold: float = 0.5
    value: float = 1.0

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return _scaled_((similarity - self.threshold).mul_(self.rate).exp_(), self.value)


@dataclass(frozen=True)
class Sigmoid(Curve):
    """A logistic function: w(S) = value / (1 + exp(-rate (S - threshold))); a negative rate falls with similarity.

    >>> Sigmoid(rate=10.0, threshold=0.5)(torch.tensor([0.5]))
    tensor([0.5000])
    """

    rate: float = 10.0
    threshold: float = 0.5
    value: float = 1.0

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        return _scaled_((similarity - self.threshold).mul_(self.rate).sigmoid_(), self.value)


@dataclass(frozen=True)
class PiecewiseLinear(Curve):
    """A table of (similarity, weight) points joined by straight lines; constant beyond the outer points.

    >>> PiecewiseLinear([(0.0, 0.0), (1.0, 2.0)])(torch.tensor([-1.0, 0.25, 2.0]))
    tensor([0.0000, 0.5000, 2.0000])
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        points = [tuple(map(float, point)) for point in self.points]
        if len(points) < 2 or any(len(point) != 2 for point in points):
            raise InputError(f"points of PiecewiseLinear must be at least two (similarity, weight) pairs, got {points}")
        if not all(math.isfinite(number) for point in points for number in point):
            raise InputError(f"points of PiecewiseLinear must be finite, got {points}")
        if any(left[0] >= right[0] for left, right in itertools.pairwise(points)):
            raise InputError(f"points of PiecewiseLinear: similarities must increase from point to point, got {points}")
        object.__setattr__(self, "points", tuple(points))

    def __call__(self, similarity: Tensor) -> Tensor:
        """Weights for similarities."""
        x, y = torch.tensor(self.points, dtype=similarity.dtype, device=similarity.device).T.contiguous()
        right = torch.searchsorted(x, similarity.contiguous()).clamp(1, len(x) - 1)
        left = right - 1
        share = ((similarity - x[left]) / (x[right] - x[left])).clamp(0, 1)
        return torch.lerp(y[left], y[right], share)


def unit_step(excess: Tensor) -> Tensor:
    """The unit step: 1 where a number is positive and 0 where it is 0, in its dtype; none may be negative."""
    return unit_step_(excess.clone())


def unit_step_(excess: Tensor) -> Tensor:
    """`unit_step` in place."""
    # Two vectorised passes; a comparison and its conversion, or torch.sign, are several times as slow on a CPU.
    return excess.mul_(1 / torch.finfo(excess.dtype).tiny).clamp_(max=1)


WeightCurve = Curve | Callable[[Tensor], Any]
"""What a loss takes for a curve; `Curve` comes first, so that a config may name one by its class path."""


def _beyond(similarity: Tensor, threshold: float, above: bool) -> Tensor:
    return (similarity - threshold if above else threshold - similarity).relu_()


def _scaled_(weights: Tensor, value: float) -> Tensor:
    return weights if value == 1 else weights.mul_(value)
