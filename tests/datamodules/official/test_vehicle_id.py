"""VehicleID as its lists say it: several test sets, whose vehicles may be the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dml.datamodules.official.vehicle_id import VehicleIDDataModule, read_vehicle_id
from lightning_dml.errors import InputError
from lightning_dml.retrieval import RetrievalMetrics
from tests.datamodules.replicas import edit, make_vehicle_id, rows_of, spread, tables_by_name


def test_every_list_is_a_set(tmp_path: Path) -> None:
    """A vehicle of two lists must have one label, or its name would be that of another vehicle."""
    tests = {800: (40, 31), 1_600: (31, 50, 40), 2_400: (60, 31, 50, 70)}
    folder = make_vehicle_id(tmp_path, (23, 7, 100), tests, test_images={800: [2, 4], 1_600: [1, 2, 3]})
    splits = read_vehicle_id(tmp_path, check_counts=False)
    assert splits.class_names == ["7", "23", "100", "31", "40", "50", "60", "70"]
    tables = {"train_list": splits.train}
    for name, table in tables_by_name(splits.test).items():
        tables[f"test_list_{ {'small': 800, 'medium': 1_600, 'large': 2_400}[name] }"] = table
    assert list(tables) == ["train_list", "test_list_800", "test_list_1600", "test_list_2400"]
    for name, table in tables.items():
        expected = []
        for line in (folder / f"train_test_split/{name}.txt").read_text().splitlines():
            image, vehicle = line.split(" ")
            expected.append((f"{folder.as_posix()}/image/{image}.jpg", vehicle))
        assert rows_of(table, splits.class_names) == expected
        assert all(table.path(row).is_file() for row in range(len(table)))
        assert table.is_query is None  # the draws of RetrievalMetrics give the roles


def test_sizes_that_are_not_there(tmp_path: Path) -> None:
    """The large lists are often left out of copies; what is there must still be evaluated, and the rest be named."""
    folder = make_vehicle_id(tmp_path, tests={800: (40, 31), 13_164: (40, 99)})
    with pytest.warns(UserWarning, match=r"no train_test_split/test_list_1600\.txt in .*take 1600 out of test_sizes"):
        splits = read_vehicle_id(tmp_path, check_counts=False)
    assert list(tables_by_name(splits.test)) == ["small"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = read_vehicle_id(tmp_path, check_counts=False, test_sizes=(13_164, 800))
    assert list(tables_by_name(splits.test)) == ["13164", "small"]
    (folder / "train_test_split/test_list_800.txt").unlink()
    with pytest.raises(InputError, match=r"there is no train_test_split/test_list_800\.txt in .*PKU VehicleID"):
        read_vehicle_id(tmp_path, check_counts=False, test_sizes=(800,))


@pytest.mark.parametrize("sizes", [(), (800, 800), (0,), (-800,)])
def test_sizes_that_cannot_be(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """A wrong option must show when the object is made, not after the download of a model."""
    with pytest.raises(
        InputError, match=r"test_sizes must (be one or more integers .*|have each size once), got [\[(]"
    ):
        VehicleIDDataModule(tmp_path, test_sizes=sizes)
    with pytest.raises(InputError, match="test_sizes must"):
        read_vehicle_id(make_vehicle_id(tmp_path), check_counts=False, test_sizes=sizes)


def test_it_is_evaluated_by_draws(tmp_path: Path) -> None:
    """The protocol that the class names must work with its batches: one image of each vehicle is the gallery."""
    make_vehicle_id(tmp_path)
    small: dict[str, Any] = {"image_size": 16, "resize": 16, "num_workers": 0, "check_images": "none"}
    module = VehicleIDDataModule(tmp_path, check_counts=False, test_sizes=[1_600], **small)
    module.setup("test")
    (loader,) = module.test_dataloader().values()
    metrics = RetrievalMetrics(ks=(1,), gallery_draws=10)
    for batch in loader:
        metrics.update(torch.eye(8)[batch["label"]], batch["label"], batch["index"])
    assert metrics.compute()["recall@1"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train_list", "0002301 23", "0002301", r"train_list\.txt, line 2 must be 'image vehicle', got '0002301'"),
        ("test_list_800", " 31\n", " thirty\n", r"test_list_800\.txt, line 4 must be 'image vehicle', got .* thirty'"),
    ],
)
def test_what_does_not_fit(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    """A list that was cut off in the middle of a line must not lose its last vehicle unseen."""
    edit(make_vehicle_id(tmp_path) / f"train_test_split/{file}.txt", old, new)
    with pytest.raises(InputError, match=message):
        read_vehicle_id(tmp_path, check_counts=False)


def test_the_official_counts(tmp_path: Path) -> None:
    """The lists' vehicles and images must pass the check, whatever the training list has; one less must not."""
    draw = np.random.default_rng(0)
    vehicles = draw.permutation(26_267)[:3_000].tolist()
    tests = {size: vehicles[:size] for size in (800, 1_600, 2_400)}
    images = {800: spread(6_493, 800), 1_600: spread(13_377, 1_600), 2_400: spread(19_777, 2_400)}
    folder = make_vehicle_id(tmp_path, vehicles[2_400:], tests, 1, images, pictures=False)
    splits = read_vehicle_id(tmp_path)
    assert {name: len(table) for name, table in tables_by_name(splits.test).items()} == {
        "small": 6_493,
        "medium": 13_377,
        "large": 19_777,
    }
    file = folder / "train_test_split/test_list_1600.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match=r"test set 'medium' must have 13,377 images of 1,600 classes, and 13,376 "):
        read_vehicle_id(tmp_path)
    make_vehicle_id(tmp_path / "other", (1,), {13_164: range(2, 13_165)}, 1, pictures=False)
    with pytest.raises(InputError, match=r"test set '13164' must have 13,164 classes, and 13,163 images of 13,163"):
        read_vehicle_id(tmp_path / "other", test_sizes=(13_164,))
