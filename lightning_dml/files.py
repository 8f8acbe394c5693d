"""Writing files whole or not at all, and one process at a time."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from lightning_dml.errors import InputError


class UnwritableFile(InputError, OSError):
    """A file that cannot be written: no rights, no room, or no such place."""


def write_whole(path: Path, write: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file aside and puts it in its place when it is complete and on the disk.

    A reader sees the old file or the new one, never a part, whatever is killed. Two processes may write the same file:
    each has a part of its own, and the later one's file stays. A symbolic link stays one, and its target is replaced.

    Args:
        path: the file; its folder is made where it is missing.
        write: a text, which is written as UTF-8, bytes, or a function that writes a file at the path that it is given.
            That path has the suffix of `path`.

    Raises:
        UnwritableFile: an InputError and an OSError; if the system refuses to write. An older file is then as it was.
    """
    with replacing(path) as aside:
        if isinstance(write, str):
            aside.write_text(write, encoding="utf-8")
        elif isinstance(write, bytes):
            aside.write_bytes(write)
        else:
            write(aside)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and renames what was written there to `path` unless the block raises.

    Raises:
        UnwritableFile: see `write_whole`.
    """
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.stem}.{uuid.uuid4().hex}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _flush(aside)
        os.replace(aside, target)
    except UnwritableFile:
        raise
    except OSError as error:
        raise UnwritableFile(
            f"{path} cannot be written ({error.strerror or error}): make room there, or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def delete_parts(path: Path, stems: str | None = None) -> None:
    """Deletes what killed processes left of their attempts to write `path`; call it while no process may write it.

    Args:
        path: the file.
        stems: regular expression of the stems of all files in the folder whose parts to delete; None is that of `path`.
    """
    target = Path(os.path.realpath(path))
    part = re.compile(rf"\.({stems or re.escape(target.stem)})\.[0-9a-f]{{32}}\.part{re.escape(target.suffix)}")
    for entry in list(target.parent.iterdir()):
        if part.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process on this machine is in here with the same lock file.

    On a file system without locks, or where the lock file cannot be written, nobody waits: the block must be safe, if
    wasteful, in two processes at once, as `write_whole` is.

    Args:
        path: the lock file; its folder is made where it is missing.

    Raises:
        OSError: if that is impossible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _flush(path: Path) -> None:
    # Without it a crash of the machine may leave the new name with none of its bytes.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
