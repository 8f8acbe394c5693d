"""Archives that have the published checksum, and are damaged or malicious all the same."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from lightning_dml.datamodules import downloads
from lightning_dml.datamodules.downloads import obtain
from tests.datamodules.archive_cases import (
    DAMAGED,
    MALICIOUS_TAR,
    MALICIOUS_ZIP,
    archive_of,
    fails,
    member,
    names,
    tar_with,
    tree,
    zip_with,
)


def refused(data: bytes, folder: Path, match: str, contents: str = "birds", filename: str = "set.tgz") -> None:
    """Obtains an archive with the right checksum that must not be unpacked, and checks that nothing came of it."""
    folder = folder / "in"
    folder.mkdir()
    (folder / filename).write_bytes(data)
    fails(archive_of(data, filename=filename), folder, match, contents)
    assert names(folder) == {filename, f".{filename}.lock"} and (folder / filename).read_bytes() == data
    assert names(folder.parent) == {"in"}


@pytest.mark.parametrize("case", MALICIOUS_TAR)
def test_a_malicious_tar_is_refused(case: str, tmp_path: Path) -> None:
    """An archive from the network must not write, or let anybody read, outside of its folder."""
    members, match = MALICIOUS_TAR[case]
    refused(tar_with(*members), tmp_path, match)


def test_the_filter_of_python_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's filter is mended when somebody finds a new trick, so its no must count."""

    def filter_all(info: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        raise tarfile.SpecialFileError(info)

    monkeypatch.setitem(tarfile._NAMED_FILTERS, "data", filter_all)  # type: ignore[attr-defined]
    refused(tar_with(), tmp_path, r"damaged or unsafe \('birds/list.txt' is a special file")


@pytest.mark.parametrize(("info", "match"), MALICIOUS_ZIP)
def test_a_malicious_zip_is_refused(info: zipfile.ZipInfo, match: str, tmp_path: Path) -> None:
    """The same for zip files, whose links would otherwise become files with a path in them."""
    refused(zip_with(info), tmp_path, match, filename="set.zip")


@pytest.mark.parametrize("filename", DAMAGED)
def test_a_damaged_archive_is_refused(filename: str, tmp_path: Path) -> None:
    """The checksum finds damage on the way, and the readers what was published so."""
    data, match = DAMAGED[filename]
    refused(data, tmp_path, match, filename=filename)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that claim to be terabytes would fill the disk of a whole group."""
    monkeypatch.setattr(downloads, "_LARGEST", 10**6)
    refused(tar_with(member("birds/zeros", size=10**6 + 1)), tmp_path, "would unpack to more than 1,000,000 bytes")


@pytest.mark.parametrize("files", [{"birds": b"a file"}, {"cars/a.jpg": b""}, {}])
def test_an_archive_of_something_else_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    """A folder that is asked for and not there must not look like a finished download."""
    refused(tar_with(files=files), tmp_path, "has no folder 'birds'")


def test_names_may_begin_with_a_dot_and_files_are_as_new(tmp_path: Path) -> None:
    """`tar c .` writes such names; and members of a group can read what one of them has unpacked."""
    private = member("./birds/a", size=3)
    private.mode, private.mtime = 0o400, 1
    data = tar_with(member("./", tarfile.DIRTYPE), member("./birds/empty", tarfile.DIRTYPE), private, files={})
    (tmp_path / "set.tgz").write_bytes(data)
    before = os.umask(0o002)
    try:
        target = obtain(archive_of(data), tmp_path, "birds")
    finally:
        os.umask(before)
    assert tree(target) == {"a": b"\0\0\0"} and (target / "empty").is_dir()
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o664 and (target / "a").stat().st_mtime > 10**9
    assert stat.S_IMODE((target / "empty").stat().st_mode) == stat.S_IMODE(target.stat().st_mode) == 0o775
