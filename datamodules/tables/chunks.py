"""CSV and Parquet files, read some ten thousand rows at a time, so that few Python objects live at once."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.errors import InputError, one_line

ROWS = 65_536  # in a chunk

Column = Sequence[str] | NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Args:
        numbers: (n,) int64, where each row stands: its first line in a CSV file, its row from 1 in a Parquet file.
        columns: one for each name in the header, n values each. Numbers of a Parquet file are arrays, all else is text;
            what is missing is the empty text.
    """

    numbers: IntArray
    columns: Sequence[Column]


@dataclass(frozen=True)
class TableFile:
    """An opened table.

    Args:
        header: names of the columns; one without a name is the empty text.
        chunks: the rows, to be gone through once.
        unit: what `numbers` of the chunks count, `line` or `row`.
        typed: whether the file says which columns are numbers.
    """

    header: list[str]
    chunks: Iterator[Chunk]
    unit: str
    typed: bool


def open_table(path: Path) -> TableFile:
    """Opens a table by the end of its name: `.csv`, `.tsv` (separated by tabs), `.parquet` or `.pq`.

    Args:
        path: the file; CSV in UTF-8, with a header.

    Raises:
        InputError: if there is no such file, its name ends otherwise, it is empty or cannot be read, or for Parquet
            without pyarrow. From `chunks`: for a row that is broken or of another length than the header.
    """
    if not path.is_file():
        raise InputError(f"table {path} is not a file: give the path of a .csv, .tsv or .parquet file")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _open_text(path, "\t" if suffix == ".tsv" else ",")
    if suffix in (".parquet", ".pq"):
        return _open_parquet(path)
    raise InputError(f"table {path} must be a .csv, .tsv or .parquet file, got {suffix or 'no ending'}: convert it")


def _open_text(path: Path, delimiter: str) -> TableFile:
    rows = _text_rows(path, delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise InputError(f"table {path} is empty: it must begin with a line of column names")
    return TableFile(header, _text_chunks(path, rows, len(header)), "line", typed=False)


def _text_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows, less blank lines, each with the number of its first line."""
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # Strict, because a quotation mark that is never closed would otherwise swallow the rest of the file.
            reader = csv.reader(_without_nul(file), delimiter=delimiter, strict=True)
            for row in reader:
                if len(row) > 1 or (row and row[0].strip()):
                    yield line + 1, row
                line = reader.line_num
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, after line {line}: not UTF-8 ({error.reason}); save the table in UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}, line {line + 1}: {error}; put it right there") from error


def _without_nul(file: TextIO) -> Iterator[str]:
    """Lines without NUL, which no path may have; Python before 3.11 refuses it and later ones keep it."""
    for line in file:
        if "\0" in line:
            raise csv.Error("the line contains the character NUL")
        yield line


def _text_chunks(path: Path, rows: Iterator[tuple[int, list[str]]], width: int) -> Iterator[Chunk]:
    numbers: list[int] = []
    # One flat list, because the garbage collector would go through a list of lists again and again.
    fields: list[str] = []
    for number, row in rows:
        if len(row) != width:
            raise InputError(
                f"{path}, line {number}: the row has {len(row)} field(s), the header {width}; put quotation marks "
                "round a field with a separator in it, or complete the row"
            )
        numbers.append(number)
        fields.extend(row)
        if len(numbers) == ROWS:
            yield Chunk(np.array(numbers, np.int64), [fields[place::width] for place in range(width)])
            numbers.clear()
            fields.clear()
    if fields:
        yield Chunk(np.array(numbers, np.int64), [fields[place::width] for place in range(width)])


def _open_parquet(path: Path) -> TableFile:
    try:
        # By name, so that the library can be type-checked without pyarrow.
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow: Any = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise InputError(
            f"table {path} needs the package pyarrow: pip install 'lightning-dml[data]', or save it as CSV"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"table {path} is no Parquet file that can be read: {one_line(error)}") from error
    names = list(file.schema_arrow.names)
    # pandas keeps its index in such a column.
    header = ["" if re.fullmatch(r"__index_level_\d+__", name) else name for name in names]
    return TableFile(header, _parquet_chunks(path, file, arrow), "row", typed=True)


def _parquet_chunks(path: Path, file: Any, arrow: Any) -> Iterator[Chunk]:
    first = 1
    batches = file.iter_batches(batch_size=ROWS)
    while True:
        try:
            batch = next(batches, None)
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{path}, after row {first - 1}: {one_line(error)}; write the file anew") from error
        if batch is None:
            return
        columns = [_parquet_column(path, name, batch.column(n), arrow) for n, name in enumerate(batch.schema.names)]
        if batch.num_rows:
            yield Chunk(np.arange(first, first + batch.num_rows), columns)
        first += batch.num_rows


def _parquet_column(path: Path, name: str, column: Any, arrow: Any) -> Column:
    if arrow.types.is_integer(column.type) or arrow.types.is_floating(column.type):
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)  # integers with gaps become floats with NaN
        return values
    try:
        return ["" if value is None else value for value in column.cast(arrow.string()).to_pylist()]
    except arrow.ArrowException as error:
        raise InputError(f"table {path}: column {name!r} of {column.type} cannot be made text: remove it") from error
