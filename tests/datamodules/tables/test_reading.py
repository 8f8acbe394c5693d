"""Tables of images: what is read must be what was written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_dml.datamodules.tables import chunks as table_chunks
from lightning_dml.datamodules.tables.checks import (
    NO_BOX,
)
from lightning_dml.datamodules.tables.reading import Table, read_table
from lightning_dml.datamodules.tables.rows import Texts
from lightning_dml.errors import InputError
from tests.datamodules.tables.cases import SMALL, Writer, small_with, write_csv, write_parquet


def named_labels(table: Table) -> list[str]:
    """The labels of all rows as the file has them."""
    return ["-1" if label < 0 else table.label_names[label] for label in table.table.labels]


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_a_table_in_the_format_of_oml(write: Writer, tmp_path: Path) -> None:
    """Whoever comes from OML has such a file already, with gaps for training rows and for boxes."""
    path = write(
        tmp_path,
        {
            "label": [7, 7, 3, 3, 12],
            "path": ["x/é, 1.jpg", 'x/"2".jpg', "y/3.jpg", "y/4.jpg", "y/4.jpg"],
            "split": ["train", "train", "validation", "validation", "validation"],
            "is_query": [None, None, True, False, True],
            "is_gallery": [None, None, False, True, True],
            "x_1": [0, None, 5, 6, 7],
            "x_2": [10, None, 15, 16, 17],
            "y_1": [1, None, 2, 3, 4],
            "y_2": [20, None, 21, 22, 23],
            "category": ["cat", "cat", "dog", None, "ant"],
            "sequence": [None, None, 30, 4, 4],
            "weight": [0.5, 1.5, -2.0, 4.0, 1e3],
            "camera": [1, 2, 3, 4, 5],
            "note": ["", "007", "x", "y", "z"],
        },
    )
    read = read_table(path)
    table = read.table
    assert table.root == tmp_path and list(read.by_split()) == ["train", "val"]
    assert list(table.paths) == ["x/é, 1.jpg", 'x/"2".jpg', "y/3.jpg", "y/4.jpg", "y/4.jpg"]
    assert read.label_names == ["7", "3", "12"] and table.labels.tolist() == [0, 0, 1, 1, 2]
    assert table.is_query is not None and table.is_query.tolist() == [False, False, True, False, True]
    assert table.is_gallery is not None and table.is_gallery.tolist() == [False, False, False, True, True]
    assert table.boxes is not None and table.boxes.dtype == np.int32
    assert table.boxes.tolist() == [[0, 1, 10, 20], list(NO_BOX), [5, 2, 15, 21], [6, 3, 16, 22], [7, 4, 17, 23]]
    assert read.super_label_names == ["ant", "cat", "dog"]
    assert table.super_labels is not None and table.super_labels.tolist() == [1, 1, 2, -1, 0]
    assert read.group_names == ["4", "30"]
    assert table.groups is not None and table.groups.tolist() == [-1, -1, 1, 0, 0]
    weight, camera = table.extra["weight"], table.extra["camera"]
    assert isinstance(weight, np.ndarray) and weight.tolist() == [0.5, 1.5, -2.0, 4.0, 1000.0]
    assert isinstance(camera, np.ndarray) and camera.tolist() == [1, 2, 3, 4, 5] and camera.dtype == np.int64
    assert table.extra["note"] == Texts(["", "007", "x", "y", "z"])
    train, val = read.split("train"), read.split("val")
    assert len(train) == 2 and train.is_query is None and train.is_gallery is None
    assert len(val) == 3 and val.is_query is not None and val.labels.tolist() == [1, 1, 2]
    assert len(read.split("test")) == 0


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_the_three_needed_columns_are_enough(write: Writer, tmp_path: Path) -> None:
    """Whoever has no roles and no boxes must not write any; training labels count from 0."""
    read = read_table(write(tmp_path, SMALL))
    assert read.label_names == ["9", "10", "2"]  # as numbers, and training first
    assert read.table.labels.tolist() == [1, 0, 2, 2]
    assert read.table.boxes is None and read.table.is_query is None and read.table.groups is None
    assert not read.table.extra and not read.super_label_names and not read.group_names


def test_text_labels_sort_as_text(tmp_path: Path) -> None:
    """The numbering must not depend on the order of the rows, or two files of one set would not fit one model."""
    read = read_table(write_csv(tmp_path, small_with(label=["b", "10", "a", "a"])))
    assert read.label_names == ["10", "b", "a"] and read.table.labels.tolist() == [1, 0, 2, 2]


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize("rows", [1, 2, 3, 65_536])
def test_order_is_kept_over_chunks(write: Writer, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row out of place would pair an image with another's label, which nothing would show."""
    monkeypatch.setattr(table_chunks, "ROWS", rows)
    count = 11
    columns: dict[str, Any] = {
        "path": [f"{n * 7 % count}.jpg" for n in range(count)],
        "label": [n * 5 % 4 if n < 6 else 4 + n % 2 for n in range(count)],
        "split": ["train"] * 6 + ["test"] * 5,
        "score": [n / 8 for n in range(count)],
        "late": ["1"] * 10 + ["no number"],
    }
    read = read_table(write(tmp_path, columns))
    assert list(read.table.paths) == columns["path"]
    assert named_labels(read) == [str(label) for label in columns["label"]]
    assert np.array_equal(np.asarray(read.table.extra["score"]), columns["score"])
    assert read.table.extra["late"] == Texts(columns["late"])
    assert read.source.at(10).endswith("line 12" if write is write_csv else "row 11")


WORDS = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\r\t"), min_size=1, max_size=5
).filter(lambda text: text.strip())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(WORDS, WORDS, st.sampled_from(["train", "val", "validation", "test"]), WORDS, st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    write=st.sampled_from([write_csv, write_parquet]),
)
def test_what_is_written_is_read(rows: list[Any], write: Writer, tmp_path: Path) -> None:
    """Names come with commas, quotation marks, line ends and in every script; the oracle is the list itself."""
    columns = {
        "note": [row[3] for row in rows],
        "path": [f"{number}{row[0]}".replace("/", "|").replace("..", "+") for number, row in enumerate(rows)],
        "label": [row[1] for row in rows],
        "split": [row[2] for row in rows],
        "x_1": [row[4] for row in rows],
        "y_1": [row[4] // 2 for row in rows],
        "x_2": [row[4] + 1 for row in rows],
        "y_2": [row[4] + 9 for row in rows],
    }
    if any(label == "-1" and split == "train" for _, label, split, _, _ in rows):
        return
    read = read_table(write(tmp_path, columns), allow_shared_classes=True)
    assert list(read.table.paths) == columns["path"] and named_labels(read) == columns["label"]
    train_labels = {row[1] for row in rows if row[2] == "train"}
    assert set(read.label_names[: len(train_labels)]) == train_labels
    note = read.table.extra["note"]
    if isinstance(note, Texts):
        assert list(note) == columns["note"]
    else:
        assert write is write_csv and note.tolist() == [float(text) for text in columns["note"]]
    assert read.table.boxes is not None
    assert read.table.boxes.tolist() == [
        [columns[name][n] for name in ("x_1", "y_1", "x_2", "y_2")] for n in range(len(rows))
    ]
    words = {"validation": "val"}
    for name, part in read.by_split().items():
        expected = [path for path, row in zip(columns["path"], rows, strict=True) if words.get(row[2], row[2]) == name]
        assert list(part.paths) == expected


def test_spreadsheets_and_pandas(tmp_path: Path) -> None:
    """A byte order mark, blank lines, other line ends and an index without a name are no mistakes of the user."""
    path = tmp_path / "table.csv"
    path.write_bytes("\ufeff,path,label,split\r\n0,a.jpg,x,train\r\n\r\n1,b.jpg,x,train\r\n  \r\n".encode())
    read = read_table(path)
    assert list(read.table.paths) == ["a.jpg", "b.jpg"] and not read.table.extra
    assert [read.source.number(row) for row in range(2)] == [2, 4]
    tabs = tmp_path / "table.tsv"
    tabs.write_text('path\tlabel\tsplit\n"a\n,.jpg"\tx\ttrain\nb.jpg\tx\ttrain\n', encoding="utf-8")
    read = read_table(tabs)
    assert list(read.table.paths) == ["a\n,.jpg", "b.jpg"]
    assert [read.source.number(row) for row in range(2)] == [2, 4]


def test_columns_of_another_name(tmp_path: Path) -> None:
    """Millions of rows are not rewritten for the sake of a name."""
    columns = {"file": SMALL["path"], "class": SMALL["label"], "split": SMALL["split"], "age": [1, 2, 3, 4]}
    read = read_table(write_csv(tmp_path, columns), columns={"path": "file", "label": "class"})
    assert list(read.table.paths) == SMALL["path"] and list(read.table.extra) == ["age"]
    with pytest.raises(InputError, match=r"unknown name 'lable'; did you mean label\?"):
        read_table(tmp_path / "table.csv", columns={"lable": "class"})


def test_roles_may_be_given_alone(tmp_path: Path) -> None:
    """Without a column of gallery roles every image of evaluation can be found; training images never can."""
    read = read_table(write_csv(tmp_path, small_with(is_query=["1", "", "True", "0.0"])))
    assert read.table.is_gallery is None
    assert read.table.is_query is not None and read.table.is_query.tolist() == [False, False, True, False]


def test_distractors(tmp_path: Path) -> None:
    """An image that matches nothing is of no class; as a class, its rows would match each other."""
    read = read_table(write_csv(tmp_path, small_with(label=["1", "1", "-1", "5"])))
    assert read.table.labels.tolist() == [0, 0, -1, 1] and read.label_names == ["1", "5"]
    with pytest.raises(InputError, match=r"line 2: the label -1 .*cannot train"):
        read_table(write_csv(tmp_path, small_with(label=["-1", "1", "2", "5"])))


def test_shared_classes(tmp_path: Path) -> None:
    """Evaluation on classes that were trained measures something else, so it has to be asked for."""
    path = write_csv(tmp_path, small_with(label=["a", "b", "b", "c"]))
    with pytest.raises(InputError, match=r"table.csv: class 'b' \(1 such .*in the val rows.*allow_shared_classes=true"):
        read_table(path)
    read = read_table(path, allow_shared_classes=True)
    assert read.label_names == ["a", "b", "c"] and read.split("val").labels.tolist() == [1, 2]


def test_types_of_parquet(tmp_path: Path) -> None:
    """A dictionary column of pandas is text, text of digits stays text, and gaps make integers floats."""
    columns: dict[str, Any] = {
        **SMALL,
        "label": pyarrow.array(SMALL["label"]).dictionary_encode(),
        "digits": ["1", "2", "3", "4"],
        "gaps": [1, None, 3, 4],
        "yes": [True, None, False, True],
        "__index_level_0__": [0, 1, 2, 3],
    }
    table = read_table(write_parquet(tmp_path, columns)).table
    assert list(table.extra) == ["digits", "gaps", "yes"]
    assert table.extra["digits"] == Texts(columns["digits"]) and table.extra["yes"] == Texts(
        ["true", "", "false", "true"]
    )
    assert np.array_equal(np.asarray(table.extra["gaps"]), [1, np.nan, 3, 4], equal_nan=True)


def test_numbers_of_csv(tmp_path: Path) -> None:
    """A leading zero is part of a name; what int64 cannot hold stays as it was written."""
    columns = small_with(
        zip=["01", "02", "3", "4"], big=[str(10**30)] * 4, mixed=["1", "2.5", "-3e2", "0"], gap=["1", "", "3", "4"]
    )
    extra = read_table(write_csv(tmp_path, columns)).table.extra
    assert extra["zip"] == Texts(columns["zip"]) and extra["gap"] == Texts(columns["gap"])
    assert np.array_equal(np.asarray(extra["mixed"]), [1, 2.5, -300, 0])
    assert extra["big"] == Texts(columns["big"])


def test_memory_is_that_of_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of millions of rows must fit beside the model; as text objects this one would be eight times as large."""
    count = 30_000
    columns: dict[str, Any] = {
        "path": [f"images/{row:09d}.jpg" for row in range(count)],
        "label": [row % 500 for row in range(count)],
        "split": ["train"] * count,
        "score": [row / 8 for row in range(count)],
    }
    path = write_csv(tmp_path, columns)
    monkeypatch.setattr(table_chunks, "ROWS", 1024)
    tracemalloc.start()
    try:
        table = read_table(path).table
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = table.paths.nbytes + table.labels.nbytes + np.asarray(table.extra["score"]).nbytes
    assert peak < 4 * arrays, f"{peak / 2**20:.1f} MiB at the peak for {arrays / 2**20:.1f} MiB of arrays"
