"""iNaturalist 2018 in the lists of the Smooth-AP authors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_dml.datamodules.official import inaturalist
from lightning_dml.datamodules.official.inaturalist import read_inaturalist
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.replicas import edit, make_inaturalist, rows_of, spread


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("lists", ["Inat_dataset_splits", "."])
def test_both_lists(lists: str, newline: str, tmp_path: Path) -> None:
    """The class numbers order the labels as numbers, not as texts, and groups are the same in both splits."""
    train, test = ("Fungi/5", "Aves/2761", "Aves/40"), ("Plantae/6000", "Aves/3", "Fungi/12")
    folder = make_inaturalist(tmp_path, train, test, [3, 2, 1], [1, 2, 4], lists, newline=newline)
    splits = read_inaturalist(tmp_path, check_counts=False)
    names = ["Fungi/5", "Aves/40", "Aves/2761", "Aves/3", "Fungi/12", "Plantae/6000"]
    assert splits.class_names == names and isinstance(splits.test, ImageTable)
    for table, name in ((splits.train, "train"), (splits.test, "test")):
        lines = (folder / lists / f"Inaturalist_{name}_set1.txt").read_text().splitlines()
        expected = [(f"{folder.as_posix()}/{line}", "/".join(line.split("/")[1:3])) for line in lines]
        assert rows_of(table, names) == expected
        groups = [line.split("/")[1] for line in lines]
        assert table.super_labels is not None and table.super_labels.dtype == np.int64
        assert table.super_labels.tolist() == [["Aves", "Fungi", "Plantae"].index(group) for group in groups]
        assert list(table.extra["category"]) == groups
        assert all(table.path(row).is_file() for row in range(len(table)))


@pytest.mark.parametrize(
    ("old", "new", "got"),
    [
        ("train_val2018/Aves/2761", "Aves/2761", "Aves/2761"),
        ("train_val2018/Aves/2761", "data/train_val2018/Aves/2761", "data/"),
        ("Aves/2761", "Aves/eagle", "train_val2018/Aves/eagle"),
        ("train_val2018/Aves/2761/", "\ntrain_val2018/Aves/2761/", "'"),
    ],
)
def test_what_does_not_fit(old: str, new: str, got: str, tmp_path: Path) -> None:
    """The class stands in the path alone, so a path of another form would be a wrong class and no error."""
    folder = make_inaturalist(tmp_path)
    edit(folder / "Inat_dataset_splits/Inaturalist_train_set1.txt", old, new)
    form = r"Inaturalist_train_set1\.txt, line 3 must be 'train_val2018/<group>/<class number>/<image>', got '"
    with pytest.raises(InputError, match=form + got):
        read_inaturalist(tmp_path, check_counts=False)


def test_the_official_counts(tmp_path: Path) -> None:
    """The whole split must pass the check, or nobody could use it; it has the most lines of all sets."""
    species = [f"{('Aves', 'Fungi', 'Insecta')[number % 3]}/{number}" for number in range(8_142)]
    images = spread(325_846, 5_690), spread(136_093, 2_452)
    make_inaturalist(tmp_path, species[:5_690], species[5_690:], *images, pictures=False)
    splits = read_inaturalist(tmp_path)
    assert (len(splits.train), len(splits.class_names)) == (325_846, 8_142)
    assert isinstance(splits.test, ImageTable)
    for table in (splits.train, splits.test):
        for row in (0, 1_000, len(table) - 1):
            assert splits.class_names[table.labels[row]] in table.paths[row]


@pytest.mark.parametrize(
    ("part", "count", "message"),
    [
        ("TRAIN", (6, 4), r"the training set must have 6 images of 4 classes, and 6 images of 3 classes are listed"),
        ("TEST", (5, 2), r"the test set must have 5 images of 2 classes, and 4 images of 2 classes are listed"),
    ],
)
def test_other_counts(
    part: str, count: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image or species more or less is another benchmark, in either split."""
    monkeypatch.setattr(inaturalist, "TRAIN", (6, 3))
    monkeypatch.setattr(inaturalist, "TEST", (4, 2))
    make_inaturalist(tmp_path)
    read_inaturalist(tmp_path)
    monkeypatch.setattr(inaturalist, part, count)
    with pytest.raises(InputError, match=message):
        read_inaturalist(tmp_path)
