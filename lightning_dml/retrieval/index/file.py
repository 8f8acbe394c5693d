"""One file for a faiss index and its settings: complete or not there, and known to be whole when it is read."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import faiss

from lightning_dml.errors import InputError
from lightning_dml.files import replacing

# The stubs that some releases of faiss bring lack both callbacks.
_faiss: Any = faiss

_MAGIC = b"lightning-dml approximate index 1\n"
_TRAILER = struct.Struct("<QI")  # length of all that precedes it, and its CRC-32


def write_index(path: Path, settings: dict[str, Any], index: Any) -> None:
    """Writes settings, which JSON can hold, and a faiss index to one file, whole or not at all.

    Raises:
        UnwritableFile: if the system refuses to write.
    """
    with replacing(path) as aside, open(aside, "wb") as file:
        checked = _CheckedFile(file)
        checked.write(_MAGIC + json.dumps(settings).encode() + b"\n")
        # Through a callback, so that no second copy of an index of many gigabytes is made.
        faiss.write_index(index, _faiss.PyCallbackIOWriter(checked.write))
        file.write(_TRAILER.pack(checked.length, checked.sum))


def read_index(path: Path) -> tuple[dict[str, Any], Any]:
    """Settings and index of a file that `write_index` wrote.

    Raises:
        InputError: if there is no file, or it is not such a file, was cut off or is damaged.
    """
    if not path.is_file():
        raise InputError(f"there is no index file {path}; give one that ApproximateIndex.save wrote")
    with open(path, "rb") as file:
        checked = _CheckedFile(file)
        if checked.read(len(_MAGIC)) != _MAGIC:
            raise InputError(f"{path} is not an index file; give one that ApproximateIndex.save wrote")
        try:
            # Before faiss reads lengths from it and asks for as much memory.
            file.seek(-_TRAILER.size, os.SEEK_END)
            end = file.tell()
            length, total = _TRAILER.unpack(file.read())
            if length != end:
                raise ValueError("cut off")
            file.seek(len(_MAGIC))
            settings = json.loads(checked.readline())
            index = faiss.read_index(_faiss.PyCallbackIOReader(checked.read))
            if (checked.length, checked.sum) != (length, total):
                raise ValueError("changed")
        except Exception as error:  # arbitrary bytes raise any error
            raise InputError(f"{path} was cut off or is damaged; copy it again, or build and save the index") from error
    return settings, index


class _CheckedFile:
    """A file with the length and the checksum of the bytes that were written to it, or read from it, so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.length, self.sum = file, 0, 0

    def write(self, data: bytes) -> int:
        self._note(data)
        return self.file.write(data)

    def read(self, size: int) -> bytes:
        return self._note(self.file.read(size))

    def readline(self) -> bytes:
        return self._note(self.file.readline())

    def _note(self, data: bytes) -> bytes:
        self.length += len(data)
        self.sum = zlib.crc32(data, self.sum)
        return data
