"""The file of an image cache: a description in JSON, then where each picture lies, then the pictures."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.errors import InputError

if sys.platform != "win32":
    import fcntl

FORMAT = 1  # raise it with any change to the layout, or to the pixels

_MAGIC = b"dml-imgs"
_HEAD = struct.Struct("<8sII16s")  # magic, format, bytes of JSON, and a hash of the JSON and the tables
_ALIGNED = 64


@dataclass(frozen=True, eq=False)
class CacheFile:
    """A cache file in memory: the arrays are views of the mapped file, so that rows cost no objects.

    Args:
        about: the description that it was written with.
        data: the whole file, uint8.
        offsets: (N + 1,) int64, where each picture begins in `data`; the last is the end of the file.
        sizes: (N, 2) int32, width and height of each.
    """

    about: dict[str, Any]
    data: NDArray[np.uint8]
    offsets: IntArray
    sizes: NDArray[np.int32]


def write_cache(file: BinaryIO, about: dict[str, Any], pictures: Iterator[tuple[bytes, tuple[int, int]]]) -> None:
    """Writes a cache of as many pictures as `about["rows"]` says.

    Args:
        file: empty, and can be sought in.
        about: `rows` and whatever else JSON holds.
        pictures: the bytes of each, and its width and height.
    """
    text, rows = json.dumps(about, sort_keys=True).encode(), about["rows"]
    offsets, sizes = np.zeros(rows + 1, "<i8"), np.zeros((rows, 2), "<i4")
    tables = _after_text(len(text))
    offsets[0] = tables + offsets.nbytes + sizes.nbytes
    # The tables are known last. Zeros stand in their place until then, so that a file that is cut short shows.
    file.seek(int(offsets[0]))
    for row, (data, size) in enumerate(pictures):
        file.write(data)
        offsets[row + 1], sizes[row] = offsets[row] + len(data), size
    file.seek(0)
    file.write(_HEAD.pack(_MAGIC, FORMAT, len(text), _hash(text, offsets, sizes)) + text)
    file.seek(tables)
    file.write(offsets.tobytes() + sizes.tobytes())


def map_cache(path: Path) -> CacheFile:
    """Maps a cache file, and protects it from `delete_unused` for as long as the arrays live.

    Raises:
        InputError: if there is no such file, or it is of another format, cut off or damaged in its tables.
    """
    try:
        with open(path, "rb") as file:
            # Not filelock's: this lock is shared, many processes map one cache, and it must end with the mapping.
            if sys.platform != "win32":
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # The mapping has a copy of the descriptor, and with it the lock.
            data = np.asarray(np.memmap(file, np.uint8, "r"))
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise InputError(f"cannot open image cache {path}: {error}; build it anew") from error
    try:
        return _mapped(data)
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise InputError(f"image cache {path} is damaged ({error}); delete it, and it is built anew") from error


def read_about(path: Path) -> dict[str, Any] | None:
    """Reads the description in a cache file of any format; None if it is damaged there or gone."""
    try:
        with open(path, "rb") as file:
            magic, _, length, _ = _HEAD.unpack(file.read(_HEAD.size))
            about = json.loads(file.read(length)) if magic == _MAGIC else None
    except (OSError, ValueError, struct.error):
        return None
    return about if isinstance(about, dict) else None


def delete_unused(path: Path) -> None:
    """Deletes a cache file unless a process has it mapped, or it cannot be deleted."""
    with suppress(OSError):
        # Opened for writing, because NFS gives no exclusive lock otherwise.
        with open(path, "r+b") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _mapped(data: NDArray[np.uint8]) -> CacheFile:
    magic, version, length, digest = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if magic != _MAGIC or version != FORMAT:
        raise ValueError(f"it is not an image cache of format {FORMAT}")
    text = data[_HEAD.size : _HEAD.size + length].tobytes()
    about = json.loads(text)
    start, rows = _after_text(length), int(about["rows"])
    middle, end = start + 8 * (rows + 1), start + 8 * (rows + 1) + 8 * rows
    if rows < 0 or end > len(data):
        raise ValueError("it is cut off")
    offsets, sizes = data[start:middle].view("<i8"), data[middle:end].view("<i4").reshape(rows, 2)
    if _hash(text, offsets, sizes) != digest:
        raise ValueError("its tables do not match their hash")
    if offsets[-1] != len(data):
        raise ValueError(f"it has {len(data)} bytes instead of {offsets[-1]}")
    return CacheFile(about, data, offsets, sizes)


def _after_text(length: int) -> int:
    """Offset of the tables, a multiple of the size of their numbers."""
    return -(-(_HEAD.size + length) // _ALIGNED) * _ALIGNED


def _hash(text: bytes, offsets: NDArray[Any], sizes: NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(text, digest_size=16)
    digest.update(np.ascontiguousarray(offsets).data)
    digest.update(np.ascontiguousarray(sizes).data)
    return digest.digest()
