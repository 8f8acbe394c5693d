"""Archives that are whole, damaged and malicious."""

from __future__ import annotations

import errno
import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from lightning_dml.datamodules import disk, unpacking
from lightning_dml.datamodules.unpacking import unpack
from lightning_dml.errors import InputError

FILES = {"birds/list.txt": b"1 a.jpg\n", "birds/images/a.jpg": bytes(range(256)) * 3000, "birds/images/b.jpg": b""}


def tar_with(path: Path, *members: tarfile.TarInfo, files: dict[str, bytes] = FILES, mode: str = "w:gz") -> Path:
    """A tar file of `files` and of members without a body, in this order."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for member in members:
            tar.addfile(member, io.BytesIO(b"\0" * member.size))
    return path


def zip_with(path: Path, *members: zipfile.ZipInfo, files: dict[str, bytes] = FILES) -> Path:
    """A zip file of `files` and of members with a short body."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in files.items():
            file.writestr(name, body)
        for member in members:
            file.writestr(member, b"/etc/passwd")
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member of a tar file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def tree(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(path: Path, match: str, contents: str = "birds") -> None:
    """Unpacks an archive that must be refused, and checks that nothing at all is left of it."""
    folder = path.parent / "out"
    with pytest.raises(InputError, match=match) as caught:
        unpack(path, folder, contents, progress=False)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    assert sorted(each.name for each in path.parent.iterdir()) == sorted({path.name, "out"})


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_a_whole_archive_is_unpacked_under_its_name(mode: str, tmp_path: Path) -> None:
    """Every byte must arrive, whatever the compression, and nothing else must be left behind."""
    files = {**FILES, "attributes.txt": b"beside"}
    path = tmp_path / "archive"  # the kind is known by the bytes, not by the name
    made = zip_with(path, files=files) if mode == "zip" else tar_with(path, files=files, mode=mode)
    assert unpack(made, tmp_path / "out", "birds", progress=False) == tmp_path / "out" / "birds"
    assert tree(tmp_path / "out") == FILES
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["birds"]


def test_names_may_begin_with_a_dot_and_folders_may_be_empty(tmp_path: Path) -> None:
    """`tar c .` writes such names, and an empty folder may be a class that is asked for later."""
    members = [member("./", tarfile.DIRTYPE), member("./birds/empty", tarfile.DIRTYPE), member("./birds/a", size=3)]
    path = tar_with(tmp_path / "a.tar", *members, files={}, mode="w")
    target = unpack(path, tmp_path / "out", "birds", progress=False)
    assert (target / "empty").is_dir() and (target / "a").read_bytes() == b"\0\0\0"


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    """A data set may name an image twice; the check of links must not refuse those that do no harm."""
    links = [
        member("birds/first", tarfile.SYMTYPE, "images/a.jpg"),
        member("birds/images/up", tarfile.SYMTYPE, "../list.txt"),
        member("birds/second.jpg", tarfile.LNKTYPE, "birds/images/a.jpg"),
    ]
    target = unpack(tar_with(tmp_path / "a.tgz", *links), tmp_path, "birds", progress=False)
    assert (target / "first").is_symlink() and (target / "first").read_bytes() == FILES["birds/images/a.jpg"]
    assert (target / "images/up").read_bytes() == FILES["birds/list.txt"]
    assert (target / "second.jpg").read_bytes() == FILES["birds/images/a.jpg"]


ABSOLUTE, UP = "outside of the folder", "outside of the folder"
MALICIOUS: dict[str, tuple[list[tarfile.TarInfo], str]] = {
    "absolute": ([member("/birds/x")], ABSOLUTE),
    "drive": ([member("C:/birds/x")], ABSOLUTE),
    "up": ([member("birds/../../x")], UP),
    "up, other slash": ([member("birds\\..\\..\\x")], UP),
    "up beside the contents": ([member("../x")], UP),
    "empty name": ([member(".")], UP),
    "link, absolute": ([member("birds/l", tarfile.SYMTYPE, "/etc/passwd")], "'birds/l' is a link to '/etc/passwd'"),
    "link, up": ([member("birds/l", tarfile.SYMTYPE, "../x")], "outside its folder"),
    "link, up behind a name": ([member("birds/l", tarfile.SYMTYPE, "images/../../x")], "outside its folder"),
    "link in place of the contents": ([member("birds", tarfile.SYMTYPE, "elsewhere")], "written through a link"),
    "written through a link": (
        [member("birds/l", tarfile.SYMTYPE, "images"), member("birds/l/x")],
        "'birds/l/x' is written through a link",
    ),
    "written over a link": (
        [member("birds/l", tarfile.SYMTYPE, "images/c"), member("birds/l")],
        "'birds/l' is written through a link",
    ),
    "chain of links": (
        [member("birds/l", tarfile.SYMTYPE, "images"), member("birds/l/m", tarfile.SYMTYPE, "../list.txt")],
        "'birds/l/m' is written through a link",
    ),
    "hard link, absolute": ([member("birds/h", tarfile.LNKTYPE, "/etc/passwd")], "no file before it"),
    "hard link, up": ([member("birds/h", tarfile.LNKTYPE, "../x")], "no file before it"),
    "hard link to a link": (
        [member("birds/l", tarfile.SYMTYPE, "images"), member("birds/h", tarfile.LNKTYPE, "birds/l")],
        "no file before it",
    ),
    "device": ([member("birds/null", tarfile.CHRTYPE)], "'birds/null' is a device"),
    "pipe": ([member("birds/pipe", tarfile.FIFOTYPE)], "is a device or a pipe"),
    "file twice": ([member("birds/list.txt")], "cannot write"),
    "file in a file": ([member("birds/list.txt/x")], "cannot write"),
}


@pytest.mark.parametrize("case", MALICIOUS)
@pytest.mark.parametrize("own_filter", [True, False])
def test_a_malicious_tar_is_refused(
    case: str, own_filter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive from the network must not write, or let anybody read, outside of its folder, on any Python."""
    if not own_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    members, match = MALICIOUS[case]
    refused(tar_with(tmp_path / "a.tgz", *members), match)
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no filter of its own")
def test_the_filter_of_python_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's filter is mended when somebody finds a new trick, so its no must count."""

    def filter_all(info: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        raise tarfile.SpecialFileError(info)

    monkeypatch.setattr(tarfile, "data_filter", filter_all)
    refused(tar_with(tmp_path / "a.tgz"), "'birds/list.txt' is not safe")


def zip_member(name: str, mode: int = stat.S_IFREG) -> zipfile.ZipInfo:
    """A member of a zip file that was made on Unix."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o644) << 16
    return info


@pytest.mark.parametrize(
    ("info", "match"),
    [
        (zip_member("/birds/x"), "outside of the folder"),
        (zip_member("birds/../../x"), "outside of the folder"),
        (zip_member("birds\\..\\..\\x"), "outside of the folder"),
        (zip_member("C:\\x"), "outside of the folder"),
        (zip_member("birds/l", stat.S_IFLNK), "'birds/l' is a link"),
        (zip_member("birds/d", stat.S_IFCHR), "is a link, a device"),
        (zip_member("birds/list.txt"), "cannot write"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_malicious_zip_is_refused(info: zipfile.ZipInfo, match: str, tmp_path: Path) -> None:
    """The same for zip files, whose links would otherwise become files with a path in them."""
    refused(zip_with(tmp_path / "a.zip", info), match)
    assert not (tmp_path.parent / "x").exists()


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    """Without the password there is nothing to unpack, and zipfile's own error does not name the file."""
    path = zip_with(tmp_path / "a.zip", files={"birds/a": b"x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "'birds/a' is encrypted")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
@pytest.mark.parametrize("share", [0.0005, 0.3, 0.7, 0.999])
def test_a_cut_archive_is_refused(mode: str, share: float, tmp_path: Path) -> None:
    """For tarfile a cut between two members is the end, and a data set without its last classes looks whole."""
    files = {f"birds/{number}.bin": bytes([number]) * 1024 for number in range(40)}
    path = tmp_path / "a"
    made = zip_with(path, files=files) if mode == "zip" else tar_with(path, files=files, mode=mode)
    data = made.read_bytes()
    if mode == "w":  # a plain tar ends with many zeros; cut it before them, between members
        data = data[: 40 * 1536]
        data = data[: int(len(data) * share) // 1536 * 1536] if share != 0.999 else data
    else:
        data = data[: int(len(data) * share)]
    made.write_bytes(data)
    refused(made, "damaged or cut off")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_flipped_bit_is_found(kind: str, tmp_path: Path) -> None:
    """The archives carry checksums of their own; they matter where none is published."""
    body = bytes((number * 7919) % 251 for number in range(50_000))
    path = tmp_path / "a"
    made = (zip_with if kind == "zip" else tar_with)(path, files={"birds/a": body, "birds/b": body})
    data = bytearray(made.read_bytes())
    data[len(data) // 4] ^= 16
    made.write_bytes(data)
    refused(made, "damaged")


def test_a_broken_header_is_not_the_end(tmp_path: Path) -> None:
    """In silence tarfile stops at a header that makes no sense, and the rest of the data would be missing."""
    path = tar_with(tmp_path / "a.tar", files={f"birds/{n}": b"x" * 512 for n in range(4)}, mode="w")
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"\xff" * 512
    path.write_bytes(data)
    refused(path, "damaged or cut off")


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    """A page of a login that was saved under the archive's name is the commonest of all."""
    path = tmp_path / "a.tgz"
    path.write_text("<html>Please log in</html>")
    refused(path, "neither tar nor zip")
    with pytest.raises(InputError, match="is not a file"):
        unpack(tmp_path / "none.zip", tmp_path / "out", "birds", progress=False)


@pytest.mark.parametrize("contents", ["", ".", "..", "a/b", "/tmp"])
def test_contents_is_a_plain_name(contents: str, tmp_path: Path) -> None:
    """A path would be written, and removed, somewhere else than beside the archive."""
    with pytest.raises(InputError, match="contents must be the plain name"):
        unpack(tar_with(tmp_path / "a.tgz"), tmp_path / "out", contents, progress=False)


def test_an_archive_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    """Whoever put the wrong archive there by hand must see which one it is."""
    refused(tar_with(tmp_path / "a.tgz"), r"no folder 'cars': it holds 'birds'", contents="cars")
    many = {f"f{number}": b"" for number in range(8)}
    refused(zip_with(tmp_path / "a.tgz", files=many), "'f4' and 3 more", contents="cars")
    refused(tar_with(tmp_path / "a.tgz", files={"birds": b"a file"}), "no folder 'birds'")
    refused(tar_with(tmp_path / "a.tgz", files={}), "it holds nothing")


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that claim to be terabytes would fill the disk of a whole group."""
    monkeypatch.setattr(unpacking, "_ABSURD_BYTES", 10**6)
    bomb = tar_with(tmp_path / "a.tgz", member("birds/zeros", size=3 * 10**6), files={})
    assert bomb.stat().st_size < 3 * 10**3 * 1.2
    monkeypatch.setattr(unpacking, "_ABSURD_RATIO", 500)
    refused(bomb, "would unpack to more than")
    monkeypatch.setattr(unpacking, "_ABSURD_BYTES", 10**7)  # a small one may be as dense as it likes
    assert unpack(bomb, tmp_path / "out", "birds", progress=False).is_dir()


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of unpacking must not end with a full disk that was full from the start."""
    needed = sum(map(len, FILES.values()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    refused(tar_with(tmp_path / "a.tgz"), f"has {needed - 1:,} bytes free, and unpacking a.tgz needs {needed:,}")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    assert unpack(tmp_path / "a.tgz", tmp_path / "out", "birds", progress=False).is_dir()


def test_a_disk_that_fills_up_keeps_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write to the disk meanwhile; what was unpacked must go, or it fills the disk for them as well."""
    monkeypatch.setattr(unpacking, "write_all", full_after(1, disk.write_all))
    refused(tar_with(tmp_path / "a.tgz"), r"no space is left for .*a\.jpg: 768,000 more bytes are needed")


def full_after(calls: int, write: Callable[[BinaryIO, bytes], None]) -> Callable[[BinaryIO, bytes], None]:
    """`write`, to a disk that is full after so many calls."""
    done: list[Any] = []

    def filling(file: BinaryIO, data: bytes) -> None:
        done.append(None)
        if len(done) > calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    return filling


def test_what_is_there_is_not_unpacked_again(tmp_path: Path) -> None:
    """A folder under the final name is whole by construction, and people may have added to it."""
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "own.txt").write_text("mine")
    unpack(tmp_path / "no.zip", tmp_path, "birds", progress=False)
    assert tree(tmp_path / "birds") == {"own.txt": b"mine"}


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as large as the data set, and nobody looks for hidden folders."""
    path, others = tar_with(tmp_path / "a.tgz"), {".cars.x1y2z3_4.part", ".birds.v2.x1y2z3_4.part"}
    for each in others:  # of other data sets, which may be at work
        (tmp_path / each).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed
        patch.setattr(unpacking, "write_all", full_after(1, disk.write_all))
        with pytest.raises(InputError, match="no space"):
            unpack(path, tmp_path, "birds", progress=False)
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    unpack(path, tmp_path, "birds", progress=False)
    assert {each.name for each in tmp_path.iterdir()} == {*others, "a.tgz", "birds"}
