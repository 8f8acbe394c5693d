"""Small tables, and how they are written."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Columns = Mapping[str, Sequence[Any]]


Writer = Callable[[Path, Columns], Path]


SMALL: dict[str, list[Any]] = {
    "path": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
    "label": ["10", "9", "2", "2"],
    "split": ["train", "train", "validation", "validation"],
}


def write_csv(folder: Path, columns: Columns) -> Path:
    """A CSV file of columns, as pandas writes them: missing values are empty."""
    path = folder / "table.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(
            ["" if value is None else value for value in row] for row in zip(*columns.values(), strict=True)
        )
    return path


def write_parquet(folder: Path, columns: Columns) -> Path:
    """A Parquet file of the columns, in types that pyarrow finds; of several row groups."""
    path = folder / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=3)
    return path


def small_with(row: int = -1, **values: Any) -> dict[str, list[Any]]:
    """The small table with other columns, or another value in one row of them."""
    columns = {name: list(column) for name, column in SMALL.items()}
    for name, value in values.items():
        if isinstance(value, list):
            columns[name] = value
        else:
            columns[name][row] = value
    return columns
