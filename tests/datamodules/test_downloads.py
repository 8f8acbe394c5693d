"""Downloads from servers that cut, stall and lie, onto disks that are full, by processes that are killed."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest

from lightning_dml.datamodules import downloads
from lightning_dml.datamodules.downloads import CUB_200_2011, STANFORD_ONLINE_PRODUCTS, Archive, obtain
from lightning_dml.datamodules.image_files import ImagesDataModule
from lightning_dml.datamodules.official.cub import CUB200DataModule
from lightning_dml.datamodules.official.sop import SOPDataModule
from lightning_dml.errors import InputError
from tests.datamodules.archive_cases import (
    FILES,
    Remote,
    archive_of,
    fails,
    http_server,
    names,
    tar_with,
    tree,
    zip_with,
)
from tests.datamodules.replicas import make_cub, make_sop
from tests.helpers import start_processes

BESIDE = {"attributes.txt": b"beside"}  # CUB's archive has such a file at its top
LOCK, PART = ".set.tgz.lock", ".set.tgz.part"


@pytest.fixture
def web() -> Iterator[Remote]:
    """A web server that has an archive of `FILES`."""
    with http_server(tar_with()) as remote:
        yield remote


@pytest.fixture(autouse=True)
def no_waits_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow at once, and a proxy of the machine does not stand between the test and its server."""
    monkeypatch.setattr(downloads, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(("filename", "pack"), [("set.tgz", tar_with), ("set.zip", zip_with)])
def test_the_contents_come_whole_and_once(filename: str, pack: Callable[..., bytes], tmp_path: Path) -> None:
    """Every byte must arrive, nothing may lie beside it, and nobody needs the archive once it is unpacked."""
    with http_server(pack(files=FILES | BESIDE)) as remote:
        archive, folder = archive_of(remote.data, remote.url, filename=filename), tmp_path / "new" / "data"
        assert obtain(archive, folder, "birds") == folder / "birds"
        assert tree(folder) == FILES and names(folder) == {"birds"}
        assert obtain(archive, folder, "birds") == folder / "birds"
        assert len(remote.requests) == 1
        assert remote.requests[0]["Accept-Encoding"] == "identity"  # else a .tgz may come unpacked


OFFICIAL = [(CUB200DataModule, CUB_200_2011, make_cub), (SOPDataModule, STANFORD_ONLINE_PRODUCTS, make_sop)]


@pytest.mark.parametrize(("module", "published", "make"), OFFICIAL)
def test_the_official_sets_are_read_after_their_download(
    module: type[ImagesDataModule],
    published: Archive,
    make: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The archive's name, its kind and the folder in it must be those that the reader of the set expects."""
    assert re.fullmatch("sha256:[0-9a-f]{64}", published.checksum) and all(url[:4] == "http" for url in published.urls)
    folder, kind = make(tmp_path / "made"), {".zip": "zip", ".tgz": "gztar"}[Path(published.filename).suffix]
    data = Path(shutil.make_archive(str(tmp_path / "packed"), kind, folder.parent, folder.name)).read_bytes()
    with http_server(data) as remote:
        local = replace(archive_of(data, remote.url), name=published.name, filename=published.filename)
        for name in ("CUB_200_2011", "STANFORD_ONLINE_PRODUCTS"):
            monkeypatch.setattr(f"{module.__module__}.{name}", local, raising=False)
        options: dict[str, Any] = {"download": True, "check_counts": False, "check_images": "none", "num_workers": 0}
        made = module(tmp_path / "data", classes_per_batch=2, samples_per_class=2, **options)
        made.prepare_data()
        made.setup("fit")
        assert tree(tmp_path / "data") == tree(tmp_path / "made") and len(remote.requests) == 1


@pytest.mark.parametrize("fault", [("cut", 1000), ("cut", 0), ("stall", 1000), ("status", 404), ("status", 500)])
def test_a_broken_transfer_leaves_nothing(
    fault: tuple[str, int], web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an archive must never have its name, and the error must say how to go on without us."""
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.3)
    folder = tmp_path / "my data"
    archive = archive_of(web.data, web.url)
    web.faults = [fault] * 3
    text = fails(archive, folder, rf"cannot download the set from {web.url} \(.+\): try again later, or fetch it")
    path = folder / "set.tgz"
    assert f"(curl -L -C - -o '{path}' {web.url}, or a browser), put it at {path} and start again" in text
    assert names(folder) == {LOCK} and len(web.requests) == 3
    web.faults = [fault] * 2  # what passes is tried again
    assert tree(obtain(archive, folder, "birds").parent) == FILES


def test_the_attempts_are_spaced(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is busy must get time to recover."""
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    web.faults = [("status", 503)] * 3
    fails(archive_of(web.data, web.url), tmp_path, "503")
    assert waits == [0, 2, 10]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:-1] + b"x", "SHA256 hash of downloaded file"),
        (lambda data: data[:-1], "SHA256 hash of downloaded file"),
        (lambda data: data + b"x", "has more than the expected [0-9,]+ bytes"),
        (lambda data: b"<html>moved</html>", "SHA256 hash of downloaded file"),
        (lambda data: b"", "SHA256 hash of downloaded file"),
    ],
)
def test_other_bytes_are_refused(change: Callable[[bytes], bytes], match: str, web: Remote, tmp_path: Path) -> None:
    """Bytes that changed on their way must not be used, nor fetched again: the server would send the same."""
    archive = archive_of(web.data, web.url)
    web.data = change(web.data)
    assert "put it at" in fails(archive, tmp_path, match)
    assert names(tmp_path) == {LOCK} and len(web.requests) == 1


def test_the_next_place_is_tried(web: Remote, tmp_path: Path) -> None:
    """Hosts of data sets move, and abandoned names are bought by others, who answer with a page of theirs."""
    with http_server(b"buy this name") as other:
        archive = archive_of(web.data, other.url, web.url)
        assert obtain(archive, tmp_path / "a", "birds").is_dir()
        web.faults = [("status", 403)] * 3
        fails(archive, tmp_path / "b", rf"from {other.url} \(SHA256 .*\); {web.url} \(403 ")


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    """Compute nodes often have no network, and a traceback would hide what to do about it."""
    with http_server() as remote:
        url = remote.url
    fails(archive_of(b"x", url), tmp_path, rf"cannot download the set from {url} \(.*refused.*by hand")


def test_redirects_are_followed_within_the_web_only(web: Remote, tmp_path: Path) -> None:
    """Archives are moved by redirects; one to a local file would read the user's own."""
    archive = archive_of(web.data, web.url)
    web.faults = [("redirect", web.url)]
    assert obtain(archive, tmp_path / "a", "birds").is_dir()
    (tmp_path / "secret").write_bytes(web.data)
    for target in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/secret"):
        web.faults = [("redirect", target)]
        fails(archive, tmp_path / "b", "No connection adapters")


def test_pooch_is_asked_for_by_its_extra(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there are two ways out, and the second works: a file that was fetched by hand needs no pooch."""
    monkeypatch.setitem(sys.modules, "pooch", None)
    archive = archive_of(web.data, web.url)
    fails(archive, tmp_path, rf"needs the package pooch: pip install 'lightning-dml\[data\]', or .* at {tmp_path}/set")
    (tmp_path / "set.tgz").write_bytes(web.data)
    assert tree(obtain(archive, tmp_path, "birds").parent) == FILES
    assert not web.requests


def test_an_archive_that_is_there_is_verified_and_used(web: Remote, tmp_path: Path) -> None:
    """A host may let no script in, so people fetch the archive by hand; what is not the archive is theirs to remove."""
    archive, path = archive_of(web.data, web.url), tmp_path / "set.tgz"
    for data, match in [
        (web.data[:1000], f"it has 1,000 bytes, expected {len(web.data):,}; delete it"),
        (bytes(len(web.data)), f"it has the checksum sha256:.* expected {archive.checksum}; delete it"),
    ]:
        path.write_bytes(data)
        fails(archive, tmp_path, rf"{path} is not the set: {match}")
        assert path.read_bytes() == data and names(tmp_path) == {"set.tgz", LOCK}
    path.unlink()
    path.mkdir()
    fails(archive, tmp_path, "it is not a file")
    path.rmdir()
    path.write_bytes(web.data)
    assert obtain(archive, tmp_path, "birds") == tmp_path / "birds"
    assert tree(tmp_path) == FILES and names(tmp_path) == {"birds"}
    assert not web.requests


def test_a_python_without_the_filter_is_refused(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early releases of Python 3.10 and 3.11 unpack whatever comes, and the download must not come before the no."""
    monkeypatch.delattr(tarfile, "data_filter")
    fails(archive_of(web.data, web.url), tmp_path / "data", r"of Python 3\.10\.12, 3\.11\.4 or later, got 3\..*take a")
    assert not web.requests and not (tmp_path / "data").exists()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    """A folder under the final name is whole by construction, and people may have added to it."""
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "own.txt").write_text("mine")
    assert obtain(archive_of(b"x"), tmp_path, "birds") == tmp_path / "birds"
    assert tree(tmp_path) == {"birds/own.txt": b"mine"} and names(tmp_path) == {"birds"}


@pytest.mark.parametrize(("terminal", "bars"), [(True, 2), (False, 0)])
def test_bars_are_for_terminals(
    terminal: bool,
    bars: int,
    web: Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gigabytes need a sign of life, which in the log of a job would be thousands of lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    obtain(archive_of(web.data, web.url), tmp_path, "birds")
    text = capsys.readouterr().err
    assert ("set.tgz: 100%" in text) + ("birds: 100%" in text) == bars


def test_room_is_asked_for_beforehand(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is known before the first byte is fetched, and before the first is unpacked."""
    archive, usage = archive_of(web.data, web.url), shutil.disk_usage(tmp_path)
    size, unpacked = len(web.data), sum(map(len, FILES.values()))

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))

    leave(size - 1)
    match = f"{tmp_path} has {size - 1:,} bytes free, and downloading the set needs {size:,}: free 1 bytes or choose"
    fails(archive, tmp_path, match)
    assert names(tmp_path) == {LOCK} and not web.requests
    leave(unpacked - 1)
    fails(archive, tmp_path, f"has {unpacked - 1:,} bytes free, and unpacking set.tgz needs {unpacked:,}")
    assert names(tmp_path) == {LOCK, "set.tgz"}  # verified, and not fetched again once there is room
    leave(unpacked)
    assert tree(obtain(archive, tmp_path, "birds").parent) == FILES
    assert len(web.requests) == 1


class _Full:
    """The file of a transfer, or the call that unpacks a file, on a disk that is full."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what the other takes."""

    def write(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    __call__ = write


@pytest.mark.parametrize(("target", "left"), [("CallbackIOWrapper", {LOCK}), ("partial", {LOCK, "set.tgz"})])
def test_a_disk_that_fills_up_keeps_no_half(
    target: str, left: set[str], web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write to the disk meanwhile; halves would fill it for them as well."""
    monkeypatch.setattr(downloads, target, _Full)
    fails(archive_of(web.data, web.url), tmp_path, rf"cannot write the set to folder {tmp_path} \(.*No space left")
    assert names(tmp_path) == left and len(web.requests) == 1


@pytest.mark.parametrize(("kind", "pack"), [("tgz", tar_with), ("zip", zip_with)])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interruption_while_unpacking_leaves_the_archive_only(
    kind: str, pack: Callable[[], bytes], raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that looks whether the folder is there must never find half of it."""
    data = pack()
    archive, reader = archive_of(data, filename=f"set.{kind}"), tarfile.TarFile if kind == "tgz" else zipfile.ZipFile
    (tmp_path / archive.filename).write_bytes(data)
    extract, calls = reader.extract, []

    def break_off(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            assert (tmp_path / f".set.{kind}.part" / "birds" / "images" / "a.jpg").is_file()
            raise raised("now")
        return extract(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "extract", break_off)
        with pytest.raises(InputError if raised is OSError else raised):
            obtain(archive, tmp_path, "birds")
    assert names(tmp_path) == {archive.filename, f".set.{kind}.lock"}
    assert tree(obtain(archive, tmp_path, "birds").parent) == FILES


def test_a_killed_process_is_cleaned_up_after(web: Remote, tmp_path: Path) -> None:
    """Schedulers kill without warning; nothing half may look whole, and nobody looks for hidden gigabytes."""
    web.faults = [("stall", 1000)]
    archive = archive_of(web.data, web.url)
    context = start_processes(_obtain, (archive, str(tmp_path)), nprocs=1, join=False, start_method="forkserver")
    _wait(lambda: bool(web.requests) and any((tmp_path / PART).iterdir()))
    context.processes[0].kill()
    context.processes[0].join()
    assert names(tmp_path) == {"begun-0", LOCK, PART}
    assert tree(obtain(archive, tmp_path, "birds")) == {name[len("birds/") :]: body for name, body in FILES.items()}
    assert names(tmp_path) == {"begun-0", "birds"}


def test_two_processes_download_once(web: Remote, tmp_path: Path) -> None:
    """Two nodes with one shared folder start at the same moment, and would write into the same file."""
    web.faults = [("gate", None)]
    args = (archive_of(web.data, web.url), str(tmp_path))
    context = start_processes(_obtain, args, nprocs=2, join=False, start_method="forkserver")
    _wait(lambda: len(list(tmp_path.glob("begun-*"))) == 2 and bool(web.requests))
    time.sleep(0.3)  # for the second to come to the lock, or without one to the server
    web.gate.set()
    while not context.join():
        pass
    assert len(web.requests) == 1
    assert names(tmp_path) == {"begun-0", "begun-1", "birds"}


def _obtain(rank: int, archive: Archive, folder: str) -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    (Path(folder) / f"begun-{rank}").touch()
    target = obtain(archive, Path(folder), "birds")
    assert {f"birds/{name}": body for name, body in tree(target).items()} == FILES


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_waits_for_another_says_so(web: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that waits an hour for the download of another looks dead."""
    archive = archive_of(web.data, web.url)
    with caplog.at_level(logging.WARNING), filelock.FileLock(str(tmp_path / LOCK)):
        thread = threading.Thread(target=obtain, args=(archive, tmp_path, "birds"))
        thread.start()
        _wait(lambda: f"waiting for another process that holds {tmp_path / LOCK}" in caplog.text)
        assert not web.requests
    thread.join()
    assert names(tmp_path) == {"birds"}


def test_a_folder_that_cannot_be_written_is_named(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives often go to shared folders that only some may write to, or whose disk has no locks."""
    archive = archive_of(web.data, web.url)
    (tmp_path / "file").write_text("x")
    fails(archive, tmp_path / "file" / "data", rf"cannot write the set to folder {tmp_path}/file/data \(.*Not a dir")

    def no_locks(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no flock on this disk")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    fails(archive, tmp_path / "data", r"cannot write the set to folder .* \(no flock on this disk\): make it writable")
    assert not web.requests
