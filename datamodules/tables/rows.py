"""Rows of a data set of image files, in few flat arrays however many there are."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import BoolArray, IntArray, share_arrays, unshare_arrays
from lightning_dml.errors import InputError


class Texts:
    """A column of N texts in two arrays, one of bytes and one of offsets.

    A list of as many `str` is several times as large, and worker processes copy it page by page as they count
    references to its items. When it is pickled to a worker the arrays travel in shared memory.

    Args:
        values: the texts, in order.

    Examples:
        >>> column = Texts(["a.jpg", "b/c.jpg"])
        >>> column[1], len(column), list(column.take([1, 0]))
        ('b/c.jpg', 2, ['b/c.jpg', 'a.jpg'])
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        """Encodes the texts; see the class."""
        parts: list[bytes] = []
        lengths: list[int] = []
        blocks: list[NDArray[np.uint8]] = []
        for value in values:
            encoded = value.encode("utf-8", "surrogateescape")
            parts.append(encoded)
            lengths.append(len(encoded))
            if len(parts) == _BLOCK:
                blocks.append(np.frombuffer(b"".join(parts), np.uint8))
                parts.clear()
        blocks.append(np.frombuffer(b"".join(parts), np.uint8))
        self._bytes: NDArray[np.uint8] = np.concatenate(blocks)
        self._offsets: IntArray = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)

    @classmethod
    def concatenate(cls, columns: Iterable[Texts]) -> Texts:
        """Joins columns, one after the other."""
        columns = list(columns)
        whole = cls()
        if columns:
            whole._bytes = np.concatenate([column._bytes for column in columns])
            lengths = np.concatenate([np.diff(column._offsets) for column in columns])
            whole._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return whole

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        """The text of one row; negative rows count from the end."""
        count = len(self)
        if not -count <= row < count:
            raise IndexError(f"row {row} of {count} texts")
        row = int(row) % count
        return bytes(self._bytes[self._offsets[row] : self._offsets[row + 1]]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """The texts in order."""
        for first in range(0, len(self), _BLOCK):
            offsets = self._offsets[first : first + _BLOCK + 1]
            block = self._bytes[offsets[0] : offsets[-1]].tobytes()
            places = (offsets - offsets[0]).tolist()
            for start, end in itertools.pairwise(places):
                yield block[start:end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        """True if the other column holds the same texts in the same order."""
        if not isinstance(other, Texts):
            return NotImplemented
        return np.array_equal(self._offsets, other._offsets) and np.array_equal(self._bytes, other._bytes)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(self[row]) for row in range(min(3, len(self))))
        return f"Texts([{shown}{', ...' if len(self) > 3 else ''}]) of {len(self)}"

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self._bytes.nbytes + self._offsets.nbytes

    def take(self, rows: Iterable[int] | NDArray[Any]) -> Texts:
        """The texts of some rows, in the order of `rows`.

        Args:
            rows: (M,) integers, or a (N,) mask of bools.
        """
        places = _positions(rows, len(self))
        starts, lengths = self._offsets[places], np.diff(self._offsets)[places]
        texts = Texts()
        texts._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # A block at a time, because every byte of text needs a position of eight bytes here.
        blocks = [np.zeros(0, np.uint8)]
        for first in range(0, len(places), _BLOCK):
            block = slice(first, first + _BLOCK)
            within = np.arange(lengths[block].sum())
            before = np.cumsum(lengths[block]) - lengths[block]
            blocks.append(self._bytes[np.repeat(starts[block] - before, lengths[block]) + within])
        texts._bytes = np.concatenate(blocks)
        return texts

    def codes(self) -> tuple[IntArray, list[str]]:
        """Each row's place among the sorted distinct texts, (N,), and those texts."""
        places: dict[str, int] = {}
        codes = np.fromiter((places.setdefault(value, len(places)) for value in self), np.int64, len(self))
        names = sorted(places)
        order = np.empty(len(names), np.int64)
        for place, name in enumerate(names):
            order[places[name]] = place
        return (order[codes] if len(codes) else codes), names

    def digest(self) -> str:
        """A hash of the texts, in hexadecimal."""
        return hashlib.blake2b(self._offsets.tobytes() + self._bytes.tobytes(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker process: arrays as tensors, which processes share instead of copying."""
        return share_arrays(self.__dict__)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restores the arrays."""
        self.__dict__.update(unshare_arrays(state))


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Rows of image files: their paths, their classes, and further columns.

    Args:
        root: folder that relative paths start from.
        paths: (N,) paths of the images, relative to `root` or absolute.
        labels: (N,) int64 classes; -1 is a distractor, which matches nothing.
        boxes: (N, 4) int32 of x_1, y_1, x_2, y_2 in pixels, the last two past the edge; the part of the image to use.
        is_query: (N,) bool, evaluation roles; None means that every row is both.
        is_gallery: (N,) bool, likewise.
        groups: (N,) int64 camera or sequence of each row; negative means none.
        super_labels: (N,) int64 coarser classes.
        rows: (N,) int64 row of each in the table that these were taken from, where something else counts in those.
        extra: further columns by name, (N,) each.

    Raises:
        InputError: if a column has another length or shape than the paths ask for.

    Examples:
        >>> table = ImageTable(Path("images"), Texts(["a.jpg", "b.jpg"]), np.array([0, 1]))
        >>> len(table.take([1])), table.path(1).name
        (1, 'b.jpg')
    """

    root: Path
    paths: Texts
    labels: IntArray
    boxes: NDArray[np.int32] | None = None
    is_query: BoolArray | None = None
    is_gallery: BoolArray | None = None
    groups: IntArray | None = None
    super_labels: IntArray | None = None
    rows: IntArray | None = None
    extra: Mapping[str, Texts | NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the names and the lengths."""
        if names := sorted({own.name for own in fields(self)} & set(self.extra)):
            raise InputError(f"extra must not have a column {names[0]!r}, which the table has itself: rename it")
        for name, column in self._columns().items():
            expected = (len(self), 4) if name == "boxes" else (len(self),)
            shape = (len(column),) if isinstance(column, Texts) else column.shape
            if shape != expected:
                raise InputError(f"{name} must have the shape {expected}, a row for each path, got {shape}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def path(self, row: int) -> Path:
        """Path of the image of a row."""
        return self.root / self.paths[row]

    def take(self, rows: Iterable[int] | NDArray[Any]) -> ImageTable:
        """Table of some rows, in the order of `rows`: (M,) integers or a (N,) mask of bools."""
        places = _positions(rows, len(self))
        columns = {
            name: column.take(places) if isinstance(column, Texts) else column[places]
            for name, column in self._columns().items()
        }
        extra = {name: columns.pop(name) for name in self.extra}
        return replace(self, **columns, extra=extra)  # type: ignore[arg-type]

    def with_labels(self, labels: NDArray[Any]) -> ImageTable:
        """Table of the same rows with other classes, (N,) integers."""
        return replace(self, labels=np.asarray(labels, np.int64))

    def digest(self) -> str:
        """A hash of the paths, labels, boxes and roles, but not of the root: the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        for name, column in sorted(self._columns().items()):
            if name != "rows":
                content = column.digest().encode() if isinstance(column, Texts) else column.tobytes()
                digest.update(name.encode() + content)
        return digest.hexdigest()

    def _columns(self) -> dict[str, Any]:
        own = {
            own_field.name: getattr(self, own_field.name)
            for own_field in fields(self)
            if own_field.name not in ("root", "extra")
        }
        return {**{name: column for name, column in own.items() if column is not None}, **self.extra}

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker process: columns as tensors, which processes share instead of copying."""
        return {**share_arrays(self.__dict__), "extra": share_arrays(self.extra)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restores the columns."""
        self.__dict__.update({**unshare_arrays(state), "extra": unshare_arrays(state["extra"])})


_BLOCK = 65_536


def _positions(rows: Iterable[int] | NDArray[Any], count: int) -> IntArray:
    places = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
    if places.dtype == np.bool_:
        if places.shape != (count,):
            raise InputError(f"rows must be integers or a mask of {count} bools, got a mask of {places.shape}")
        return np.flatnonzero(places)
    if len(places) == 0:
        return np.zeros(0, np.int64)
    if places.min() < -count or places.max() >= count:
        raise InputError(f"rows must be less than {count}, got {places.max()}")
    return places.astype(np.int64) % count
