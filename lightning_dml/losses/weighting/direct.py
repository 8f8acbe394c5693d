"""Weights that are chosen: direct assignment by weight curves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses.curves import Curve, WeightCurve
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.rows import Positives


class DirectWeighting(Weighting):
    r"""Weights that are chosen, not derived from a loss; see `DirectWeightingLoss`."""

    separable = True

    def __init__(self, positive: WeightCurve, negative: WeightCurve) -> None:
        super().__init__()
        for name, curve in (("positive", positive), ("negative", negative)):
            if not callable(curve):
                raise InputError(
                    f"{name} must be a weight curve, a callable from similarities to weights such as "
                    f"lightning_dml.losses.curves.Step(0.5), got {curve!r}"
                )
            if isinstance(curve, nn.Module) and any(each.requires_grad for each in curve.parameters()):
                raise InputError(
                    f"{name} has parameters that require a gradient, but weights are held constant: "
                    "freeze them with requires_grad_(False)"
                )
        self.positive = positive
        self.negative = negative

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M)."""
        # Filled and not multiplied: an exponential curve may be infinite where there is no pair.
        weights = self.negative(similarity).detach()
        # A curve of ours returns memory of its own; somebody's function may return what it keeps, or its input.
        mine = isinstance(self.negative, Curve) and weights is not similarity
        weights = weights.masked_fill_(~negative, 0) if mine else weights.masked_fill(~negative, 0)
        pairs = Positives.of(similarity, positive)
        weights[pairs.row, pairs.column] = -self.positive(pairs.values).detach().to(weights.dtype)
        return torch.linalg.vecdot(weights, similarity), weights

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"positive={self.positive}, negative={self.negative}"
