"""The studies of this repository: every point of each is a training config that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dml.cli import config_parser
from lightning_dml.study.grid import check_configs, points_of
from lightning_dml.study.study_file import StudyFile

FOLDER = Path(__file__).parents[2] / "configs/study"
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
