"""The study file: what `lightning-dml study --config` reads, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_dml.checks import check_choice, check_count, check_number, is_integer, is_number
from lightning_dml.errors import InputError
from lightning_dml.study.plan.overrides import overlay
from lightning_dml.study.plan.reading import read_yaml

KEYS = (
    "name", "base", "axes", "seeds", "seed_options", "exclude", "baseline", "metric", "metrics", "mode", "value",
    "course", "storage", "output", "lease", "keep_checkpoints", "labels",
)  # fmt: skip
MERGED = ("axes", "baseline", "labels")  # of several files; of all other keys the last one's counts
SEEDS = range(2**32)  # what seed_everything takes
LONG_FORM = {"option", "values", "variants", "label"}


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Args:
        name: as in the study file.
        variants: overrides of the training config by the variant's name, in the order of the file.
        numbers: the values where they are numbers, for the figure; empty otherwise.
        label: of the figure's axis, with the unit.
    """

    name: str
    variants: Mapping[str, Any]
    numbers: tuple[float, ...]
    label: str


@dataclass(frozen=True)
class Course:
    """The metrics of a training that are noted at every so many steps.

    Args:
        metrics: names of logged values; none notes nothing.
        every: optimizer steps.
    """

    metrics: tuple[str, ...] = ()
    every: int = 100


@dataclass(frozen=True)
class StudyFile:
    """A study as its file describes it; the keys of the file are described in `lightning_dml.commands.study`."""

    name: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    seed_options: tuple[str, ...]
    exclude: tuple[dict[str, tuple[str, ...]], ...]
    baseline: dict[str, str]
    metric: str
    metrics: tuple[str, ...]
    mode: Literal["max", "min"]
    value: Literal["last", "best"]
    course: Course
    storage: str
    output: Path
    lease: float
    keep_checkpoints: bool
    labels: Mapping[str, str]

    @classmethod
    def read(cls, *paths: str | Path) -> StudyFile:
        """Reads and checks a study file, or several that are laid over each other.

        Raises:
            InputError: naming the key, what it holds, and what it may hold.
        """
        content: dict[str, Any] = {}
        for path in map(Path, paths):
            upper = _read(path)
            if not content and "base" not in upper and any(map(_is_base, upper)):
                raise InputError(f"{path} changes the base of another study file: give that one first, by --config")
            content = _laid_over(content, upper)
        missing = [key for key in ("base", "axes", "metric") if not content.get(key)]
        if missing:
            raise InputError(f"{', '.join(map(str, paths))} needs {missing[0]}")
        name = content["name"]
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"name must consist of letters, digits and . _ + -, got {name!r}")
        axes = _axes(content["axes"])
        output = Path(_text(content, "output", "a path") if content.get("output") else Path("runs/study") / name)
        blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
        if blocked is not None:
            raise InputError(f"output must be a folder, and {blocked} is a file, got {str(output)!r}")
        metric = _text(content, "metric")
        labels = content.get("labels") or {}
        if not isinstance(labels, dict):
            raise InputError(f"labels must map names of metrics to what the figure says, got {labels!r}")
        return cls(
            name=name,
            base=_base(content["base"]),
            axes=axes,
            seeds=_seeds(content.get("seeds", [0])),
            seed_options=_options(content.get("seed_options")),
            exclude=tuple(_choices(choice, axes, "exclude") for choice in _list(content.get("exclude"), "exclude")),
            baseline=_baseline(content.get("baseline"), axes),
            metric=metric,
            metrics=tuple(dict.fromkeys([metric, *_names(content.get("metrics"), "metrics")])),
            mode=_one_of(content, "mode", ("max", "min")),
            value=_one_of(content, "value", ("last", "best")),
            course=_course(content.get("course")),
            storage=str(content.get("storage") or f"sqlite:///{output}/study.db"),
            output=output,
            lease=_positive(content.get("lease", 120.0), "lease"),
            keep_checkpoints=_boolean(content.get("keep_checkpoints", True), "keep_checkpoints"),
            labels={str(key): str(value) for key, value in labels.items()},
        )


def _read(path: Path) -> dict[str, Any]:
    """A study file, its name filled in and the paths in its base put right."""
    content = read_yaml(path)
    unknown = [key for key in content if key not in KEYS and not _is_base(key)]
    if unknown:
        raise InputError(f"{path} has the key {unknown[0]!r}, which no study has; there are {', '.join(KEYS)}")
    read: dict[str, Any] = {}
    for key, value in content.items():
        read[key] = _from_folder(value, path.parent) if _is_base(key) else value
    return {**read, "name": str(content.get("name") or path.stem)}


def _laid_over(content: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """The study of `content` with what `upper` says."""
    merged = dict(content)
    base = content.get("base") or []
    layers = {"base": base if isinstance(base, list) else [base]}
    for key, value in upper.items():
        if key == "base":
            layers = {"base": value}
        elif _is_base(key):
            layers = overlay(layers, {key: value})
        elif key == "name" and content:
            merged["name"] = f"{content['name']}-{value}"
        elif key in MERGED and isinstance(value, Mapping) and isinstance(content.get(key), Mapping):
            merged[key] = {**content[key], **value}
        else:
            merged[key] = value
    return {**merged, **layers}


def _is_base(key: Any) -> bool:
    return bool(re.fullmatch(r"base(\+|\.\d+)?", str(key)))


def _from_folder(layers: Any, folder: Path) -> Any:
    if isinstance(layers, list):
        return [_from_folder(layer, folder) for layer in layers]
    return str(folder / layers) if isinstance(layers, str) else layers


def _base(layers: Any) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for layer in layers if isinstance(layers, list) else [layers]:
        if not isinstance(layer, str | Mapping):
            raise InputError(f"base must be paths of training configs, or overrides among them, got {layer!r}")
        config = overlay(config, read_yaml(Path(layer)) if isinstance(layer, str) else layer)
    return config


def _axes(axes: Any) -> tuple[Axis, ...]:
    if not isinstance(axes, Mapping):
        raise InputError(f"axes must map names to values or to variants, got {axes!r}")
    return tuple(_axis(str(name), content) for name, content in axes.items())


def _axis(name: str, content: Any) -> Axis:
    where = f"axes.{name}"
    if isinstance(content, list):
        content = {"option": name, "values": content}
    if not isinstance(content, Mapping):
        raise InputError(f"{where} must be a list of values or a mapping of variants, got {content!r}")
    if not {"values", "variants"} & set(content):
        content = {"variants": content}
    unknown = set(content) - LONG_FORM
    if unknown or {"values", "variants"} <= set(content) or ("values" in content) != ("option" in content):
        raise InputError(f"{where} must have option and values, or variants, and may have a label; got {list(content)}")
    label = str(content.get("label", name))
    if "variants" in content:
        variants = content["variants"]
        if not isinstance(variants, Mapping) or not variants:
            raise InputError(f"{where} is empty: give it at least one variant")
        wrong = [variant for variant, over in variants.items() if not isinstance(over, Mapping)]
        if wrong:
            raise InputError(
                f"{where}.{wrong[0]} must be overrides of the training config, such as "
                f"{{trainer.max_epochs: 3}}, got {variants[wrong[0]]!r}"
            )
        return Axis(name, {_shown(key): dict(value) for key, value in variants.items()}, (), label)
    values = content["values"]
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} is empty: give it at least one value")
    named = {_shown(value): {str(content["option"]): value} for value in values}
    if len(named) != len(values):
        raise InputError(f"{where} has a value twice: {', '.join(_shown(value) for value in values)}")
    numbers = all(map(is_number, values))
    return Axis(name, named, tuple(map(float, values)) if numbers else (), label)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping) and "class_path" in value:
        options = ", ".join(f"{key}={_shown(option)}" for key, option in (value.get("init_args") or {}).items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({options})" if options else "")
    return str(value)


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(is_integer(seed, 0, SEEDS[-1]) for seed in seeds):
        raise InputError(f"seeds must be a list of whole numbers from 0 to {SEEDS[-1]}, got {seeds!r}")
    if len(set(seeds)) != len(seeds):
        raise InputError(f"seeds must differ from each other, got {seeds!r}")
    return tuple(seeds)


def _names(names: Any, where: str) -> tuple[str, ...]:
    named = [] if names is None else names
    if not isinstance(named, list) or any(not isinstance(entry, str) for entry in named):
        raise InputError(f"{where} must be a list of names of logged values, got {named!r}")
    return tuple(dict.fromkeys(named))


def _course(content: Any) -> Course:
    if content is None:
        return Course()
    if not isinstance(content, Mapping) or not content.get("metrics") or set(content) - {"metrics", "every"}:
        raise InputError(f"course must have metrics, a list of names, and may have every, in steps, got {content!r}")
    every = content.get("every", Course.every)
    check_count("course.every", every, hint="it counts optimizer steps")
    return Course(_names(content["metrics"], "course.metrics"), every)


def _options(options: Any) -> tuple[str, ...]:
    named = _list(options, "seed_options")
    if any(not isinstance(option, str) or not option for option in named):
        raise InputError(f"seed_options must be a list of dotted options, such as [data.init_args.seed], got {named!r}")
    return tuple(named)


def _baseline(baseline: Any, axes: tuple[Axis, ...]) -> dict[str, str]:
    choice = _choices(baseline or {}, axes, "baseline")
    several = [name for name, variants in choice.items() if len(variants) > 1]
    if several:
        raise InputError(f"baseline.{several[0]} must be one variant, got {', '.join(choice[several[0]])}")
    return {name: variants[0] for name, variants in choice.items()}


def _choices(content: Any, axes: tuple[Axis, ...], where: str) -> dict[str, tuple[str, ...]]:
    """Variants by axis, from a mapping of axes to one or several of their variants."""
    if not isinstance(content, Mapping):
        raise InputError(f"{where} must map axes to their variants, got {content!r}")
    known = {axis.name: axis for axis in axes}
    choice = {}
    for name, variants in content.items():
        if str(name) not in known:
            raise InputError(f"{where} has the axis {name!r}, which is none of {', '.join(known)}")
        names = tuple(_shown(variant) for variant in (variants if isinstance(variants, list) else [variants]))
        unknown = [variant for variant in names if variant not in known[str(name)].variants]
        if unknown or not names:
            raise InputError(
                f"{where}.{name} must be among {', '.join(known[str(name)].variants)}, got {', '.join(unknown) or '[]'}"
            )
        choice[str(name)] = names
    return choice


def _list(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list | None):
        raise InputError(f"{where} must be a list, got {content!r}")
    if {} in (content or []):
        raise InputError(f"{where} has an empty item, which would leave nothing to run")
    return content or []


def _one_of(content: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> Any:
    value = content.get(key, allowed[0])
    check_choice(key, value, allowed)
    return value


def _text(content: Mapping[str, Any], key: str, what: str = "the name of a logged value") -> str:
    if not isinstance(content[key], str):
        raise InputError(f"{key} must be {what}, got {content[key]!r}")
    return str(content[key])


def _boolean(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{key} must be true or false, got {value!r}")
    return value


def _positive(value: Any, key: str) -> float:
    check_number(key, value, "a number of seconds", above=0)
    return float(value)
