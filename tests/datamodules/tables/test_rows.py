"""Columns of text and tables of images: what they hold is what went in, at a price per row that is known."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing

from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError

TEXT = st.text(max_size=8)


@given(values=st.lists(TEXT, max_size=20), data=st.data())
def test_texts_are_a_list_of_str(values: list[str], data: st.DataObject) -> None:
    """Paths in any script must come out as they went in."""
    column = Texts(values)
    assert list(column) == values and len(column) == len(values)
    assert column == Texts(values) and column != Texts([*values, "x"])
    assert pickle.loads(pickle.dumps(column)) == column
    rows = data.draw(st.lists(st.integers(-len(values), len(values) - 1), max_size=30)) if values else []
    assert list(column.take(rows)) == [values[row] for row in rows]
    mask = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    assert list(column.take(np.array(mask, bool))) == [value for value, kept in zip(values, mask, strict=True) if kept]
    codes, names = column.codes()
    assert names == sorted(set(values)) and [names[code] for code in codes] == values


@given(parts=st.lists(st.lists(TEXT, max_size=5), max_size=4))
def test_texts_are_concatenated(parts: list[list[str]]) -> None:
    """Tables are read in blocks."""
    assert list(Texts.concatenate(Texts(part) for part in parts)) == [value for part in parts for value in part]


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """File systems hold bytes; such a name must still open its file."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert list(Texts([name])) == [name]


def test_a_row_too_many() -> None:
    """A wrong position must not return another file's name."""
    column = Texts(["a", "b"])
    assert column[-1] == "b"
    for row in (2, -3):
        with pytest.raises(IndexError, match=f"row {row} of 2"):
            column[row]
    with pytest.raises(InputError, match="rows must be less than 2, got 2"):
        column.take([2])
    with pytest.raises(InputError, match="a mask of 2 bools"):
        column.take(np.array([True]))


def test_a_text_costs_its_bytes() -> None:
    """A million paths must fit beside the training, in every worker."""
    column = Texts(f"folder/{row:07}.jpg" for row in range(70_000))
    assert column.nbytes == 70_000 * (18 + 8) + 8


def full(root: Path = Path("root")) -> ImageTable:
    """A table with every column."""
    return ImageTable(
        root,
        Texts(["a.jpg", "b.jpg", "c.jpg"]),
        labels=np.array([0, 1, -1]),
        boxes=np.arange(12, dtype=np.int32).reshape(3, 4),
        is_query=np.array([True, False, False]),
        is_gallery=np.array([False, True, True]),
        groups=np.array([3, 4, -1]),
        super_labels=np.array([0, 0, 1]),
        rows=np.array([5, 6, 7]),
        extra={"camera": Texts(["x", "y", "z"]), "year": np.array([1.0, 2.0, 3.0])},
    )


def same(ours: ImageTable, right: ImageTable) -> None:
    """Every column."""
    assert ours.root == right.root
    ours_columns, right_columns = ours._columns(), right._columns()
    assert list(ours_columns) == list(right_columns)
    for name, column in ours_columns.items():
        assert list(column) == list(right_columns[name]) if isinstance(column, Texts) else True
        if not isinstance(column, Texts):
            np.testing.assert_array_equal(column, right_columns[name])
            assert column.dtype == right_columns[name].dtype


def test_rows_are_taken_with_all_columns() -> None:
    """A column left behind would give an image another one's box or role."""
    part = full().take([2, 0])
    assert list(part.paths) == ["c.jpg", "a.jpg"] and part.labels.tolist() == [-1, 0]
    assert part.boxes is not None and part.boxes.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert part.rows is not None and part.rows.tolist() == [7, 5]
    camera = part.extra["camera"]
    assert isinstance(camera, Texts) and list(camera) == ["z", "x"]
    assert part.path(1) == Path("root/a.jpg")
    same(full().take(np.array([True, True, True])), full())


def sent_back(table: ImageTable, queue: Any) -> None:
    """A worker's view of the table."""
    queue.put((list(table.paths), table.labels.sum().item(), list(table.extra)))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_get_the_table(method: str) -> None:
    """Python 3.14 no longer forks by default: the table must arrive by pickle as well."""
    same(pickle.loads(pickle.dumps(full())), full())
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=sent_back, args=(full(), queue))
    process.start()
    assert queue.get(timeout=60) == (["a.jpg", "b.jpg", "c.jpg"], 0, ["camera", "year"])
    process.join()


def test_the_digest_tells_tables_apart() -> None:
    """Ranks compare what they have read by it; the folder may differ between machines."""
    right = full().digest()
    assert full(Path("elsewhere")).digest() == right
    assert full().take([0, 2, 1]).digest() != right
    assert full().with_labels(np.array([0, 1, 0])).digest() != right


def test_columns_must_fit() -> None:
    """A column of another length would shift everything after it."""
    with pytest.raises(InputError, match=r"labels must have the shape \(1,\), a row for each path, got \(2,\)"):
        ImageTable(Path(), Texts(["a"]), np.array([0, 1]))
    with pytest.raises(InputError, match=r"boxes must have the shape \(1, 4\)"):
        ImageTable(Path(), Texts(["a"]), np.array([0]), boxes=np.zeros((1, 3), np.int32))
    with pytest.raises(InputError, match="'labels', which the table has itself"):
        ImageTable(Path(), Texts(["a"]), np.array([0]), extra={"labels": np.array([0])})
