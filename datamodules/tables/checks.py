"""Checks of lists of image files: paths that lead elsewhere, rows that come twice, classes in two splits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError

NO_BOX = (0, 0, 0, 0)
"""The row of `ImageTable.boxes` that stands for the whole image, where others have a box."""


@dataclass(frozen=True, eq=False)
class Source:
    """Origin of the rows of a table, so that a message can say which to look at.

    Args:
        name: the file.
        numbers: (N,) number of each row in the file; None counts the rows from 1.
        unit: what is counted, `line` or `row`.

    Examples:
        >>> Source("list.csv", np.array([2, 5]), "line").at(1)
        'list.csv, line 5'
    """

    name: str
    numbers: IntArray | None = None
    unit: str = "row"

    def number(self, row: int) -> int:
        """The number of a row of the table in the file."""
        return int(row) + 1 if self.numbers is None else int(self.numbers[row])

    def at(self, row: int) -> str:
        """The file and the number of a row of the table."""
        return f"{self.name}, {self.unit} {self.number(row)}"


def check_paths(table: ImageTable, source: Source | str, absolute: bool = False) -> None:
    """Checks that every path is there and stays in the root. Looks at the text alone, at no file.

    Args:
        table: N rows.
        source: for the message.
        absolute: let absolute paths lie outside of the root.

    Raises:
        InputError: for the first path that is empty or leads out of the root.
    """
    source, plain = _source(source), _plain(table.root)
    for row, path in enumerate(table.paths):
        if not path.strip():
            raise InputError(f"{source.at(row)}: the path is empty; give each row the path of an image")
        if _is_simple(path) or (absolute and os.path.isabs(path)):
            continue
        if os.path.isabs(within := plain(path)):
            raise InputError(
                f"{source.at(row)}: the absolute path {path!r} is not in root {table.root}; give another root, or a "
                "path that is relative to it"
            )
        if within == os.pardir or within.startswith(os.pardir + os.sep):
            raise InputError(
                f"{source.at(row)}: the path {path!r} leads out of root {table.root}; give a root that holds all images"
            )


def check_no_duplicates(table: ImageTable, source: Source | str) -> None:
    """Checks that no image, or no box of it, comes twice: each would be a perfect match of the other.

    `a.jpg` and `./a.jpg` are one path. Memory is some numbers for each row, not its text.

    Args:
        table: N rows.
        source: for the message.

    Raises:
        InputError: for the first row that repeats another; it names both.
    """
    source, plain = _source(source), _plain(table.root)
    keys = np.fromiter((hash(_key(path, plain)) for path in table.paths), np.int64, len(table))
    for column in () if table.boxes is None else table.boxes.T:
        keys = keys * np.int64(6364136223846793005) + column  # wraps round, which mixes as well
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(first) == len(keys):
        return
    rows_by_key: dict[tuple[str, bytes], int] = {}
    for row in np.flatnonzero(np.isin(keys, keys[first[counts > 1]])).tolist():
        box = b"" if table.boxes is None else table.boxes[row].tobytes()
        earlier = rows_by_key.setdefault((_key(table.paths[row], plain), box), row)
        if earlier != row:
            what = "path and box" if table.boxes is not None and table.boxes[row].any() else "path"
            raise InputError(
                f"{source.at(row)}: the {what} of {table.paths[row]!r} is that of {source.unit} "
                f"{source.number(earlier)} already; remove one of the two"
            )


def check_class_disjoint(
    train: ImageTable, test: ImageTable, names: Sequence[str] | None, source: Source | str, split: str = "evaluation"
) -> None:
    """Checks that no class is in training and in evaluation; distractors (-1) are of no class.

    Args:
        train: training rows.
        test: evaluation rows.
        names: of the labels; None shows numbers.
        source: for the message.
        split: what the evaluation rows are called.

    Raises:
        InputError: if a class is in both.
    """
    check_labels_disjoint(train.labels, test.labels, names, source, split)


def check_labels_disjoint(
    train: IntArray, test: IntArray, names: Sequence[str] | None, source: Source | str, split: str = "evaluation"
) -> None:
    """`check_class_disjoint` for the labels alone, (N,) and (M,) int64."""
    shared = np.intersect1d(train, test)
    shared = shared[shared >= 0]
    if len(shared):
        name = repr(names[shared[0]]) if names is not None else str(shared[0])
        raise InputError(
            f"{_source(source).name}: class {name} ({len(shared)} such class(es)) is in the train and in the {split} "
            "rows: retrieval is evaluated on unseen classes; move one, or set allow_shared_classes=true"
        )


def check_boxes(boxes: NDArray[np.float64], source: Source) -> None:
    """Checks boxes in pixels before they are made integers.

    Args:
        boxes: (N, 4) of x_1, y_1, x_2, y_2; four NaN are no box.
        source: for the message.

    Raises:
        InputError: for the first box that is given in part, not in whole pixels, negative, or without an inside.
    """
    missing = np.isnan(boxes)
    box = np.where(missing, 0, boxes)
    boxed = ~missing.all(1)
    for wrong, why in (
        (boxed & missing.any(1), "is given in part; give all four numbers, or none for the whole image"),
        ((box % 1 != 0).any(1) | (box > np.iinfo(np.int32).max).any(1), "is not in whole pixels; round it"),
        ((box < 0).any(1), "is negative; the upper left corner of an image is 0, 0"),
        (
            boxed & ((box[:, 2] <= box[:, 0]) | (box[:, 3] <= box[:, 1])),
            "has no inside; x_1 must be less than x_2 and y_1 less than y_2",
        ),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            shown = ", ".join("" if np.isnan(number) else f"{number:g}" for number in boxes[row])
            raise InputError(f"{source.at(row)}: the box x_1, y_1, x_2, y_2 = {shown} {why}")


def _source(source: Source | str) -> Source:
    return Source(source) if isinstance(source, str) else source


def _plain(root: Path) -> Callable[[str], str]:
    """Makes a function that shortens a path: relative to the root where it lies in it, else absolute or with `..`."""
    folder = os.path.abspath(root)
    prefix = os.path.join(folder, "")

    def plain(path: str) -> str:
        whole = os.path.normpath(os.path.join(folder, path))
        if whole == folder or whole.startswith(prefix):
            return os.path.relpath(whole, folder)
        return whole if os.path.isabs(path) else os.path.relpath(whole, folder)

    return plain


def _key(path: str, plain: Callable[[str], str]) -> str:
    return path if _is_simple(path) else plain(path)


def _is_simple(path: str) -> bool:
    """True for a path that is relative and goes straight down; the usual case, which need not be taken apart."""
    return not (path.startswith(("./", "/", "\\")) or "//" in path or "/." in path or ".." in path or path[1:2] == ":")
