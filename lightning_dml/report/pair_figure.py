"""The weights of the pairs of one training step over their similarities, as a figure with its numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_dml.losses import ObservedWeights, PairWeightingLoss
from lightning_dml.losses.inspection.observed import thinned
from lightning_dml.report import DrawnCurve, curve_figure, save_curves


@dataclass(frozen=True)
class PairFigure:
    """A figure of pairs with the numbers in it.

    Attributes:
        figure: the figure.
        curves: the loss's curve by its name, where it has one.
        observed: the pairs that are drawn, by the name of the loss.
    """

    figure: Figure
    curves: dict[str, DrawnCurve]
    observed: dict[str, ObservedWeights]

    def save(self, path_stem: Path) -> None:
        """Writes the figure as PNG and SVG and its numbers as CSV; see `save_curves`."""
        save_curves(self.figure, self.curves, path_stem, self.observed)


def pair_figure(loss: nn.Module, observed: ObservedWeights, *, points: int, seed: int, caption: str) -> PairFigure:
    """Draws the pairs of a step, and the loss's curve where they must lie on it.

    Args:
        loss: the loss that gave the weights.
        observed: all pairs.
        points: most pairs of each side to draw; they are drawn evenly.
        seed: of the draw.
        caption: a line of text below the figure.
    """
    name = type(loss).__name__
    pairs = {name: thinned(observed, points, seed)}
    curve = exact_curve(loss)
    curves = {} if curve is None else {name: curve}
    return PairFigure(curve_figure(curves, pairs, caption=caption), curves, pairs)


def exact_curve(loss: nn.Module) -> DrawnCurve | None:
    """The loss's weight curve, where the points of a batch, times its anchors, must lie on it."""
    if not isinstance(loss, PairWeightingLoss) or loss.reduction != "anchors" or not loss.weighting.separable:
        return None
    if loss.miner is not None and not loss.miner.separable:
        return None
    device = next((parameter.device for parameter in loss.parameters()), torch.device("cpu"))
    curve = DrawnCurve.of(copy.deepcopy(loss), torch.linspace(-1, 1, 401, dtype=torch.float64, device=device))
    return DrawnCurve(*(column.cpu() for column in curve))
