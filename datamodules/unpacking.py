"""Archives that come from elsewhere, unpacked whole and inside one folder, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import closing
from pathlib import Path, PureWindowsPath

from lightning_dml.datamodules.archive_readers import (
    Member,
    Parts,
    TarReader,
    ZipReader,
    open_archive,
    reading,
    refusal,
    relative_parts,
)
from lightning_dml.datamodules.disk import byte_bar, check_space, explained, locked, write_all
from lightning_dml.errors import InputError

_BLOCK = 1 << 20  # bytes read at a time
_ABSURD_RATIO = 1_000
_ABSURD_BYTES = 100 * 10**9
_SHOWN = 5  # names of what else an archive holds


def unpack(archive_path: Path, folder: Path, contents: str, progress: bool = True) -> Path:
    """Unpacks the folder `contents` of a tar (plain, gzip, bzip2, xz) or zip file to `folder / contents`.

    It is written under another name and renamed when it is whole, so what has the final name is whole; a folder of
    that name which is there already is returned as it is. Names, links and kinds of all members are checked before the
    first is written. What the archive holds beside `contents` is left in it. Files get the permissions and
    times of new ones. Links are taken from tar files only. What runs that were killed have left is removed.

    Args:
        archive_path: the archive.
        folder: where `contents` goes; made where it is missing.
        contents: the name of a folder at the top of the archive.
        progress: show a bar where there is a terminal.

    Returns:
        `folder / contents`.

    Raises:
        InputError: for an archive that is missing, damaged or cut off; that has no such folder; that has a member
            which would be written outside of it, links to the outside or is neither file, folder nor link; that would
            be absurdly large; without room on the disk.
    """
    check_contents(contents)
    archive_path, folder = Path(archive_path), Path(folder)
    target = folder / contents
    with locked(folder / f".{contents}.lock"):
        if target.is_dir():
            return target
        for each in folder.iterdir():
            if re.fullmatch(rf"\.{re.escape(contents)}\.[^.]+\.part", each.name):
                shutil.rmtree(each, ignore_errors=True)
        with explained(target):
            temporary = Path(tempfile.mkdtemp(prefix=f".{contents}.", suffix=".part", dir=folder))
        try:
            _unpack(archive_path, temporary, contents, progress)
            with explained(target):
                os.rename(temporary / contents, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_contents(contents: str) -> None:
    """Raises unless `contents` is the plain name of a folder.

    Raises:
        InputError: naming it.
    """
    if contents in ("", ".", "..") or set(contents) & set("/\\\0"):
        raise InputError(f"contents must be the plain name of a folder in the archive, got {contents!r}")


def _unpack(archive_path: Path, temporary: Path, contents: str, progress: bool) -> None:
    with closing(open_archive(archive_path)) as reader:
        members = _checked(reader, contents)
        left = sum(member.size for member in members)
        check_space(temporary, left, f"unpacking {archive_path.name}")
        made: set[Path] = set()
        with byte_bar(contents, left, 0, progress) as bar:
            for member in members:
                path = temporary.joinpath(*member.parts)
                parent = path if member.kind == "folder" else path.parent
                with explained(path, left, _GONE):
                    if parent not in made:
                        parent.mkdir(parents=True, exist_ok=True)
                        made.add(parent)
                    if member.kind == "link":
                        os.symlink(member.link, path)
                    elif member.kind == "hard link":
                        # A copy: not every disk has hard links, and nobody expects two images to change together.
                        shutil.copyfile(temporary.joinpath(*(relative_parts(member.link) or ())), path)
                if member.kind == "file":
                    _copy(reader, member, path, left)
                left -= member.size
                bar.update(member.size)


_GONE = "what was unpacked is removed"


def _copy(reader: TarReader | ZipReader, member: Member, path: Path, left: int) -> None:
    with reading(reader.path):
        source = reader.open(member)
    with explained(path, left, _GONE):
        # Exclusively: a member of the same name would otherwise write through a link that an earlier one has made.
        file = open(path, "xb", buffering=0)
    written = 0
    with source, file:
        while True:
            with reading(reader.path):
                block = source.read(_BLOCK)
            if not block:
                break
            with explained(path, left - written, _GONE):
                write_all(file, block)
            written += len(block)
    if written != member.size:
        raise InputError(f"archive {reader.path} is damaged: {member.name!r} has {written} of {member.size} bytes")


def _checked(reader: TarReader | ZipReader, contents: str) -> list[Member]:
    """The members that belong to `contents`, after a look at all."""
    total, packed = 0, reader.path.stat().st_size
    found: list[Member] = []
    for member in reader.members():
        total += member.size
        # Here and not after the loop, because a tar file is decompressed to find its members.
        if total > _ABSURD_BYTES and total > _ABSURD_RATIO * packed:
            raise InputError(f"archive {reader.path} of {packed:,} bytes would unpack to more than {total:,}: refused")
        found.append(member)
    _check_links(found, reader.path)
    for member in found:
        reader.second_opinion(member)
    if not any(each.parts[0] == contents and (len(each.parts) > 1 or each.kind == "folder") for each in found):
        tops = sorted({each.parts[0] for each in found})
        shown = ", ".join(map(repr, tops[:_SHOWN])) + (f" and {len(tops) - _SHOWN} more" if len(tops) > _SHOWN else "")
        raise InputError(f"archive {reader.path} has no folder {contents!r}: it holds {shown or 'nothing'}")
    return [each for each in found if each.parts[0] == contents]


def _check_links(members: list[Member], archive_path: Path) -> None:
    """Raises for a link that leaves its top folder, and for a member that lies behind a link.

    With nothing behind a link and no `..` behind a name, where a link leads can be read off its text.
    """
    files: set[Parts] = set()
    # Without case, because on some disks A and a are one file.
    links = {tuple(part.casefold() for part in each.parts) for each in members if each.kind == "link"}
    for member in members:
        parts = tuple(part.casefold() for part in member.parts)
        for length in range(1, len(parts) + (member.kind != "link")) if links else ():
            if parts[:length] in links:
                raise refusal(archive_path, member.name, "is written through a link")
        if member.kind == "file":
            files.add(member.parts)
        elif member.kind == "hard link":
            aim = relative_parts(member.link)
            if aim is None or aim[:1] != member.parts[:1] or aim not in files:
                raise refusal(archive_path, member.name, f"is a link to {member.link!r}, no file before it")
        elif member.kind == "link" and not _stays_inside(member):
            raise refusal(archive_path, member.name, f"is a link to {member.link!r}, outside its folder")


def _stays_inside(member: Member) -> bool:
    aim = PureWindowsPath(member.link)
    up = 0
    while up < len(aim.parts) and aim.parts[up] == "..":
        up += 1
    return not (aim.drive or aim.root or ".." in aim.parts[up:] or up >= len(member.parts) - 1)
