"""The readers of all official data sets are alike in roots, missing files, lines, numbers, counts and training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from lightning_dml.datamodules.image_files import ImagesDataModule
from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.official.cars import Cars196DataModule, read_cars
from lightning_dml.datamodules.official.cub import CUB200DataModule, read_cub
from lightning_dml.datamodules.official.in_shop import InShopDataModule, read_in_shop
from lightning_dml.datamodules.official.inaturalist import INaturalistDataModule, read_inaturalist
from lightning_dml.datamodules.official.sop import SOPDataModule, read_sop
from lightning_dml.datamodules.official.vehicle_id import VehicleIDDataModule, read_vehicle_id
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError
from tests.datamodules import replicas


class Set(NamedTuple):
    """A data set: how it is made, read and trained on, and what a message says of it."""

    make: Callable[..., Path]
    read: Callable[..., Splits]
    module: type[ImagesDataModule]
    first_file: str
    origin: str


SETS = {
    "cub": Set(replicas.make_cub, read_cub, CUB200DataModule, "images.txt", "download=true"),
    "cars": Set(
        replicas.make_cars,
        read_cars,
        Cars196DataModule,
        "cars_annos.mat",
        "request it from the Stanford Cars project page",
    ),
    "cars devkit": Set(
        replicas.make_cars_devkit,
        read_cars,
        Cars196DataModule,
        "devkit/cars_train_annos.mat",
        "Stanford Cars project page",
    ),
    "sop": Set(replicas.make_sop, read_sop, SOPDataModule, "Ebay_train.txt", "download=true"),
    "in-shop": Set(
        replicas.make_in_shop,
        read_in_shop,
        InShopDataModule,
        "list_eval_partition.txt",
        "request it from the DeepFashion project page",
    ),
    "vehicle": Set(
        replicas.make_vehicle_id,
        read_vehicle_id,
        VehicleIDDataModule,
        "train_test_split/train_list.txt",
        "request it from the PKU VehicleID project page",
    ),
    "inaturalist": Set(
        replicas.make_inaturalist,
        read_inaturalist,
        INaturalistDataModule,
        "Inat_dataset_splits/Inaturalist_train_set1.txt",
        "Smooth-AP project page",
    ),
}
every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_the_root_may_be_the_folder_or_hold_it(name: str, tmp_path: Path) -> None:
    """People keep one folder for all sets or name the set's own; guessing wrong would look like a missing set."""
    case = SETS[name]
    folder = case.make(tmp_path)
    above, itself = case.read(tmp_path, check_counts=False), case.read(folder, check_counts=False)
    assert above.class_names == itself.class_names
    for one, other in zip(_tables(above), _tables(itself), strict=True):
        assert one.digest() == other.digest() and len(one) and one.root == other.root
        assert all(one.path(row).is_file() for row in range(len(one)))


@every_set
def test_labels(name: str, tmp_path: Path) -> None:
    """Losses with proxies need training labels from 0 without gaps; names and evaluation labels must not overlap."""
    case = SETS[name]
    case.make(tmp_path)
    splits = case.read(tmp_path, check_counts=False)
    trained = np.unique(splits.train.labels)
    evaluated = np.unique(np.concatenate([table.labels for table in replicas.tables_by_name(splits.test).values()]))
    assert trained.tolist() == list(range(len(trained)))
    assert evaluated.tolist() == list(range(len(trained), len(splits.class_names)))
    assert len(set(splits.class_names)) == len(splits.class_names)
    for table in _tables(splits):
        assert table.labels.dtype == np.int64


@every_set
def test_no_image_is_opened(name: str, tmp_path: Path) -> None:
    """Every rank reads the tables; a look at each of 460,000 files would take minutes on a network disk."""
    case = SETS[name]
    case.make(tmp_path / "with")
    case.make(tmp_path / "without", pictures=False)
    with_images, without = (
        case.read(tmp_path / "with", check_counts=False),
        case.read(tmp_path / "without", check_counts=False),
    )
    for one, other in zip(_tables(with_images), _tables(without), strict=True):
        assert one.digest() == other.digest()


@every_set
def test_the_module_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    """The tables must fit the base: batches of the right classes, and pictures that are those of the rows."""
    case = SETS[name]
    case.make(tmp_path)
    module = _module(case, tmp_path)
    module.setup("fit")
    splits = case.read(tmp_path, check_counts=False)
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert len(np.unique(batch["label"])) == 2 and set(batch["label"].tolist()) <= set(splits.train.labels.tolist())
    assert module.class_names == splits.class_names
    loaders = module.val_dataloader()
    tables = replicas.tables_by_name(splits.test)
    for key, loader in (loaders if isinstance(loaders, dict) else {"val": loaders}).items():
        labels = np.concatenate([batch["label"] for batch in loader])
        assert labels.tolist() == tables[key].labels.tolist()


@every_set
def test_counts_are_checked_unless_told_otherwise(name: str, tmp_path: Path) -> None:
    """A half-unpacked set trains without complaint and gives results that nobody can compare."""
    case = SETS[name]
    case.make(tmp_path)
    with pytest.raises(InputError, match=r"must have [\d,]+ (images of [\d,]+ )?classes, .*check_counts=false"):
        case.read(tmp_path)
    with pytest.raises(InputError, match="check_counts=false"):
        _module(case, tmp_path, check_counts=True).setup("fit")


@every_set
def test_a_missing_root(name: str, tmp_path: Path) -> None:
    """The likeliest mistake is a root that is not there; the message must say what belongs there and where from."""
    case = SETS[name]
    with pytest.raises(InputError, match=rf"root .*nowhere is not a folder: .*{re.escape(case.origin)}"):
        case.read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=rf"there is no .*{re.escape(case.first_file)}.* in root .*{case.origin}"):
        case.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cub", "image_class_labels.txt"),
        ("cars devkit", "cars_test_annos_withlabels.mat"),
        ("sop", "Ebay_train.txt"),
        ("sop", "Ebay_test.txt"),
        ("inaturalist", "Inat_dataset_splits/Inaturalist_train_set1.txt"),
        ("inaturalist", "Inat_dataset_splits/Inaturalist_test_set1.txt"),
    ],
)
def test_a_missing_file(name: str, file: str, tmp_path: Path) -> None:
    """For a set that was copied in part the message must name the file, the layout and where the set comes from."""
    case = SETS[name]
    folder = case.make(tmp_path)
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"there is no .*{file}.* in .*{folder.name}: .* with .*; .*{case.origin}"):
        case.read(tmp_path, check_counts=False)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("cub", "images.txt", "001.Bird_1/Bird_0001_1.jpg", "../Bird_0001_1.jpg"),
        ("sop", "Ebay_test.txt", "coffee_maker_final/110000011319_0.JPG", "../../a.JPG"),
        ("sop", "Ebay_test.txt", "coffee_maker_final/110000011319_0.JPG", "/a.JPG"),
        ("in-shop", "list_eval_partition.txt", "img/WOMEN/Dresses/id_00000002/00", "img/../../00"),
        ("vehicle", "train_test_split/train_list.txt", "0002300", "../0002300"),
        (
            "inaturalist",
            "Inat_dataset_splits/Inaturalist_train_set1.txt",
            f"train_val2018/Fungi/5/{0:032x}",
            "../Fungi/5/x",
        ),
    ],
)
def test_paths_must_stay_in_the_folder(name: str, file: str, old: str, new: str, tmp_path: Path) -> None:
    """A list from somewhere must not make a training read, and a cache copy, files outside of the data set."""
    case = SETS[name]
    folder = case.make(tmp_path)
    line = _line_of(folder / file, old)
    replicas.edit(folder / file, old, new)
    with pytest.raises(InputError, match=rf"{file}, line {line}: the .*path .* root "):
        case.read(tmp_path, check_counts=False)


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("sop", "Ebay_train.txt", 1),
        ("in-shop", "list_eval_partition.txt", 4),
        ("vehicle", "train_test_split/test_list_800.txt", 2),
        ("inaturalist", "Inat_dataset_splits/Inaturalist_test_set1.txt", 0),
    ],
)
def test_an_image_must_not_be_listed_twice(name: str, file: str, place: int, tmp_path: Path) -> None:
    """Two rows of one image are a perfect match for each other, and recall goes up."""
    case = SETS[name]
    folder = case.make(tmp_path)
    lines = (folder / file).read_text().splitlines()
    (folder / file).write_text("\n".join([*lines, lines[place]]) + "\n")
    with pytest.raises(InputError, match=rf"{file}, line {len(lines) + 1}: .* line {place + 1} already"):
        case.read(tmp_path, check_counts=False)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "wrong"),
    [
        ("sop", "Ebay_test.txt", " 11319 ", " 2 ", "'2'"),
        ("in-shop", "list_eval_partition.txt", "id_00000001 query", "id_00000005 query", "'id_00000005'"),
        ("vehicle", "train_test_split/test_list_1600.txt", " 50", " 23", "'23'"),
        (
            "inaturalist",
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
            f"Aves/3/{0:032x}",
            f"Aves/40/{9:032x}",
            "'Aves/40'",
        ),
    ],
)
def test_a_class_in_both_splits(name: str, file: str, old: str, new: str, wrong: str, tmp_path: Path) -> None:
    """Evaluation on a class that trained measures memory, so a list that mixes them must not pass."""
    case = SETS[name]
    folder = case.make(tmp_path)
    replicas.edit(folder / file, old, new)
    with pytest.raises(InputError, match=rf"class {wrong} \(1 such class\(es\)\) is in training and in evaluation"):
        case.read(tmp_path, check_counts=False)


@pytest.mark.parametrize("name", ["cub", "sop"])
def test_download_only_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes must not be fetched unasked, nor twice; what is fetched must be where the reader looks."""
    case = SETS[name]
    calls: list[tuple[str, Path, str]] = []

    def obtain(archive: Any, folder: Path, contents: str) -> Path:
        calls.append((archive.name, folder, contents))
        return case.make(folder)

    monkeypatch.setattr(f"{case.module.__module__}.obtain", obtain)
    root = tmp_path / "data"
    with pytest.raises(InputError, match="download=true"):
        _module(case, root).prepare_data()
    assert not calls
    module = _module(case, root, download=True)
    module.prepare_data()
    module.setup("fit")
    folder = next(root.iterdir())
    assert calls == [(calls[0][0], root, folder.name)] and isinstance(module.train_set, LabelledImages)
    _module(case, root, download=True).prepare_data()
    _module(case, folder, download=True).prepare_data()
    assert len(calls) == 1
    shutil.rmtree(root)
    _module(case, root, download=True).prepare_data()
    assert len(calls) == 2


def _module(case: Set, root: Path, **options: Any) -> ImagesDataModule:
    """A module of sizes that keep the test fast."""
    small: dict[str, Any] = {"image_size": 16, "resize": 16, "classes_per_batch": 2, "samples_per_class": 2}
    plain = {"check_counts": False, "check_images": "none", "num_workers": 0}
    return case.module(root, **small | plain | options)


def _tables(splits: Splits) -> list[Any]:
    return [splits.train, *replicas.tables_by_name(splits.test).values()]


def _line_of(file: Path, text: str) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), start=1) if text in line)
