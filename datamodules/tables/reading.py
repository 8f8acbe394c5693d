"""A table of images in a CSV or Parquet file, in the format of open-metric-learning (OML)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.checks import check_choice
from lightning_dml.datamodules.arrays import BoolArray, IntArray
from lightning_dml.datamodules.tables.checks import (
    NO_BOX,
    Source,
    check_boxes,
    check_labels_disjoint,
    check_no_duplicates,
    check_paths,
)
from lightning_dml.datamodules.tables.chunks import TableFile, open_table
from lightning_dml.datamodules.tables.columns import CodedColumn, Codes, ExtraColumn, TextColumn
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError, near_names

SPLITS = ("train", "val", "test")
REQUIRED = ("path", "label", "split")
ROLES = ("is_query", "is_gallery")
BOX = ("x_1", "y_1", "x_2", "y_2")
COLUMNS = (*REQUIRED, *ROLES, *BOX, "category", "sequence")
"""The columns that are understood; others are kept as they are."""

DISTRACTOR = "-1"  # the label of an image that matches nothing

_SPLIT_WORDS = {"train": 0, "validation": 1, "val": 1, "test": 2}
_BOOLS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0, "": -1}
_TABLE_FIELDS = frozenset(field.name for field in fields(ImageTable))


@dataclass(frozen=True, eq=False)
class Table:
    """Contents of a table file.

    Args:
        table: all N rows in the order of the file. Labels are places in `label_names`; distractors are -1. Rows without
            a box, where others have one, have `NO_BOX`. `is_query` and `is_gallery` are False in training rows.
        splits: (N,) int8, place of each row's split in `SPLITS`.
        label_names: the classes that train in sorted order, then the others; numbers sort as numbers.
        super_label_names: name of each of `table.super_labels`, sorted; a row without a category is -1.
        group_names: name of each of `table.groups`, sorted; a row without a sequence is -1.
        source: the file, and the number of each row in it.
    """

    table: ImageTable
    splits: NDArray[np.int8]
    label_names: list[str]
    super_label_names: list[str]
    group_names: list[str]
    source: Source

    def split(self, name: str) -> ImageTable:
        """The rows of one split, which may be none; training rows have no roles.

        Args:
            name: one of `SPLITS`.
        """
        check_choice("split", name, SPLITS)
        rows = self.table.take(self.splits == SPLITS.index(name))
        return replace(rows, is_query=None, is_gallery=None) if name == "train" else rows

    def by_split(self) -> dict[str, ImageTable]:
        """The splits that have rows, by name, in the order of `SPLITS`."""
        return {name: self.split(name) for place, name in enumerate(SPLITS) if (self.splits == place).any()}


def read_table(
    path: str | Path,
    root: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    allow_shared_classes: bool = False,
) -> Table:
    """Reads a table of images, checks it, and opens none of them.

    Needed are `path`, `label` (text or whole numbers; -1 is a distractor) and `split` (`train`, `validation` or `val`,
    `test`). Optional are `is_query` and `is_gallery` (true, false, 1 or 0; empty in training rows; without the column
    every row of evaluation is one), `x_1, y_1, x_2, y_2` (whole pixels, the second corner past the edge; empty means
    the whole image), `category` and `sequence`. Tables made for OML can be read as they are. Every other column is
    kept by its name: in numbers where all of it is (in Parquet, where its type says so), else as text. Columns without
    a name, such as the index that pandas writes, are passed over.

    Args:
        path: `.csv` (commas, UTF-8), `.tsv` (tabs), `.parquet` or `.pq`; the last two take the extra
            `lightning-dml[data]`.
        root: folder that relative paths start from, and that no path may leave; None means the folder of the table, and
            lets absolute paths lie anywhere.
        columns: what the file calls a column, by our name, such as `{"label": "class_id"}`.
        allow_shared_classes: let a class be in training and in another split.

    Raises:
        InputError: for a file that cannot be read, a column that is missing, twice or unknown, or the first row that is
            wrong: it names the file and the line (in Parquet the row), and what to do.
    """
    path = Path(path)
    file = open_table(path)
    places = _find_columns(path, file.header, columns or {})
    known, extra, source = _collect(path, file, places)
    splits = _splits(known["split"], source)
    labels, label_names = _labels(known["label"], splits, source)
    super_labels, super_label_names = _groups(known.get("category"))
    groups, group_names = _groups(known.get("sequence"))
    is_query, is_gallery = (_role(name, known.get(name), splits, source) for name in ROLES)
    _check_roles(is_query, is_gallery, splits, source)
    table = ImageTable(
        root=path.parent if root is None else Path(root),
        paths=known["path"],
        labels=labels,
        boxes=_boxes(known, source),
        is_query=is_query,
        is_gallery=is_gallery,
        groups=groups,
        super_labels=super_labels,
        extra=extra,
    )
    check_paths(table, source, absolute=root is None)
    check_no_duplicates(table, source)
    if not allow_shared_classes:
        for place, name in enumerate(SPLITS[1:], 1):
            check_labels_disjoint(labels[splits == 0], labels[splits == place], label_names, source, name)
    return Table(table, splits, label_names, super_label_names, group_names, source)


def _find_columns(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Places of the columns in the file, by our names where we know them, else by their own."""
    for ours in columns:
        if ours not in COLUMNS:
            raise InputError(
                f"columns has the unknown name {ours!r}{near_names(str(ours), COLUMNS)}; it maps our names, "
                f"{', '.join(COLUMNS)}, to those of the file"
            )
    named = [name for name in header if name]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"table {path} has {named.count(twice[0])} columns called {twice[0]!r}: remove or rename one")
    places = {}
    for ours in COLUMNS:
        theirs = columns.get(ours, ours)
        if theirs in named:
            places[ours] = header.index(theirs)
        elif ours in REQUIRED or ours in columns:
            raise InputError(
                f"table {path} has no column {theirs!r}{near_names(theirs, named)}; its columns are "
                f"{', '.join(map(repr, named))}: add it, or name one of them with columns={{{ours!r}: ...}}"
            )
    corners = [name for name in BOX if name in places]
    if corners and len(corners) < len(BOX):
        missing = next(name for name in BOX if name not in places)
        raise InputError(f"table {path} has the columns {', '.join(corners)} of a box, but not {missing}: add it")
    places_used = set(places.values())
    for place, name in enumerate(header):
        if name and place not in places_used:
            if name in _TABLE_FIELDS or name in COLUMNS:
                raise InputError(f"table {path} has a column {name!r}, a name that is taken: rename it or remove it")
            places[name] = place
    return places


def _collect(
    path: Path, file: TableFile, places: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Texts | NDArray[Any]], Source]:
    """Gathers the columns that are understood, the others, and the numbers of the rows."""
    others = {name: ExtraColumn(file.typed) for name in places if name not in COLUMNS}
    known: dict[str, TextColumn | CodedColumn] = {
        name: TextColumn() if name == "path" else CodedColumn() for name in places if name in COLUMNS
    }
    numbers: list[IntArray] = []
    for chunk in file.chunks:
        numbers.append(chunk.numbers)
        for name, place in places.items():
            (known.get(name) or others[name]).add(chunk.columns[place])
    if not numbers:
        raise InputError(f"table {path} has no rows: write one for each image")
    finished = {name: maker.finish() for name, maker in known.items()}
    extra = {name: maker.finish() for name, maker in others.items()}
    return finished, extra, Source(str(path), np.concatenate(numbers), file.unit)


def _splits(column: Codes, source: Source) -> NDArray[np.int8]:
    row = column.first(lambda value: value not in _SPLIT_WORDS)
    if row is not None:
        value = column.values[column.rows[row]]
        raise InputError(
            f"{source.at(row)}: split must be train, validation, val or test, got {value!r}"
            f"{near_names(value.lower(), _SPLIT_WORDS)}"
        )
    return column.to(_SPLIT_WORDS.__getitem__).astype(np.int8)


def _labels(column: Codes, splits: NDArray[np.int8], source: Source) -> tuple[IntArray, list[str]]:
    row = column.first(lambda value: not value.strip())
    if row is not None:
        raise InputError(f"{source.at(row)}: the label is missing; name the class, or remove the row")
    row = column.first(lambda value: value == DISTRACTOR, splits == 0)
    if row is not None:
        raise InputError(
            f"{source.at(row)}: the label -1 is for images that match nothing, which cannot train; name the class"
        )
    trains = np.zeros(len(column.values), np.bool_)
    trains[column.rows[splits == 0]] = True
    places = [place for place in _sorted_places(column.values) if column.values[place] != DISTRACTOR]
    order = [place for place in places if trains[place]] + [place for place in places if not trains[place]]
    return _relabelled(column, order)


def _groups(column: Codes | None) -> tuple[IntArray | None, list[str]]:
    if column is None:
        return None, []
    return _relabelled(column, [place for place in _sorted_places(column.values) if column.values[place]])


def _relabelled(column: Codes, order: Sequence[int]) -> tuple[IntArray, list[str]]:
    """New labels: each row's place in `order`, -1 for values that it lacks, and the names in that order."""
    label = np.full(len(column.values), -1, np.int64)
    label[list(order)] = np.arange(len(order))
    return label[column.rows], [column.values[place] for place in order]


def _sorted_places(values: Sequence[str]) -> list[int]:
    whole = all(re.fullmatch(r"-?[0-9]+", value) for value in values if value)
    return sorted(range(len(values)), key=lambda n: (int(values[n] or 0) if whole else 0, values[n]))


def _role(name: str, column: Codes | None, splits: NDArray[np.int8], source: Source) -> BoolArray | None:
    if column is None:
        return None
    row = column.first(lambda value: value.strip().lower() not in _BOOLS)
    if row is not None:
        value = column.values[column.rows[row]]
        raise InputError(f"{source.at(row)}: {name} must be true, false, 1 or 0, got {value!r}")
    roles = column.to(lambda value: _BOOLS[value.strip().lower()])
    empty = (roles < 0) & (splits > 0)
    if empty.any():
        raise InputError(
            f"{source.at(int(empty.argmax()))}: {name} is empty in a row of evaluation; write true or false, or remove "
            "the column, and every such row is one"
        )
    role: BoolArray = (roles > 0) & (splits > 0)
    return role


def _check_roles(
    is_query: BoolArray | None, is_gallery: BoolArray | None, splits: NDArray[np.int8], source: Source
) -> None:
    if is_query is None or is_gallery is None:
        return
    idle = (splits > 0) & ~is_query & ~is_gallery
    if idle.any():
        raise InputError(
            f"{source.at(int(idle.argmax()))}: is_query and is_gallery are both false in a row of evaluation; set one, "
            "or remove the row"
        )


def _boxes(known: Mapping[str, Any], source: Source) -> NDArray[np.int32] | None:
    if BOX[0] not in known:
        return None
    columns = []
    for name in BOX:
        column: Codes = known[name]
        row = column.first(lambda value: _pixels(value) is None)
        if row is not None:
            value = column.values[column.rows[row]]
            raise InputError(f"{source.at(row)}: {name} must be a whole number of pixels or empty, got {value!r}")
        columns.append(column.to(lambda value: _pixels(value) or 0.0))
    boxes = np.stack(columns, 1)
    check_boxes(boxes, source)
    missing = np.isnan(boxes[:, 0])
    if missing.all():
        return None
    return np.where(missing[:, None], NO_BOX, boxes).astype(np.int32)


def _pixels(value: str) -> float | None:
    """Reads a number of pixels: NaN where there is none, None where it is something else."""
    try:
        pixels = float(value) if value.strip() else np.nan
    except ValueError:
        return None
    return None if np.isinf(pixels) else pixels
