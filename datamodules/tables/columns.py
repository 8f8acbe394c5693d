"""Columns of a table, gathered chunk by chunk into few arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import BoolArray
from lightning_dml.datamodules.tables.chunks import Column
from lightning_dml.datamodules.tables.rows import Texts


class TextColumn:
    """Gathers a column of text."""

    def __init__(self) -> None:
        self.chunks: list[Texts] = []

    def add(self, column: Column) -> None:
        """Takes the next values."""
        self.chunks.append(Texts(map(str, column)))

    def finish(self) -> Texts:
        """The whole column."""
        return Texts.concatenate(self.chunks)


@dataclass(frozen=True, eq=False)
class Codes:
    """A column as its distinct values, and each row's place among them."""

    values: list[str]
    rows: NDArray[np.int32]

    def first(self, wrong: Callable[[str], bool], within: BoolArray | None = None) -> int | None:
        """The first row with a value that is wrong, among some rows or all."""
        bad = np.array([wrong(value) for value in self.values], np.bool_)[self.rows]
        if within is not None:
            bad &= within
        return int(bad.argmax()) if bad.any() else None

    def to(self, convert: Callable[[str], float]) -> NDArray[np.float64]:
        """Value of every row, converted to a number."""
        return np.array([convert(value) for value in self.values], np.float64)[self.rows]


class CodedColumn:
    """Gathers a column of few distinct values, each of which is kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.chunks: list[NDArray[np.int32]] = []

    def add(self, column: Column) -> None:
        """Takes the next values."""
        places = self.places
        if isinstance(column, np.ndarray):
            values, rows = np.unique(column, return_inverse=True)
            codes = [places.setdefault(_number_text(value), len(places)) for value in values.tolist()]
            self.chunks.append(np.array(codes, np.int32)[rows])
        else:
            codes = [places.setdefault(value, len(places)) for value in column]
            self.chunks.append(np.array(codes, np.int32))

    def finish(self) -> Codes:
        """The whole column."""
        return Codes(list(self.places), np.concatenate(self.chunks))


class ExtraColumn:
    """Gathers a column that nothing here looks into: as numbers while all of it is numbers, else as text.

    Args:
        typed: whether the file says which columns are numbers; text then stays text.
    """

    def __init__(self, typed: bool) -> None:
        self.typed = typed
        self.numbers: list[NDArray[Any]] | None = []
        self.texts = TextColumn()

    def add(self, column: Column) -> None:
        """Takes the next values."""
        if isinstance(column, np.ndarray):
            assert self.numbers is not None  # a column of a Parquet file has one type
            self.numbers.append(column)
            return
        self.texts.add(column)
        if self.numbers is not None:
            numbers = None if self.typed else _numbers(column)
            self.numbers = None if numbers is None else [*self.numbers, numbers]

    def finish(self) -> Texts | NDArray[Any]:
        """The whole column."""
        return self.texts.finish() if self.numbers is None else np.concatenate(self.numbers)


_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # what int64 holds
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def _numbers(column: Iterable[str]) -> NDArray[Any] | None:
    """Column in int64 or float64, or None if some of it is no number; 007 is a name."""
    column = list(column)
    if all(map(_WHOLE.fullmatch, column)):
        return np.array([int(value) for value in column], np.int64)
    return np.array([float(value) for value in column]) if all(map(_NUMBER.fullmatch, column)) else None


def _number_text(value: float) -> str:
    """A number of a Parquet file as CSV writes it: 3.0 is 3, as integers with gaps become floats, and NaN is empty."""
    if value != value:
        return ""
    return str(int(value)) if float(value).is_integer() else str(value)
