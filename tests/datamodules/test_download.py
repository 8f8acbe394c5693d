"""Downloads from servers that cut, stall, change and lie."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from lightning_dml.datamodules import disk, download
from lightning_dml.datamodules.disk import locked
from lightning_dml.datamodules.download import Archive, obtain
from lightning_dml.errors import InputError
from tests.datamodules.servers import Fault, Remote, ftp_server, http_server
from tests.datamodules.test_unpacking import FILES, full_after, tar_with, tree
from tests.helpers import start_processes

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
CUT = 100_000
REST = len(DATA) - CUT


def digest(data: bytes, algorithm: str = "sha256") -> str:
    """The checksum of some bytes as an `Archive` has it."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def archive(*urls: str, size: int | None = None, checksum: str | None = digest(DATA)) -> Archive:
    """An archive of the given places."""
    return Archive("the set", urls, "set.bin", size, checksum)


def fetch(what: Archive, folder: Path, **options: Any) -> bytes:
    """Downloads with waits that keep the test fast, and returns what came."""
    path = download.download(what, folder, **{"timeout": 5, "progress": False, "backoff": 0.01, **options})
    assert path == folder / "set.bin" and sorted(each.name for each in folder.iterdir()) == ["set.bin"]
    return path.read_bytes()


def fails(what: Archive, folder: Path, match: str, **options: Any) -> set[str]:
    """Downloads what must not succeed; returns the names that are left in the folder, never the final one."""
    with pytest.raises(InputError, match=match) as caught:
        fetch(what, folder, **options)
    assert "\n" not in str(caught.value)
    names = {each.name for each in folder.iterdir()}
    assert "set.bin" not in names
    return names


PART = {"set.bin.part", "set.bin.part.json"}


def begin(folder: Path, data: bytes, url: str, version: str | None = '"1"', total: int | None = len(DATA)) -> None:
    """Leaves a part as a process that was killed leaves it."""
    (folder / "set.bin.part").write_bytes(data)
    (folder / "set.bin.part.json").write_text(json.dumps({"url": url, "version": version, "total": total}))


Serve = Callable[[bytes], AbstractContextManager[Remote]]
both = pytest.mark.parametrize("serve", [http_server, ftp_server])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the machine must not stand between the test and its server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def web() -> Iterator[Remote]:
    """A web server that has `DATA`."""
    with http_server(DATA) as remote:
        yield remote


def retrievals(remote: Remote) -> int:
    """How often the file was asked for."""
    return sum(each.get("command", "RETR") == "RETR" for each in remote.requests)


@both
def test_a_file_comes_whole(serve: Serve, tmp_path: Path) -> None:
    """The plain case, in one request, with nothing beside the file and the folder made."""
    with serve(DATA) as remote:
        assert fetch(archive(remote.url, size=len(DATA)), tmp_path / "new") == DATA
        assert remote.sent == [len(DATA)]


@both
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_only_the_rest_is_fetched_after_a_break(serve: Serve, kind: Any, tmp_path: Path) -> None:
    """Three gigabytes over a line that breaks every hour would otherwise never arrive."""
    with serve(DATA) as remote:
        remote.faults = [Fault(kind, CUT), Fault(kind, 50_000)]
        assert fetch(archive(remote.url), tmp_path, timeout=0.3 if kind == "stall" else 5) == DATA
        assert remote.sent == [CUT, 50_000, REST - 50_000]


@both
def test_a_later_call_goes_on(serve: Serve, tmp_path: Path) -> None:
    """Jobs end at their time limit; the next one must not begin at zero."""
    with serve(DATA) as remote:
        remote.faults = [Fault("cut", CUT)]
        assert (
            fails(archive(remote.url), tmp_path, "cut after 100,000 of 300,000|426 connection closed", attempts=1)
            == PART
        )
        assert (tmp_path / "set.bin.part").read_bytes() == DATA[:CUT]
        assert fetch(archive(remote.url), tmp_path) == DATA
        assert remote.sent == [CUT, REST]


def test_attempts_count_failures_that_bring_nothing(web: Remote, tmp_path: Path) -> None:
    """A line that breaks often but moves on must not run out of attempts."""
    web.faults = [Fault("cut", 40_000)] * 6
    assert fetch(archive(web.url), tmp_path, attempts=2) == DATA
    assert sum(web.sent) == len(DATA)


def test_a_server_that_never_gets_further_is_given_up(web: Remote, tmp_path: Path) -> None:
    """Without ranges every attempt moves on from zero to the same place, for ever."""
    web.ranges = False
    web.faults = [Fault("cut", CUT)] * 20
    fails(archive(web.url), tmp_path, "cut after", attempts=3)
    assert web.sent == [CUT] * 3
    web.faults = []
    assert fetch(archive(web.url), tmp_path) == DATA  # from zero, not behind what is there
    assert web.sent[3:] == [len(DATA)]


@pytest.mark.parametrize(("status", "requests"), [(503, 3), (429, 3), (404, 1), (403, 1)])
def test_only_what_may_pass_is_tried_again(status: int, requests: int, web: Remote, tmp_path: Path) -> None:
    """A page that is gone stays gone, while a busy server recovers."""
    web.faults = [Fault("status", status)] * 9
    match = rf"{web.url} \(HTTP {status} .*by hand and put it at {tmp_path}/set\.bin"
    assert fails(archive(web.url), tmp_path, match, attempts=3) == set()
    assert len(web.requests) == requests


def test_the_waits_grow(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of clients that ask every second keep a busy server busy."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    web.faults = [Fault("status", 503)] * 9
    fails(archive(web.url), tmp_path, "HTTP 503", attempts=9, backoff=1)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


@both
@pytest.mark.parametrize("heed_if_range", [True, False])
def test_a_file_that_changed_is_not_spliced(serve: Serve, heed_if_range: bool, tmp_path: Path) -> None:
    """Without a checksum nothing else would tell that the halves are of two files."""
    with serve(DATA) as remote:
        remote.faults = [Fault("cut", CUT)]
        fails(archive(remote.url, checksum=None), tmp_path, "cut|closed", attempts=1)
        remote.data, remote.version, remote.heed_if_range = OTHER, '"2"', heed_if_range
        assert fetch(archive(remote.url, checksum=None), tmp_path) == OTHER


@pytest.mark.parametrize(
    ("version", "modified", "checksum", "resumed", "condition"),
    [
        ('"1"', "Mon, 01 Jan 2024 00:00:00 GMT", None, True, '"1"'),
        (None, "Mon, 01 Jan 2024 00:00:00 GMT", None, True, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ('W/"1"', "Mon, 01 Jan 2024 00:00:00 GMT", None, True, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ('W/"1"', None, None, False, None),
        (None, None, None, False, None),
        (None, None, digest(DATA), True, None),
    ],
)
def test_what_tells_that_the_file_is_the_same(
    version: str | None,
    modified: str | None,
    checksum: str | None,
    resumed: bool,
    condition: str | None,
    web: Remote,
    tmp_path: Path,
) -> None:
    """A weak ETag does not promise equal bytes; without any sign only the checksum makes resumption safe."""
    web.version, web.modified = version, modified
    web.faults = [Fault("cut", CUT)]
    assert fetch(archive(web.url, checksum=checksum), tmp_path) == DATA
    assert web.sent == [CUT, REST if resumed else len(DATA)]
    assert web.requests[1].get("If-Range") == condition


@pytest.mark.parametrize("begun", [DATA + b"more", OTHER])
def test_a_part_that_is_too_long_is_begun_anew(begun: bytes, web: Remote, tmp_path: Path) -> None:
    """The file on the server may have become shorter; it then refuses the range (416)."""
    web.data = DATA[:200_000]
    begin(tmp_path, begun, web.url, total=400_000)
    assert fetch(archive(web.url, checksum=digest(web.data)), tmp_path) == web.data
    assert [each.get("Range") for each in web.requests] == [f"bytes={len(begun)}-", None]


def test_a_part_that_is_whole_needs_no_server(web: Remote, tmp_path: Path) -> None:
    """A process may be killed between the last byte and the name."""
    begin(tmp_path, DATA, web.url)
    assert fetch(archive(web.url), tmp_path) == DATA
    assert not web.requests


@pytest.mark.parametrize("note", ["", "[1]", '{"url": 1}'])
def test_a_part_without_its_note_is_begun_anew(note: str, web: Remote, tmp_path: Path) -> None:
    """Killed while it was noted, nobody knows what the part is a part of."""
    begin(tmp_path, OTHER[:CUT], web.url)
    (tmp_path / "set.bin.part.json").write_text(note)
    assert fetch(archive(web.url, checksum=None), tmp_path) == DATA


def test_a_damaged_part_is_fetched_once_more(web: Remote, tmp_path: Path) -> None:
    """After a power cut the part may hold zeros; the archive on the server is not to blame."""
    begin(tmp_path, bytes(CUT), web.url)
    assert fetch(archive(web.url), tmp_path) == DATA
    assert web.sent == [REST, len(DATA)]


@both
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_wrong_checksum_is_refused(serve: Serve, algorithm: str, tmp_path: Path) -> None:
    """Files that were changed on their way must neither be used nor resumed."""
    with serve(OTHER) as remote:
        expected, got = digest(DATA, algorithm), digest(OTHER, algorithm)
        match = f"{remote.url} .*{got.replace(':', ' ')}, expected {expected[-32:]}" if algorithm == "md5" else got[7:]
        assert fails(archive(remote.url, checksum=expected), tmp_path, match) == set()
        assert retrievals(remote) == 1


@both
@pytest.mark.parametrize("say_length", [True, False])
def test_a_wrong_size_is_refused(serve: Serve, say_length: bool, tmp_path: Path) -> None:
    """A page that says `moved` in place of the archive must not become the archive."""
    with serve(DATA + b"x") as remote:
        remote.say_length = say_length
        what = archive(remote.url, size=len(DATA), checksum=None)
        assert fails(what, tmp_path, "300,001 bytes, expected 300,000", attempts=2) == set()


def test_a_length_that_is_not_kept_is_a_cut(web: Remote, tmp_path: Path) -> None:
    """Proxies close such connections in silence, and the archive lacks its end."""
    web.faults = [Fault("length", len(DATA) + 5)] * 3
    assert fails(archive(web.url, checksum=None), tmp_path, "cut after 300,000 of 300,005", attempts=1) == PART
    web.faults = [Fault("length", 1000)]
    assert fails(archive(web.url), tmp_path / "less", "has the sha256") == set()


@both
def test_without_a_length_the_published_size_tells_a_cut(serve: Serve, tmp_path: Path) -> None:
    """Some servers send without a length, and a closed connection is then the end as well."""
    with serve(DATA) as remote:
        remote.say_length = False
        remote.faults = [Fault("cut", CUT)]
        assert fetch(archive(remote.url, size=len(DATA), checksum=None), tmp_path) == DATA
        assert remote.sent == [CUT, REST]


def test_ftp_servers_may_lack_everything(tmp_path: Path) -> None:
    """SIZE, MDTM and REST are later than FTP, and some servers have none of them."""
    with ftp_server(DATA) as remote:
        remote.say_length, remote.version, remote.ranges = False, None, False
        remote.faults = [Fault("cut", CUT)]
        assert fetch(archive(remote.url), tmp_path) == DATA
        assert remote.sent == [CUT, len(DATA)]
        remote.faults = [Fault("status")]
        fails(archive(remote.url), tmp_path / "none", r"550 no such file\)")


def test_an_empty_file_is_no_archive(web: Remote, tmp_path: Path) -> None:
    """A server whose disk is full serves such files."""
    web.faults = [Fault("length", 0)]
    assert fails(archive(web.url, checksum=None), tmp_path, "is empty") == set()


def test_a_file_that_is_there_is_checked_and_used(web: Remote, tmp_path: Path) -> None:
    """Where a host lets no script in, people fetch the archive by hand and put it there."""
    (tmp_path / "set.bin").write_bytes(DATA)
    assert fetch(archive(web.url, size=len(DATA)), tmp_path) == DATA
    (tmp_path / "set.bin").write_bytes(OTHER)
    with pytest.raises(InputError, match=rf"{tmp_path}/set\.bin is not the set: it has the sha256 .* delete it"):
        fetch(archive(web.url), tmp_path)
    assert (tmp_path / "set.bin").read_bytes() == OTHER  # it is somebody's file
    (tmp_path / "set.bin").unlink()
    (tmp_path / "set.bin").mkdir()
    with pytest.raises(InputError, match="it is not a file"):
        fetch(archive(web.url), tmp_path)
    assert not web.requests


def test_the_next_place_is_tried(web: Remote, tmp_path: Path) -> None:
    """Hosts of data sets move; with a checksum a mirror may even finish what another one began."""
    with http_server(DATA) as mirror:
        mirror.version = '"mirror"'
        web.faults = [Fault("cut", CUT), Fault("status", 404)]
        assert fetch(archive(web.url, mirror.url), tmp_path) == DATA
        assert mirror.sent == [REST] and "If-Range" not in mirror.requests[0]
        web.faults, mirror.faults = [Fault("status", 404)], [Fault("status", 403)]
        fails(archive(web.url, mirror.url), tmp_path / "none", rf"{web.url} \(HTTP 404.*{mirror.url} \(HTTP 403")


def test_a_bad_mirror_does_not_hide_a_good_one(web: Remote, tmp_path: Path) -> None:
    """Abandoned names are bought by others, who answer every request with a page of theirs."""
    with http_server(OTHER) as bad:
        assert fetch(archive(bad.url, web.url), tmp_path) == DATA


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    """Compute nodes often have no network, and a traceback would hide what to do about it."""
    with http_server(DATA) as remote:
        url = remote.url
    fails(archive(url), tmp_path, rf"cannot download the set from {url} \(.*refused.*by hand", attempts=2)


def test_redirects_are_followed_within_the_web_only(web: Remote, tmp_path: Path) -> None:
    """Archives are moved by redirects; one to a local file would read the user's own."""
    web.faults = [Fault("cut", CUT), Fault("redirect", text=web.url)]
    assert fetch(archive(web.url), tmp_path) == DATA
    assert web.sent == [CUT, REST]  # the range goes along
    secret = tmp_path / "secret"
    secret.write_bytes(DATA)
    with ftp_server(DATA) as other:
        for target in (f"file://{secret}", "data:,x", other.url):
            web.faults = [Fault("redirect", text=target)] * 2
            assert fails(archive(web.url), tmp_path / "none", web.url, attempts=2) == set()
        assert not other.requests


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "data:,x",
        "gopher://h/x",
        "/etc/passwd",
        "http:///x",
        "http://[::1/x",
        "http://h:x/",
        "http://h/a b",
        "ftp://h/a%0d%0aDELE b",
        "ftp://h/a%0d%0aDELE",
        "",
    ],
)
def test_other_urls_are_never_opened(url: str) -> None:
    """A table of URLs may come from anywhere; local files and smuggled commands must not."""
    with pytest.raises(InputError, match="urls must"):
        archive(url)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"urls": ()}, "at least one"),
        ({"filename": "../x"}, "plain file name"),
        ({"filename": ""}, "plain file name"),
        ({"size": 0}, "size must"),
        ({"checksum": "sha1:" + "0" * 40}, "checksum must"),
        ({"checksum": "md5:" + "0" * 31}, "checksum must"),
        ({"checksum": "0" * 32}, "checksum must"),
    ],
)
def test_an_archive_that_cannot_be_is_refused(changed: dict[str, Any], match: str) -> None:
    """A slip in a constant must show at once and not after three gigabytes."""
    fields: dict[str, Any] = {"name": "x", "urls": ("http://h/x",), "filename": "x"}
    with pytest.raises(InputError, match=match):
        Archive(**fields | changed)


@pytest.mark.parametrize("option", [{"timeout": 0}, {"attempts": 0}, {"backoff": -1}])
def test_options_out_of_range_are_refused(option: dict[str, int], web: Remote, tmp_path: Path) -> None:
    """A time-out of zero would fail every connection and blame the server."""
    with pytest.raises(InputError, match=f"{next(iter(option))} must"):
        fetch(archive(web.url), tmp_path, **option)


def test_room_is_asked_for_before_the_first_byte(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is known beforehand; and what is on it already needs no room again."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=REST))
    match = "200,000 bytes free, and downloading the set needs 300,000: free 100,000"
    assert fails(archive(web.url), tmp_path, match) == set()
    begin(tmp_path, DATA[:CUT], web.url)
    assert fetch(archive(web.url), tmp_path) == DATA


def test_a_disk_that_fills_up_keeps_the_part(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write to the disk too; once they have made room the rest is enough."""
    written: list[int] = []

    def filling(file: BinaryIO, data: bytes) -> None:
        if written and sum(written) + len(data) > CUT:
            disk.write_all(file, data[: CUT - sum(written)])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        disk.write_all(file, data)

    web.faults = [Fault("cut", 50_000)]
    with monkeypatch.context() as patch:
        patch.setattr(download, "write_all", filling)
        match = r"no space is left for .*set\.bin\.part: [\d,]+ more bytes are needed.*stays and is resumed"
        assert fails(archive(web.url), tmp_path, match) == PART
    assert (tmp_path / "set.bin.part").read_bytes() == DATA[:CUT]
    assert fetch(archive(web.url), tmp_path) == DATA
    assert web.requests[-1]["Range"] == f"bytes={CUT}-"


def test_a_folder_that_cannot_be_made_is_named(web: Remote, tmp_path: Path) -> None:
    """Archives often go to shared folders that only some may write to."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file/data/\.set\.bin\.lock"):
        fetch(archive(web.url), tmp_path / "file" / "data")


@pytest.fixture
def birds(web: Remote, tmp_path: Path) -> Archive:
    """An archive that `obtain` can unpack, on the web server."""
    web.data = tar_with(tmp_path / "made.tgz").read_bytes()
    (tmp_path / "made.tgz").unlink()
    return Archive("the birds", (web.url,), "birds.tgz", len(web.data), digest(web.data))


def test_obtain_leaves_the_contents_only(web: Remote, birds: Archive, tmp_path: Path) -> None:
    """Nobody needs the archive once it is unpacked, and once is enough."""
    assert obtain(birds, tmp_path, "birds", progress=False) == tmp_path / "birds"
    assert tree(tmp_path) == FILES
    assert obtain(birds, tmp_path, "birds", progress=False) == tmp_path / "birds"
    assert len(web.requests) == 1
    obtain(birds, tmp_path / "kept", "birds", progress=False, keep_archive=True)
    assert (tmp_path / "kept" / "birds.tgz").read_bytes() == web.data


@pytest.mark.parametrize(("progress", "terminal", "shown"), [(True, True, 2), (True, False, 0), (False, True, 0)])
def test_bars_are_for_terminals(
    progress: bool,
    terminal: bool,
    shown: int,
    birds: Archive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gigabytes need a sign of life, which in the log of a job would be thousands of lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    obtain(birds, tmp_path, "birds", progress=progress)
    text = capsys.readouterr().err
    assert ("birds.tgz: 100%" in text) + ("birds: 100%" in text) == shown


def test_obtain_after_a_failure_leaves_no_contents(
    birds: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that looks whether the folder is there must never find half of it."""
    with pytest.raises(InputError, match="it holds 'birds'"):
        obtain(birds, tmp_path, "cars", progress=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["birds.tgz"]
    monkeypatch.setattr("lightning_dml.datamodules.unpacking.write_all", full_after(1, disk.write_all))
    with pytest.raises(InputError, match="no space is left"):
        obtain(birds, tmp_path, "birds", progress=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["birds.tgz"]


@pytest.mark.parametrize(("contents", "match"), [("", "plain name"), ("birds.tgz", "must not be called")])
def test_obtain_asks_for_a_folder_of_its_own(contents: str, match: str, birds: Archive, tmp_path: Path) -> None:
    """The folder itself is always there, so an empty name would look like a finished download."""
    with pytest.raises(InputError, match=match):
        obtain(birds, tmp_path, contents, progress=False)


def test_a_killed_process_leaves_a_part_that_is_finished(web: Remote, tmp_path: Path) -> None:
    """Schedulers kill without warning; whatever instant it is, nothing half may look whole."""
    web.faults = [Fault("stall", CUT)]
    context = start_processes(_fetch, (web.url, str(tmp_path)), nprocs=1, join=False, start_method="forkserver")
    part = tmp_path / "set.bin.part"
    _wait(lambda: part.exists() and part.stat().st_size == CUT)
    context.processes[0].kill()
    context.processes[0].join()
    assert {each.name for each in tmp_path.iterdir()} == {*PART, ".set.bin.lock"}
    assert fetch(archive(web.url), tmp_path) == DATA
    assert web.sent == [CUT, REST]


def test_two_processes_download_once(web: Remote, birds: Archive, tmp_path: Path) -> None:
    """Two nodes with one shared folder start at the same moment, and would write into the same file."""
    web.faults = [Fault("gate")]
    args = (birds, str(tmp_path))
    context = start_processes(_obtain, args, nprocs=2, join=False, start_method="forkserver")
    _wait(lambda: len(list(tmp_path.glob("begun-*"))) == 2 and bool(web.requests))
    time.sleep(0.3)  # for the second to come to the lock, or without one to the server
    web.gate.set()
    while not context.join():
        pass
    assert len(web.requests) == 1
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "birds.tgz").exists()


def _fetch(rank: int, url: str, folder: str) -> None:
    download.download(archive(url), Path(folder), progress=False)


def _obtain(rank: int, what: Archive, folder: str) -> None:
    (Path(folder) / f"begun-{rank}").touch()
    target = obtain(what, Path(folder), "birds", progress=False)
    assert {f"birds/{name}": body for name, body in tree(target).items()} == FILES


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """The file is removed by each that leaves, and those that wait on the removed one must not enter together."""
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        for _ in range(5):
            with locked(tmp_path / ".lock"):
                inside.append(number)
                time.sleep(0.002)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 30
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_warned_of(web: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none; one process alone can do without."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no lock on .*start only one process"):
        assert fetch(archive(web.url), tmp_path) == DATA
