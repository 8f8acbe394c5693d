"""One attempt at a file on a server: HTTP, HTTPS or FTP, from a given byte on."""

from __future__ import annotations

import ftplib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import unquote, urlsplit

from lightning_dml.errors import InputError

SCHEMES = ("http", "https", "ftp")

_CHUNK = 1 << 18
_PASSING = (408, 425, 429)  # of the 4xx answers, those that another attempt may not get


class TransferError(Exception):
    """An attempt that failed.

    Args:
        reason: for the user, a part of a sentence.
        lasting: another attempt would fail in the same way.
        refused_range: the server has the file, but not from the byte that was asked for.
    """

    def __init__(self, reason: str, lasting: bool = False, refused_range: bool = False) -> None:
        """Keeps the reason; see the class."""
        super().__init__(reason)
        self.lasting = lasting
        self.refused_range = refused_range


@dataclass(frozen=True)
class Transfer:
    """A file that is being sent.

    Args:
        start: byte of the file that the transfer begins with; -1 where the server does not say.
        total: bytes of the whole file, None where the server does not say.
        version: what changes when the file changes (a strong ETag, Last-Modified, or FTP's MDTM), None without one.
        read: the next bytes; none at the end.
        close: gives the connection up.
    """

    start: int
    total: int | None
    version: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come.

        Raises:
            TransferError: if the connection fails or stalls.
        """
        while True:
            with _failing():
                chunk = self.read()
            if not chunk:
                return
            yield chunk


def check_url(url: str) -> None:
    """Raises for a URL that `open_transfer` must not open.

    Raises:
        InputError: if it is not http, https or ftp, has no host, or has control characters.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False  # half an IPv6 address, or a port that is no number
    if not known:
        raise InputError(f"urls must be of {', '.join(SCHEMES)} with a host, got {url!r}")
    if " " in url or any(ord(letter) < 32 or ord(letter) == 127 for letter in unquote(url)):
        raise InputError(f"urls must have no spaces or control characters, got {url!r}")


def open_transfer(url: str, start: int, version: str | None, timeout: float) -> Transfer:
    """Asks for a file from byte `start` on.

    The server may send the whole of it all the same, or another part: see `Transfer.start`.

    Args:
        url: of http, https or ftp.
        start: first byte that is wanted.
        version: send from `start` on only if the file is still of that `Transfer.version`, else from its beginning;
            over FTP the caller must compare.
        timeout: seconds without a byte after which the server counts as lost.

    Raises:
        TransferError: if the server cannot be reached or refuses.
        InputError: if the URL is of another kind.
    """
    check_url(url)
    with _failing():
        if urlsplit(url).scheme == "ftp":
            return _open_ftp(url, start, timeout)
        return _open_http(url, start, version, timeout)


def _open_http(url: str, start: int, version: str | None, timeout: float) -> Transfer:
    request = urllib.request.Request(url, headers={"User-Agent": "lightning-dml", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if version is not None:
            request.add_header("If-Range", version)
    response: HTTPResponse = _opener().open(request, timeout=timeout)
    length = response.headers.get("Content-Length", "")
    left = int(length) if length.isdecimal() else None
    first, total = 0, left
    if response.status == 206:
        first, total = _content_range(response.headers.get("Content-Range", ""))
    etag = response.headers.get("ETag", "")
    strong = etag if etag.startswith('"') else None  # a weak one does not promise the same bytes

    def read() -> bytes:
        nonlocal left
        # read1, so that a stall loses nothing that has come; and never past the length, where it would wait for more.
        chunk = response.read1(_CHUNK if left is None else min(_CHUNK, left))
        if left is not None:
            left -= len(chunk)
        return chunk

    return Transfer(first, total, strong or response.headers.get("Last-Modified"), read, response.close)


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https only, wherever a redirect points: the default one would go on over FTP, without resuming."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _content_range(value: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", value.strip())
    if found is None:
        return -1, None
    first, last, total = found.groups()
    return int(first), int(last) + 1 if total == "*" else int(total)


def _open_ftp(url: str, start: int, timeout: float) -> Transfer:
    parts = urlsplit(url)
    path = unquote(parts.path).lstrip("/")  # from the folder of the login
    ftp = ftplib.FTP(timeout=timeout)
    try:
        ftp.connect(parts.hostname or "", parts.port or ftplib.FTP_PORT)
        ftp.login(unquote(parts.username or "anonymous"), unquote(parts.password or "anonymous@"))
        ftp.voidcmd("TYPE I")
        total = version = None
        # Not every server has these two; one that lacks the file says so again at RETR.
        with suppress(ftplib.error_perm):
            total = ftp.size(path)
        with suppress(ftplib.error_perm):
            version = ftp.sendcmd(f"MDTM {path}")[4:].strip()
        try:
            connection = ftp.ntransfercmd(f"RETR {path}", rest=start or None)[0]
        except ftplib.error_perm as error:
            if start and str(error).startswith("50"):
                raise TransferError(f"cannot resume: {error}", lasting=True, refused_range=True) from error
            raise
    except BaseException:
        ftp.close()
        raise

    def read() -> bytes:
        chunk = connection.recv(_CHUNK)
        if not chunk:
            connection.close()
            ftp.voidresp()  # raises where the server says that it has not sent everything
        return chunk

    def close() -> None:
        connection.close()
        ftp.close()

    return Transfer(start, total, version, read, close)


@contextmanager
def _failing() -> Iterator[None]:
    """Turns whatever the connection raises into a TransferError."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        lasting = 400 <= error.code < 500 and error.code not in _PASSING
        raise TransferError(
            f"HTTP {error.code} {error.reason}", lasting=lasting, refused_range=error.code == 416
        ) from error
    except ftplib.error_perm as error:
        raise TransferError(str(error), lasting=True) from error
    except (OSError, EOFError, ValueError, HTTPException, ftplib.Error) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        text = "no answer within the time-out" if isinstance(reason, TimeoutError) else str(reason)
        raise TransferError(text or type(reason).__name__) from error
