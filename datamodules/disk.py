"""What writing large files asks for: one process at a time, room on the disk, and errors that say what is missing."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_dml.errors import InputError

if sys.platform != "win32":
    import fcntl

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` for one process or thread at a time; the others wait, on other machines as well.

    The kernel gives the lock up with the process, however that ends, so nothing needs to be cleaned. Where the file
    system has no locks there is a warning and no lock; on Windows there is none.

    Raises:
        InputError: if the folder of `path` cannot be made or written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    descriptor = _acquire(path)
    try:
        yield
    finally:
        # While it is still held: whoever waits for it sees that the name is gone and starts again.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        with explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(descriptor, path)
            if _names(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("waiting for another process that holds %s", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"no lock on {path} ({error.strerror}): start only one process that writes there", stacklevel=2)


def _names(path: Path, descriptor: int) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises where the disk of `folder` has no room for `needed` bytes.

    Raises:
        InputError: naming both numbers of bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"folder {folder} has {free:,} bytes free, and {purpose} needs {needed:,}: free {needed - free:,} bytes or "
            "choose a folder on another disk"
        )


@contextmanager
def explained(path: Path, needed: int | None = None, left: str = "") -> Iterator[None]:
    """Turns an OSError of the work on `path` into one that says what to do.

    Args:
        path: what is written.
        needed: the bytes that are still to be written, where they are known.
        left: what becomes of the work so far, to end the message with.

    Raises:
        InputError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        ending = f"; {left}" if left else ""
        if error.errno in _FULL:
            room = "" if needed is None else f": {needed:,} more bytes are needed"
            raise InputError(f"no space is left for {path}{room}; free them and start again{ending}") from error
        raise InputError(
            f"cannot write {path} ({error.strerror or error}): make the folder writable or choose another{ending}"
        ) from error


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes every byte to a file without a buffer, which may take fewer than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def byte_bar(name: str, total: int | None, done: int, shown: bool) -> Any:
    """A tqdm bar that counts bytes, drawn only if `shown` and on a terminal."""
    return tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True, disable=None if shown else True)
