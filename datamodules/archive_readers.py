"""Tar and zip files as one kind of thing: members with checked names, and their bytes."""

from __future__ import annotations

import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO, Literal

from lightning_dml.errors import InputError

_BLOCK = 1 << 20  # bytes read at a time

Parts = tuple[str, ...]
Kind = Literal["file", "folder", "link", "hard link"]


@dataclass(frozen=True)
class Member:
    """Something in an archive: its name in parts, and for a link what it points to as the archive has it."""

    name: str
    parts: Parts
    kind: Kind
    size: int
    link: str
    source: tarfile.TarInfo | zipfile.ZipInfo


def open_archive(path: Path) -> TarReader | ZipReader:
    """Opens a tar file (plain, gzip, bzip2, xz) or a zip file, whatever its name.

    Raises:
        InputError: if it is missing, damaged or neither of the two.
    """
    if not path.is_file():
        raise InputError(f"archive_path {path} is not a file: download it first")
    with reading(path):
        try:
            return TarReader(path, tarfile.open(path))
        except tarfile.ReadError as error:
            if not zipfile.is_zipfile(path):
                raise tarfile.ReadError("neither tar nor zip, or without its end") from error
        return ZipReader(path, zipfile.ZipFile(path))


class TarReader:
    """Reads a tar file, compressed or not."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path = path
        self._tar = tar

    def members(self) -> Iterator[Member]:
        """The members; raises InputError for one outside of the folder that it will be unpacked to, or a device."""
        while True:
            with reading(self.path):
                info = self._tar.next()
            if info is None:
                break
            if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
                raise refusal(self.path, info.name, "is a device or a pipe")
            parts = _checked(info.name, info.isdir(), self.path)
            kind = _TAR_KINDS.get(info.type, "file")
            if parts:
                yield Member(info.name, parts, kind, info.size if kind == "file" else 0, info.linkname, info)
        self._check_end()

    def second_opinion(self, member: Member) -> None:
        """Asks Python's own filter as well, where it has one: it may know of what we do not.

        Raises:
            InputError: if the filter would not unpack the member.
        """
        if hasattr(tarfile, "data_filter"):
            try:
                tarfile.data_filter(_tar_info(member), str(self.path))
            except tarfile.FilterError as error:
                raise refusal(self.path, member.name, f"is not safe: {error}") from error

    def _check_end(self) -> None:
        """Raises where the mark of the end is missing: tarfile takes a cut or a broken header for the end."""
        with reading(self.path):
            file = self._tar.fileobj
            assert file is not None
            file.seek(self._tar.offset)
            mark = file.read(tarfile.BLOCKSIZE)
            if len(mark) < tarfile.BLOCKSIZE or mark.strip(b"\0"):
                raise tarfile.ReadError("it has no end")
            while file.read(_BLOCK):
                pass  # to the checksum at the end of the compressed stream

    def open(self, member: Member) -> IO[bytes]:
        """The bytes of a member that is a file."""
        source = self._tar.extractfile(_tar_info(member))
        assert source is not None
        return source

    def close(self) -> None:
        """Closes the archive."""
        self._tar.close()


def _tar_info(member: Member) -> tarfile.TarInfo:
    assert isinstance(member.source, tarfile.TarInfo)
    return member.source


_TAR_KINDS: dict[bytes, Kind] = {tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "hard link"}


class ZipReader:
    """Reads a zip file."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self.path = path
        self._zip = file

    def members(self) -> Iterator[Member]:
        """The members; raises InputError for one outside of the folder that it will be unpacked to, or a link."""
        for info in self._zip.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refusal(self.path, info.filename, "is a link, a device or a pipe")
            if info.flag_bits & 1:
                raise refusal(self.path, info.filename, "is encrypted")
            parts = _checked(info.filename, info.is_dir(), self.path)
            kind: Kind = "folder" if info.is_dir() else "file"
            if parts:
                yield Member(info.filename, parts, kind, 0 if kind == "folder" else info.file_size, "", info)

    def open(self, member: Member) -> IO[bytes]:
        """The bytes of a member that is a file."""
        assert isinstance(member.source, zipfile.ZipInfo)
        return self._zip.open(member.source)

    def second_opinion(self, member: Member) -> None:
        """Nothing: Python has no filter for zip files."""

    def close(self) -> None:
        """Closes the archive."""
        self._zip.close()


def _checked(name: str, is_folder: bool, path: Path) -> Parts:
    parts = relative_parts(name)
    if parts is None or not (parts or is_folder):
        raise refusal(path, name, "would be written outside of the folder")
    return parts


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the readers raise for a damaged archive into one error."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, *_OTHERS) as error:
        raise InputError(
            f"archive {path} is damaged or cut off ({error or type(error).__name__}): delete it and fetch it again"
        ) from error


# What the readers also let through: EOFError for a cut stream, OSError for a broken one, RuntimeError with its
# NotImplementedError for a method of compression that they lack, and the rest for headers that make no sense.
_OTHERS = (EOFError, OSError, RuntimeError, KeyError, ValueError, OverflowError, struct.error)


def relative_parts(name: str) -> Parts | None:
    """The parts of a relative path inside a folder, None for any other; with both kinds of slashes, on any system.

    Examples:
        >>> relative_parts("./birds/a.jpg"), relative_parts("../a.jpg"), relative_parts("C:/a.jpg")
        (('birds', 'a.jpg'), None, None)
    """
    path = PureWindowsPath(name)
    if path.drive or path.root or ".." in path.parts or "\0" in name:
        return None
    return path.parts


def refusal(archive_path: Path, name: str, fault: str) -> InputError:
    """The error for a member that must not be unpacked."""
    return InputError(f"archive {archive_path} is not unpacked: its member {name!r} {fault}")
