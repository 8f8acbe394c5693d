"""The weight curves of the losses that a study's configs name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_dml.errors import InputError, input_error_in, one_line

# By this import a config may name the losses without the module, as for `fit`.
from lightning_dml.losses import Context, context_free, weight_curve
from lightning_dml.losses.inspection.weight_curves import draws_pairs
from lightning_dml.parsing import instantiated
from lightning_dml.study.plan.grid import Point
from lightning_dml.study.plan.loss_axis import loss_config

SIMILARITY = torch.linspace(-1, 1, 201, dtype=torch.float64)
INNER = SIMILARITY.abs() <= 0.98  # losses on distances have infinite weights at 1
Side = Literal["positive", "negative"]


class LossCurve(NamedTuple):
    """Weights (n,) float64 at `SIMILARITY`, at the pairs of `Context()` where these matter, means of draws."""

    positive: Tensor
    negative: Tensor
    at_context: bool
    of_draws: bool

    def finite(self, side: Side) -> Tensor:
        """Weights (n,) of a side, 0 where they are beyond all bounds."""
        weights: Tensor = getattr(self, side)
        return torch.where(INNER & weights.isfinite(), weights, 0)


def curves_of(points: Iterable[Point]) -> dict[str, LossCurve]:
    """Curves by the key of the point; a loss of several points is asked once.

    Raises:
        InputError: naming the first point whose loss cannot be built or has no weight curve.
    """
    by_loss: dict[str, LossCurve] = {}
    curves = {}
    for point in points:
        text = json.dumps(loss_config(point), sort_keys=True)
        try:
            curves[point.key] = by_loss[text] = by_loss.get(text) or _curve(json.loads(text))
        except Exception as error:  # whatever a loss of any library raises: a report must not fail for it
            # Of what jsonargparse wraps, our own error, else the part that names the option.
            reason = one_line(input_error_in(error) or error, 10**4).partition(" Given value type")[0]
            reason = (reason.partition("Errors: - ")[2] or reason)[:400]
            raise InputError(f"the loss of ({point.label}) has no weight curve: {reason}") from error
    return curves


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
