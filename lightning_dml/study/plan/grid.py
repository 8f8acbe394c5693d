"""The grid of a study: its points, the training config of each, and the key by which a trial is known for good."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dml.errors import InputError
from lightning_dml.study.plan.overrides import overlay
from lightning_dml.study.plan.study_file import StudyFile

NOT_IDENTITY = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary")


@dataclass(frozen=True)
class Point:
    """One combination of variants.

    Args:
        choice: the variant of each axis.
        config: the training config, without the seed.
        key: hash of the config: the same training has the same key whatever the axes are called, so that an axis that
            is added with a variant that changes nothing keeps the trials that are there.
        seed_options: dotted options that get the seed too.
    """

    choice: Mapping[str, str]
    config: Mapping[str, Any]
    key: str
    seed_options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`axis=variant` for every axis."""
        return ", ".join(f"{axis}={variant}" for axis, variant in self.choice.items())


@dataclass(frozen=True)
class Run:
    """One training of a study: a grid point and a seed."""

    point: Point
    seed: int

    @property
    def key(self) -> str:
        """Key of the trial and name of its folder."""
        return f"{self.point.key}-s{self.seed}"

    @property
    def label(self) -> str:
        """A name for people: the point's label and the seed."""
        return f"{self.point.label}, seed={self.seed}"


def points_of(study: StudyFile) -> list[Point]:
    """The points of the grid, less what the study excludes.

    Raises:
        InputError: for an override that does not fit the config, points that are the same training, an empty grid, or
            a baseline that no point has.
    """
    points: list[Point] = []
    by_key: dict[str, Point] = {}
    for variants in itertools.product(*(axis.variants for axis in study.axes)):
        choice = dict(zip((axis.name for axis in study.axes), variants, strict=True))
        if any(_matches(choice, excluded) for excluded in study.exclude):
            continue
        point = _point(study, choice)
        if point.key in by_key:
            raise InputError(
                f"the points ({by_key[point.key].label}) and ({point.label}) are the same training config: take a "
                "variant out, or put one of the points under exclude"
            )
        by_key[point.key] = point
        points.append(point)
    if not points:
        raise InputError("the study has no point left: exclude takes all of them out")
    if study.baseline and not any(baseline_of(point, points, study.baseline) for point in points):
        wanted = ", ".join(f"{axis}={variant}" for axis, variant in study.baseline.items())
        raise InputError(f"baseline ({wanted}) is no point of the grid: exclude takes it out")
    return points


def runs_of(study: StudyFile, points: Sequence[Point]) -> list[Run]:
    """All trainings, the first seed of every point before the second of any, so that a table fills evenly."""
    return [Run(point, seed) for seed in study.seeds for point in points]


def baseline_of(point: Point, points: Sequence[Point], baseline: Mapping[str, str]) -> Point | None:
    """The point to compare with: that with the baseline's variants, and those of `point` on the other axes."""
    wanted = {**point.choice, **baseline}
    return next((other for other in points if baseline and other.choice == wanted), None)


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that makes one training another: all but the seed, and where and how it is logged."""
    trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key not in NOT_IDENTITY}
    return {**{key: value for key, value in config.items() if key != "seed_everything"}, "trainer": trainer}


def covering(points: Sequence[Point]) -> list[Point]:
    """Few points, in which every variant occurs."""
    unseen = {variant for point in points for variant in point.choice.items()}
    cover = []
    while unseen:
        cover.append(max(points, key=lambda point: len(unseen & set(point.choice.items()))))
        unseen -= set(cover[-1].choice.items())
    return cover


def check_configs(
    points: Sequence[Point],
    parse: Callable[[dict[str, Any]], object],
    config_of: Callable[[Point], Mapping[str, Any]] = lambda point: point.config,
) -> None:
    """Has a training parser read configs in which every variant occurs, so that a typo shows before the first trial.

    Args:
        points: of the grid.
        parse: raises InputError for a config that is wrong.
        config_of: makes the config that a training of the point gets.

    Raises:
        InputError: naming the first point whose config the parser refuses.
    """
    for point in covering(points):
        try:
            parse(json.loads(json.dumps(config_of(point))))
        except InputError as error:
            raise InputError(f"the training config of ({point.label}) is refused: {error}") from error


def _point(study: StudyFile, choice: dict[str, str]) -> Point:
    config = dict(study.base)
    for axis in study.axes:
        variant = choice[axis.name]
        try:
            config = overlay(config, axis.variants[variant])
        except InputError as error:
            raise InputError(f"axes.{axis.name}, variant {variant}: {error}") from error
    config.pop("seed_everything", None)
    for option in study.seed_options:
        config = overlay(config, {option: 0})  # so that the parser sees whether there is such an option
    try:
        text = json.dumps(identity(config), sort_keys=True)
    except TypeError as error:
        raise InputError(f"the training config of ({choice}) must be of numbers, texts, lists and mappings") from error
    return Point(choice, config, hashlib.sha256(text.encode()).hexdigest()[:12], study.seed_options)


def _matches(choice: Mapping[str, str], excluded: Mapping[str, tuple[str, ...]]) -> bool:
    return all(choice[axis] in variants for axis, variants in excluded.items())
