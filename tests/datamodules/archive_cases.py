"""A web server that fails on demand, and archives that are whole, damaged and malicious."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_dml.datamodules.downloads import Archive, obtain
from lightning_dml.errors import InputError

FILES = {"birds/list.txt": b"1 a.jpg\n", "birds/images/a.jpg": bytes(range(256)) * 3000, "birds/images/b.jpg": b""}


NO_FAULT: tuple[str, Any] = ("", None)


@dataclass
class Remote:
    """The one file of a web server, what goes wrong with the coming requests, and the headers of those that came."""

    data: bytes
    faults: list[tuple[str, Any]] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    gate: threading.Event = field(default_factory=threading.Event)


@contextmanager
def http_server(data: bytes = b"") -> Iterator[Remote]:
    """Serves `data` on the loopback interface.

    A fault is (cut, bytes), (stall, bytes), (status, code), (redirect, URL), or (gate, None), which holds the body back
    until `Remote.gate` is set.
    """
    remote = Remote(data)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            remote.requests.append(dict(self.headers.items()))
            kind, value = remote.faults.pop(0) if remote.faults else NO_FAULT
            if kind == "status":
                self.send_error(value)
                return
            self.send_response(302 if kind == "redirect" else 200)
            if kind == "redirect":
                self.send_header("Location", value)
            else:
                self.send_header("Content-Length", str(len(remote.data)))
            self.end_headers()
            if kind == "gate":
                remote.gate.wait(30)
            if kind != "redirect":
                self.wfile.write(remote.data[: value if kind in ("cut", "stall") else None])
            if kind == "stall":
                remote.gate.wait(30)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    remote.url = f"http://127.0.0.1:{server.server_address[1]}/folder/set"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield remote
    finally:
        remote.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def archive_of(data: bytes, *urls: str, filename: str = "set.tgz") -> Archive:
    """The archive of the given bytes."""
    return Archive("the set", urls, filename, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def tar_with(*members: tarfile.TarInfo, files: dict[str, bytes] = FILES, mode: str = "w:gz") -> bytes:
    """A tar file of `files`, and of members whose body is zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, body in files.items():
            tar.addfile(member(name, size=len(body)), io.BytesIO(body))
        for info in members:
            tar.addfile(info, io.BytesIO(b"\0" * info.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member of a tar file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def zip_with(*members: zipfile.ZipInfo, files: dict[str, bytes] = FILES) -> bytes:
    """A zip file of `files`, and of members with a short body."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in files.items():
            file.writestr(name, body)
        for info in members:
            file.writestr(info, b"/etc/passwd")
    return buffer.getvalue()


def zip_member(name: str, mode: int = stat.S_IFREG) -> zipfile.ZipInfo:
    """A member of a zip file that was made on Unix."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o644) << 16
    return info


def tree(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    """Names of the entries of a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}


def fails(archive: Archive, folder: Path, match: str, contents: str = "birds") -> str:
    """Obtains what must not be had, with an error of one line; the text of the error."""
    with pytest.raises(InputError, match=match) as caught:
        obtain(archive, folder, contents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OUTSIDE, LINK = "would be written outside of its folder", "is a link, a device or a pipe"
MALICIOUS_TAR: dict[str, tuple[list[tarfile.TarInfo], str]] = {
    "absolute": ([member("/birds/x")], f"'/birds/x' {OUTSIDE}"),
    "drive": ([member("C:/birds/x")], OUTSIDE),
    "up": ([member("birds/../../x")], OUTSIDE),
    "up, other slash": ([member("birds\\..\\..\\x")], OUTSIDE),
    "up beside the contents": ([member("../x")], OUTSIDE),
    "link, absolute": ([member("birds/l", tarfile.SYMTYPE, "/etc/passwd")], f"'birds/l' {LINK}"),
    "link, up": ([member("birds/l", tarfile.SYMTYPE, "../../x")], LINK),
    "link to a folder, written through": ([member("birds/l", tarfile.SYMTYPE, "../.."), member("birds/l/x")], LINK),
    "link in place of the contents": ([member("birds", tarfile.SYMTYPE, "elsewhere")], LINK),
    "link beside the contents": ([member("cars", tarfile.SYMTYPE, "/etc")], LINK),
    "hard link, absolute": ([member("birds/h", tarfile.LNKTYPE, "/etc/passwd")], LINK),
    "hard link, up": ([member("birds/h", tarfile.LNKTYPE, "../x")], LINK),
    "device": ([member("birds/null", tarfile.CHRTYPE)], LINK),
    "pipe": ([member("birds/pipe", tarfile.FIFOTYPE)], LINK),
    "file in a file": ([member("birds/list.txt/x")], "cannot write"),
}

MALICIOUS_ZIP = [
    (zip_member("/birds/x"), OUTSIDE),
    (zip_member("birds/../../x"), OUTSIDE),
    (zip_member("birds\\..\\..\\x"), OUTSIDE),
    (zip_member("C:\\x"), OUTSIDE),
    (zip_member("../x"), OUTSIDE),
    (zip_member("birds/l", stat.S_IFLNK), f"'birds/l' {LINK}"),
    (zip_member("birds/d", stat.S_IFCHR), LINK),
    (zip_member("birds/list.txt/x"), "cannot write"),
]


def _flipped(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


_ZIP = zip_with()
DAMAGED = {
    "cut.tgz": (tar_with()[:2000], r"damaged or unsafe \(.*end"),
    "cut.zip": (_ZIP[:2000], "damaged or unsafe .*not a zip"),
    "flipped.zip": (_flipped(_ZIP, _ZIP.index(b"images/a.jpg") + 40, 16), "damaged or unsafe"),
    "encrypted.zip": (_flipped(_ZIP, _ZIP.index(b"PK\x01\x02") + 8, 1), "damaged or unsafe .*encrypted"),
    "page.tgz": (b"<html>Please log in</html>", "damaged or unsafe"),
    "page.zip": (b"<html>Please log in</html>", "damaged or unsafe"),
    "empty.tgz": (b"", "damaged or unsafe"),
}
