"""Mistakes in tables of images: each is found where it stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lightning_dml.datamodules.tables.checks import (
    Source,
    check_class_disjoint,
    check_no_duplicates,
    check_paths,
)
from lightning_dml.datamodules.tables.reading import read_table
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError
from tests.datamodules.tables.cases import SMALL, Columns, Writer, small_with, write_csv, write_parquet


def test_paths_and_the_root(tmp_path: Path) -> None:
    """A table from elsewhere must not make the training read any file of the machine."""
    inside, outside = str(tmp_path / "images" / "a.jpg"), str(tmp_path.parent / "other.jpg")
    columns = small_with(path=[inside, "sub/../b.jpg", "./c.jpg", "d..e.jpg"])
    root = tmp_path / "images"
    assert list(read_table(write_csv(tmp_path, columns), root).table.paths) == columns["path"]
    for wrong, why in {"../images2/a.jpg": "leads out of root", "x/../../b.jpg": "leads out of root"}.items():
        for given_root in (root, None):
            with pytest.raises(InputError, match=rf"table.csv, line 3: the path .*{why}"):
                read_table(write_csv(tmp_path, small_with(1, path=wrong)), given_root)
    path = write_csv(tmp_path, small_with(1, path=outside))
    with pytest.raises(InputError, match=r"line 3: the absolute path .*other.jpg' is not in root .*images; give"):
        read_table(path, root)
    assert read_table(path).table.path(1) == Path(outside)
    with pytest.raises(InputError, match="is not in root"):
        read_table(write_csv(tmp_path, small_with(1, path=f"{root}2/a.jpg")), root)  # a neighbour by the same beginning


@pytest.mark.parametrize("boxed", [False, True])
def test_rows_that_come_twice(boxed: bool, tmp_path: Path) -> None:
    """A copy is a perfect match of itself and lifts every score; two boxes on one image are two images."""
    box = {"x_1": [0, 0, 0, 0], "y_1": [0, 0, 0, 0], "x_2": [5, 5, 5, 6], "y_2": [5, 5, 5, 5]}
    columns = small_with(path=["a.jpg", "b.jpg", "./c.jpg", "c.jpg"]) | (box if boxed else {})
    path = write_csv(tmp_path, columns)
    if boxed:
        assert len(read_table(path).table) == 4
        columns["x_2"][3] = 5
        path = write_csv(tmp_path, columns)
    with pytest.raises(InputError, match=r"line 5: the path (and box )?of 'c.jpg' is that of line 4 already; remove"):
        read_table(path)


def test_colliding_hashes_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check looks at hashes first; of equal ones only equal texts count."""
    monkeypatch.setattr("lightning_dml.datamodules.tables.checks.hash", lambda text: len(text), raising=False)
    table = ImageTable(Path(), Texts(["aa", "bb", "c", "dd"]), np.zeros(4, np.int64))
    check_no_duplicates(table, "list.txt")
    table = ImageTable(Path(), Texts(["aa", "bb", "c", "aa"]), np.zeros(4, np.int64))
    with pytest.raises(InputError, match=r"list.txt, row 4: .*'aa' is that of row 1 already"):
        check_no_duplicates(table, "list.txt")


def test_checks_of_other_readers() -> None:
    """The official files are read elsewhere and checked here; they have lines of their own to name."""
    table = ImageTable(Path("root"), Texts(["a", " ", "c"]), np.array([0, 1, -1]))
    with pytest.raises(InputError, match=r"images.txt, line 7: the path is empty"):
        check_paths(table, Source("images.txt", np.array([3, 7, 8]), "line"))
    other = table.take([2])
    check_class_disjoint(table, other, None, "images.txt")  # a distractor in both is no shared class
    with pytest.raises(InputError, match=r"images.txt: class 1 \(1 such class\(es\)\) is in the train"):
        check_class_disjoint(table, table.take([1, 2]), None, "images.txt")


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (small_with(2, path=""), "{2}: the path is empty; give"),
        (small_with(2, label=""), "{2}: the label is missing; name the class"),
        (small_with(1, split="Train"), r"{1}: split must be train, .* got 'Train'; did you mean train\?"),
        (small_with(0, split=""), "{0}: split must be train, .* got ''"),
        (small_with(x_1=["1"] * 4), r"has the columns x_1 of a box, but not y_1: add it"),
        (small_with(labels=["1"] * 4), r"column 'labels', a name that is taken: rename"),
        ({"path": [], "label": [], "split": []}, r"table\.\w+ has no rows"),
        (
            {"Path": ["a"], "label": ["1"], "split": ["train"]},
            r"no column 'path'; did you mean Path\?.* 'label', 'split'",
        ),
        ({"path": ["a"], "split": ["train"]}, r"no column 'label'.*add it, or name one of them with columns="),
        (small_with(is_query=["", "", "maybe", "1"]), "{2}: is_query must be true, false, 1 or 0, got 'maybe'"),
        (small_with(is_query=["", "", "1", ""]), "{3}: is_query is empty in a row of evaluation; write"),
        (
            small_with(is_query=["", "", "1", "0"], is_gallery=["", "", "1", "0"]),
            "{3}: is_query and is_gallery are both false in a row of evaluation; set one",
        ),
    ],
)
def test_errors_name_the_row(write: Writer, columns: Columns, message: str, tmp_path: Path) -> None:
    """Among a million rows the message is the only way to the mistake."""
    numbers = [f"line {n + 2}" if write is write_csv else f"row {n + 1}" for n in range(4)]
    for place, number in enumerate(numbers):
        message = message.replace(f"{{{place}}}", rf"table\.\w+, {number}")
    with pytest.raises(InputError, match=message):
        read_table(write(tmp_path, columns))


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 1, 5, 9), "= 5, 1, 5, 9 has no inside; x_1 must be less"),
        ((1, 9, 5, 2), "= 1, 9, 5, 2 has no inside"),
        ((-1, 0, 5, 9), "is negative; the upper left"),
        ((None, 1, 5, 9), "= , 1, 5, 9 is given in part; give all four"),
        ((0.5, 1, 5, 9), "is not in whole pixels; round it"),
        ((0, 1, 2**31, 9), "is not in whole pixels"),
        ((0, 1, float("inf"), 9), "x_2 must be a whole number of pixels or empty, got"),
    ],
)
def test_wrong_boxes(write: Writer, box: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    """A box the wrong way round would give an empty image, a thousand steps into the training."""
    columns = small_with() | {name: [0, 0, box[n], None] for n, name in enumerate(("x_1", "y_1"))}
    columns |= {name: [9, 9, box[n + 2], None] for n, name in enumerate(("x_2", "y_2"))}
    with pytest.raises(InputError, match=f"(line 4|row 3): .*{message}"):
        read_table(write(tmp_path, columns))


def test_a_box_of_words(tmp_path: Path) -> None:
    """Columns in the wrong order show here first."""
    box = {name: ["0", "0", "left", ""] for name in ("x_1", "y_1", "x_2", "y_2")}
    with pytest.raises(InputError, match="line 4: x_1 must be a whole number of pixels or empty, got 'left'"):
        read_table(write_csv(tmp_path, small_with() | box))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "table.csv is empty: it must begin with"),
        (b"\n\n", "table.csv is empty"),
        (b"path,label,split,path\na,1,train,b\n", "has 2 columns called 'path': remove or rename one"),
        (b"path,label,split\na,1,train\n\nb,2\n", r"line 4: the row has 2 field\(s\), the header 3; put"),
        (b"path,label,split\na,1,train\nb,c,2,train\n", r"line 3: the row has 4 field\(s\), the header 3"),
        (b'path,label,split\na,1,train\n"b,2,train\nc,2,train\n', "line 3: unexpected end of data; put it right"),
        (b"path,label,split\n\xff.jpg,1,train\n", "not UTF-8 .*save the table in UTF-8"),
        (b"path,label,split\na\0.jpg,1,train\n", "line 2: .*NUL"),
    ],
)
def test_broken_csv(content: bytes, message: str, tmp_path: Path) -> None:
    """A mark that is never closed, or a comma in a name, must not shift the rest of the file."""
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    """The commonest mistake is a wrong path."""
    with pytest.raises(InputError, match=r"table .*none.csv is not a file: give"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must be a .csv, .tsv or .parquet file, got .xlsx: convert it"):
        read_table(tmp_path / "table.xlsx")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"table.parquet is no Parquet file that can be read"):
        read_table(tmp_path / "table.parquet")
    pyarrow.parquet.write_table(pyarrow.table({**SMALL, "list": [[1], [2], [3], [4]]}), tmp_path / "table.parquet")
    with pytest.raises(InputError, match=r"column 'list' of list.* cannot be made text: remove it"):
        read_table(tmp_path / "table.parquet")
    with pytest.raises(InputError, match="split must be one of train, val, test, got 'validation'"):
        read_table(write_csv(tmp_path, SMALL)).split("validation")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is an extra; whoever lacks it must learn its name and not see a traceback."""
    path = write_parquet(tmp_path, SMALL)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow: pip install 'lightning-dml\[data\]'"):
        read_table(path)
