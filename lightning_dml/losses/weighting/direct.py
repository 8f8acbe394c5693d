"""Weights that are chosen: direct assignment by weight curves, or by halves of other losses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.losses.curves import Curve, WeightCurve
from lightning_dml.losses.weighting.base import Weighting
from lightning_dml.losses.weighting.row_weights import RowWeights, check_frozen
from lightning_dml.losses.weighting.rows import Positives


class DirectWeighting(Weighting):
    r"""Weights that are chosen, not derived from a loss; see `DirectWeightingLoss`.

    Args:
        positive: a weight curve, or the `RowWeights` of a loss, of which the positives are taken.
        negative: the same for negatives. One object on both sides is asked once.

    Raises:
        InputError: for a side that is not callable, or that has parameters to train.
    """

    def __init__(self, positive: WeightCurve | RowWeights, negative: WeightCurve | RowWeights) -> None:
        super().__init__()
        for name, side in (("positive", positive), ("negative", negative)):
            if not callable(side):
                raise InputError(
                    f"{name} must be a weight curve, a callable from similarities to weights such as "
                    f"lightning_dml.losses.curves.Step(0.5), or lightning_dml.losses.FromLoss(loss), got {side!r}"
                )
            check_frozen(name, side)
        self.positive = positive
        self.negative = negative
        self.separable = all(side.separable for side in self.rows())

    def rows(self) -> list[RowWeights]:
        """The sides that are functions of the row, each once: those of positives first."""
        return list(dict.fromkeys(side for side in (self.positive, self.negative) if isinstance(side, RowWeights)))

    def forward(
        self,
        similarity: Tensor,
        positive: Tensor,
        negative: Tensor,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M).

        `statistics` holds what `rows()` ask for, side by side: (n, a) of the block's anchors, (M, r) of all references.
        """
        row_weights = self._row_weights(similarity, positive, negative, statistics)
        if isinstance(self.negative, RowWeights):
            weights = row_weights[self.negative]  # 0 where there is no pair, and its positives are written over
            if self.positive is self.negative:
                return torch.linalg.vecdot(weights, similarity), weights
        else:
            weights = self.negative(similarity).detach()
            # A curve of ours returns memory of its own; somebody's function may return what it keeps, or its input.
            mine = isinstance(self.negative, Curve) and weights is not similarity
            # Filled and not multiplied: an exponential curve may be infinite where there is no pair.
            weights = weights.masked_fill_(~negative, 0) if mine else weights.masked_fill(~negative, 0)
        pairs = Positives.of(similarity, positive)
        if isinstance(self.positive, RowWeights):
            pull = row_weights[self.positive][pairs.row, pairs.column]
        else:
            pull = -self.positive(pairs.values).detach().to(weights.dtype)
        weights[pairs.row, pairs.column] = pull
        return torch.linalg.vecdot(weights, similarity), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        sides = {"positive": self.positive, "negative": self.negative}
        return ", ".join(f"{name}={side}" for name, side in sides.items() if not isinstance(side, RowWeights))

    def _row_weights(
        self, similarity: Tensor, positive: Tensor, negative: Tensor, statistics: tuple[Tensor, Tensor] | None
    ) -> dict[RowWeights, Tensor]:
        sides = self.rows()
        if not sides:
            return {}
        needs = [side.columns(similarity.shape[1]) for side in sides]
        own_needs, shared_needs = [need[0] for need in needs], [need[1] for need in needs]
        if statistics is None:
            if any(own_needs):
                raise InputError(
                    "a side of this weighting looks beyond its row, and must get its statistics from "
                    "DirectWeightingLoss; got None"
                )
            statistics = similarity.new_empty(len(similarity), 0), similarity.new_empty(similarity.shape[1], 0)
        own, everyone = torch.split(statistics[0], own_needs, 1), torch.split(statistics[1], shared_needs, 1)
        return {
            side: side(similarity, positive, negative, mine, shared)
            for side, mine, shared in zip(sides, own, everyone, strict=True)
        }
