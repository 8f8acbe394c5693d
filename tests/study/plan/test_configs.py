"""The studies of this repository: every point of each is a training config that can be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lightning_dml.commands.training_configs import config_parser
from lightning_dml.study.plan.grid import check_configs, points_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.results.loss_curves import SIMILARITY, curves_of
from tests.helpers import ROOT

FOLDER = ROOT / "configs/study"
POINTS = {
    "smoke": 5,
    "positives": 11,
    "negatives": 13,
    "memory_ratio": 12,
    "batch_size": 10,
    "momentum": 18,
    "mining_weighting": 25,
}


def test_all_are_here() -> None:
    """A study that no test reads breaks with the next change of an option."""
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*POINTS, "glyphs", "hanzi"}  # what is laid over these


@pytest.mark.parametrize(("name", "points"), POINTS.items())
def test_it_can_be_read(name: str, points: int) -> None:
    """Hours of training must not end at a typing error in the last variant."""
    grid = points_of(StudyFile.read(FOLDER / f"{name}.yaml"))
    assert len(grid) == points
    check_configs(grid, config_parser())


def step(cut: float) -> Callable[[float], float]:
    """1 above the cut."""
    return lambda similarity: float(similarity > cut)


NEGATIVES: dict[str, Callable[[float], float]] = {
    **{f"step {cut}": step(cut) for cut in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "no truncation": lambda s: 1.0,
    "no truncation 0.01": lambda s: 0.01,
    "easy only": lambda s: float(s < 0.5),
    "easy only 0.01": lambda s: 0.01 * (s < 0.5),
    "linear": lambda s: max(0.0, (s - 0.5) / 0.5),
    "power": lambda s: max(0.0, (s - 0.5) / 0.5) ** 2,
    "exponential": lambda s: math.exp(10 * (s - 1)),
    "sigmoid": lambda s: 1 / (1 + math.exp(-20 * (s - 0.5))),
}


def test_the_curves_of_negatives_are_what_they_are_called() -> None:
    """A result under the name of another curve would be worse than none."""
    points = points_of(StudyFile.read(FOLDER / "negatives.yaml"))
    assert {point.choice["negative"] for point in points} == set(NEGATIVES)
    between = [float(value) for value in SIMILARITY if min(abs(float(value) - cut / 10) for cut in range(10)) > 1e-6]
    kept = [float(value) in between for value in SIMILARITY]
    for point, curve in ((point, curves_of([point])[point.key]) for point in points):
        formula = NEGATIVES[point.choice["negative"]]
        found = [weight for weight, keep in zip(curve.negative.tolist(), kept, strict=True) if keep]
        assert found == pytest.approx([formula(value) for value in between], abs=1e-12)
        assert set(curve.positive.tolist()) == {1.0}


def settings(name: str) -> list[tuple[dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The points of a study: variants, training config and the options of the memory, if there is one."""
    found = []
    for point in points_of(StudyFile.read(FOLDER / f"{name}.yaml")):
        items = point.config["trainer"]["callbacks"]
        callbacks = {item["class_path"]: item.get("init_args") for item in items}
        memory = callbacks.get("lightning_dml.callbacks.MemoryBankCallback") or {}
        found.append((dict(point.choice), dict(point.config), memory))
    return found


def images_in_a_batch(config: dict[str, Any]) -> int:
    """The draws of the sampler."""
    data = config["data"]["init_args"]
    return int(data["classes_per_batch"] * data["samples_per_class"])


def test_memories_and_batches_are_what_they_are_called() -> None:
    """So with sizes: a variant is a text, and its override another."""
    for choice, config, memory in settings("memory_ratio"):
        assert memory.get("size") == (None if choice["ratio"] == "none" else float(choice["ratio"]))
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == float(choice["rate"])
        assert images_in_a_batch(config) == 16
    for choice, config, memory in settings("batch_size"):
        assert images_in_a_batch(config) == int(choice["batch"])
        wanted = (None, None) if choice["memory"] == "none" else (1.0, 0.99)
        assert (memory.get("size"), memory.get("momentum")) == wanted
    steps = {
        config["trainer"]["max_epochs"] * config["data"]["init_args"]["batches_per_epoch"]
        for name in ("memory_ratio", "batch_size")
        for _, config, _ in settings(name)
    }
    assert steps == {975}


def test_keys_and_starts_are_what_they_are_called() -> None:
    """So with what updates the memory."""
    for choice, _, memory in settings("momentum"):
        assert memory["start_step"] == int(choice["start"])
        updated = (memory["momentum"], memory.get("policy", "queue"), memory.get("average"))
        keys = choice["keys"]
        if keys.startswith("momentum "):
            assert updated == (float(keys.removeprefix("momentum ")), "queue", None)
        else:
            assert updated == {"online": (None, "queue", None), "entries averaged": (None, "samples", 0.9)}[keys]


def test_minings_and_weightings_are_what_they_are_called() -> None:
    """So with the grid of both."""
    for choice, config, _ in settings("mining_weighting"):
        loss = config["model"]["init_args"]["loss"]["init_args"]
        weighting = choice["weighting"].replace(" ", "_")
        assert loss == {"mining": choice["mining"], "positive": weighting, "negative": weighting}


@pytest.mark.parametrize("name", [name for name in POINTS if name != "smoke"])
def test_other_data_fits_under_it(name: str) -> None:
    """One file is to put every study on other data, with all else as it was."""
    plain, other = (
        StudyFile.read(FOLDER / f"{name}.yaml"),
        StudyFile.read(FOLDER / f"{name}.yaml", FOLDER / "hanzi.yaml"),
    )
    assert other.name == f"{name}-hanzi" and other.output != plain.output and other.storage != plain.storage
    assert other.base["data"]["class_path"] == "benchmarks._shared_data.ArchiveDataModule"
    for part in ("classes_per_batch", "samples_per_class"):
        assert other.base["data"]["init_args"][part] == plain.base["data"]["init_args"][part]
    assert {**other.base, "data": None} == {**plain.base, "data": None}
    grid = points_of(other)
    assert len(grid) == POINTS[name]
    check_configs(grid[:1], config_parser())
