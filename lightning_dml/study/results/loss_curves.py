"""The weight curves of the losses that a study's configs name."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_dml.errors import InputError, input_error_in

# By this import a config may name the losses without the module, as for `fit`.
from lightning_dml.losses import Context, context_free, weight_curve
from lightning_dml.losses.inspection.weight_curves import draws_pairs
from lightning_dml.parsing import instantiated
from lightning_dml.study.plan.grid import Point
from lightning_dml.study.plan.loss_axis import loss_config

SIMILARITY = torch.linspace(-1, 1, 201, dtype=torch.float64)
INNER = SIMILARITY.abs() <= 0.98  # losses on distances have infinite weights at 1

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")


@dataclass(frozen=True)
class LossCurve:
    """The weight curve of a loss at `SIMILARITY`.

    Args:
        positive: (n,) weights of positives, float64.
        negative: (n,) weights of negatives.
        at_context: whether they depend on the anchor's other pairs, which are then those of `Context()`.
        of_draws: whether a miner draws, so that they are means.
    """

    positive: Tensor
    negative: Tensor
    at_context: bool
    of_draws: bool = False

    def side(self, name: Side) -> Tensor:
        """Weights (n,) of the positives or the negatives."""
        return self.positive if name == "positive" else self.negative

    def peak(self, *sides: Side) -> float:
        """The largest absolute weight of the sides, both if none is named."""
        return max(float(self._finite(side).abs().max()) for side in sides or SIDES)

    def usual(self, side: Side) -> float:
        """The absolute weight that half of the similarities do not exceed."""
        return float(self._finite(side).abs().median())

    @property
    def lowest(self) -> float:
        """The lowest weight: below 0 where a positive is pushed away or a negative pulled, but for rounding."""
        lowest = min(float(self._finite(side).min()) for side in SIDES)
        return lowest if lowest < -1e-6 * self.peak() else 0.0

    def _finite(self, side: Side) -> Tensor:
        return torch.where(INNER & self.side(side).isfinite(), self.side(side), 0)


def curves_of(points: Iterable[Point]) -> dict[str, LossCurve]:
    """By the key of the point; a loss of several points is asked once.

    Raises:
        InputError: naming the first point whose loss cannot be built or has no weight curve.
    """
    by_loss: dict[str, LossCurve] = {}
    curves = {}
    for point in points:
        text = json.dumps(loss_config(point), sort_keys=True)
        if text not in by_loss:
            try:
                by_loss[text] = _curve(json.loads(text))
            # Whatever a loss of any library raises: a report must not fail for it.
            except Exception as error:
                raise InputError(f"the loss of ({point.label}) has no weight curve: {_said(error)}") from error
        curves[point.key] = by_loss[text]
    return curves


def alike(curves: Sequence[LossCurve], side: Side) -> bool:
    """Whether all give the same weights on the side."""
    first = curves[0].side(side)
    return all(torch.allclose(first, each.side(side), rtol=1e-6, atol=1e-9, equal_nan=True) for each in curves[1:])


def _curve(config: Any) -> LossCurve:
    if not config:
        raise InputError("model.init_args.loss names none")
    parser = ArgumentParser(exit_on_error=False)
    # As in LightningCLI, other libraries' constructors may leave types out.
    parser.add_subclass_arguments(nn.Module, "loss", fail_untyped=False)
    loss = instantiated(parser, parser.parse_object({"loss": config})).loss
    alone = context_free(loss)
    weights = weight_curve(loss, SIMILARITY, context=Context((), ()) if alone else Context())
    return LossCurve(*weights, at_context=not alone, of_draws=draws_pairs(loss))


def _said(error: BaseException) -> str:
    """One line: of what jsonargparse wraps, the error of ours, else the part that names the option."""
    text = " ".join(str(input_error_in(error) or error).split())
    text = text.partition(" Given value type")[0]
    text = text.partition("Errors: - ")[2] or text
    return textwrap.shorten(text or type(error).__name__, 400)
