"""In-Shop Clothes Retrieval as its one list says it: items, roles, and the folders that releases differ in."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dml.datamodules.official import in_shop
from lightning_dml.datamodules.official.in_shop import read_in_shop
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.replicas import edit, make_in_shop, rows_of, spread


def test_queries_search_the_gallery(tmp_path: Path) -> None:
    """A query that also lay in the gallery would find itself, and gallery rows as queries are another protocol."""
    folder = make_in_shop(tmp_path, (2, 5, 9), (7, 1, 30), images=[2, 1, 3], queries=[1, 2, 1], gallery=[3, 1, 2])
    splits = read_in_shop(tmp_path, check_counts=False)
    names = ["id_00000002", "id_00000005", "id_00000009", "id_00000001", "id_00000007", "id_00000030"]
    assert splits.class_names == names and isinstance(splits.test, ImageTable)
    expected: dict[str, list[tuple[str, str]]] = {"train": [], "query": [], "gallery": []}
    for line in (folder / "list_eval_partition.txt").read_text().splitlines()[2:]:
        path, item, status = line.split()
        expected[status].append((f"{folder.as_posix()}/{path}", item))
    test = splits.test
    assert test.is_query is not None and test.is_gallery is not None
    assert rows_of(splits.train, names) == expected["train"] and len(splits.train) == 6
    assert rows_of(test.take(test.is_query), names) == expected["query"] and len(expected["query"]) == 4
    assert rows_of(test.take(test.is_gallery), names) == expected["gallery"] and len(expected["gallery"]) == 6
    assert not (test.is_query & test.is_gallery).any() and (test.is_query | test.is_gallery).all()
    assert splits.train.is_query is None and splits.train.is_gallery is None


@pytest.mark.parametrize(
    "partition", ["list_eval_partition.txt", "Eval/list_eval_partition.txt", "Anno/list_eval_partition.txt"]
)
@pytest.mark.parametrize("pictures_in", [".", "Img"])
def test_the_folders_of_releases(partition: str, pictures_in: str, tmp_path: Path) -> None:
    """Releases put list and images into folders or not; nobody should have to move 50,000 files."""
    folder = make_in_shop(tmp_path, partition=partition, pictures_in=pictures_in)
    splits = read_in_shop(folder, check_counts=False)
    assert isinstance(splits.test, ImageTable)
    for table in (splits.train, splits.test):
        assert len(table) == 6 and all(table.path(row).is_file() for row in range(6))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("12\n", "", r"list_eval_partition\.txt, line 2 must be the header 'image_name item_id evaluation_status'"),
        ("12\nimage_name", "twelve\nimage_name", r"line 1 must be the number of images, got 'twelve'"),
        ("item_id evaluation_status", "item_id", r"line 2 must be the header .*, got 'image_name item_id'"),
        (" query ", " val ", r"line 9 must be .* with a status out of train, query, gallery, got .* val'"),
        ("id_00000001 query ", "query ", r"line 9 must be 'image_name item_id evaluation_status'"),
    ],
)
def test_what_does_not_fit(old: str, new: str, message: str, tmp_path: Path) -> None:
    """The sister sets of DeepFashion have a file of the same name with other columns and statuses."""
    edit(make_in_shop(tmp_path) / "list_eval_partition.txt", old, new)
    with pytest.raises(InputError, match=message):
        read_in_shop(tmp_path, check_counts=False)


def test_the_official_counts(tmp_path: Path) -> None:
    """The whole set must pass the check, or nobody could use it."""
    train, test = range(1, 3_998), range(3_998, 7_983)
    images = spread(25_882, 3_997), spread(14_218, 3_985), spread(12_612, 3_985)
    make_in_shop(tmp_path, train, test, *images, pictures=False)
    splits = read_in_shop(tmp_path)
    assert isinstance(splits.test, ImageTable)
    assert (len(splits.train), len(splits.test), len(splits.class_names)) == (25_882, 26_830, 7_982)


@pytest.mark.parametrize(
    ("part", "count", "message"),
    [
        ("TRAIN", (7, 2), r"the training set must have 7 images of 2 classes, and 6 images of 2 classes are listed"),
        ("TRAIN", (6, 3), r"the training set must have 6 images of 3 classes"),
        ("QUERY", (1, 1), r"the queries of the test set must have 1 images of 1 classes, and 2 images of 2 classes"),
        ("GALLERY", (4, 3), r"the gallery of the test set must have 4 images of 3 classes, and 4 images of 2 classes"),
    ],
)
def test_other_counts(
    part: str, count: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is counted by itself, as a gallery image that became a query changes no sum."""
    for name, right in (("TRAIN", (6, 2)), ("QUERY", (2, 2)), ("GALLERY", (4, 2))):
        monkeypatch.setattr(in_shop, name, right)
    make_in_shop(tmp_path)
    read_in_shop(tmp_path)
    monkeypatch.setattr(in_shop, part, count)
    with pytest.raises(InputError, match=message):
        read_in_shop(tmp_path)
    read_in_shop(tmp_path, check_counts=False)


def test_the_number_in_the_first_line(tmp_path: Path) -> None:
    """A list that was cut off at the end of a line looks whole; its first line tells."""
    folder = make_in_shop(tmp_path)
    edit(folder / "list_eval_partition.txt", "12\n", "13\n")
    with pytest.raises(InputError, match=r"has 12 images, and its first line says 13: .* check_counts=false"):
        read_in_shop(tmp_path)
    read_in_shop(tmp_path, check_counts=False)
