"""The curve beside the points of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dml.losses import (
    ContrastiveLoss,
    MultiSimilarityLoss,
    TripletLoss,
)
from lightning_dml.losses.mining import TopKMiner
from lightning_dml.report.pair_figure import exact_curve


@pytest.mark.parametrize(
    ("loss", "has_one"),
    [
        (ContrastiveLoss(0.3), True),
        (TripletLoss(), False),
        (MultiSimilarityLoss(), False),
        (ContrastiveLoss(0.3, miner=TopKMiner()), False),
        (ContrastiveLoss(0.3, reduction="pairs"), False),
        (nn.Identity(), False),
    ],
)
def test_no_curve_is_drawn_that_the_points_do_not_lie_on(loss: nn.Module, has_one: bool) -> None:
    """A curve at some other context, or of another scale, beside the points would look like a mistake of the loss."""
    curve = exact_curve(loss)
    assert (curve is not None) == has_one
    if curve is not None:
        assert torch.equal(curve.negative, (curve.similarity > 0.3).double())
