"""The axes of a study that choose the loss, as the configs of the points tell; no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import Point
from lightning_dml.study.plan.study_file import Axis


def loss_config(point: Point) -> Any:
    """The part of the point's config at `model.init_args.loss`; None if there is nothing."""
    config: Any = point.config
    for key in ("model", "init_args", "loss"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def chooses_the_loss(axis: Axis, points: Sequence[Point]) -> bool:
    """True when any two variants of the axis have different losses at the same variants of the other axes.

    Raises:
        InputError: if some variants have the same loss and some do not.
    """
    losses: dict[str, dict[str, str]] = {}
    for point in points:
        others = json.dumps({name: variant for name, variant in point.choice.items() if name != axis.name})
        loss = json.dumps(loss_config(point), sort_keys=True)
        losses.setdefault(point.choice[axis.name], {})[others] = loss
    pairs = list(itertools.combinations(losses, 2))
    same = [pair for pair in pairs if not _differ(losses[pair[0]], losses[pair[1]])]
    if same and len(same) < len(pairs):
        raise InputError(f"{same[0][0]} and {same[0][1]} have the same loss")
    return bool(pairs) and not same


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return any(one[others] != other[others] for others in one.keys() & other.keys())
