"""Web and FTP servers on this machine that fail in the ways of real ones, on demand."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass
class Fault:
    """What goes wrong with one request.

    Args:
        kind: cut or stall the connection after `number` bytes of the body; answer with the status `number`; redirect
            to `text`; claim a Content-Length of `number`; hold the body back until `Remote.gate` is set.
        number: see `kind`.
        text: see `kind`.
    """

    kind: Literal["cut", "stall", "status", "redirect", "length", "gate"]
    number: int = 0
    text: str = ""


@dataclass
class Remote:
    """The one file of a server, how it is served, and what was asked and sent.

    Args:
        data: the file.
        version: ETag as it stands in the header, or MDTM over FTP; None for none.
        modified: Last-Modified header.
        ranges: heed Range headers and REST.
        heed_if_range: send the whole file where If-Range names another version.
        say_length: send Content-Length, else end the body with the connection; over FTP, know SIZE.
        faults: of the coming requests, one each.
    """

    data: bytes
    version: str | None = '"1"'
    modified: str | None = None
    ranges: bool = True
    heed_if_range: bool = True
    say_length: bool = True
    faults: list[Fault] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    url: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def next_fault(self) -> Fault | None:
        """The fault of the request that has come."""
        return self.faults.pop(0) if self.faults else None

    def send(self, body: bytes, connection: socket.socket, fault: Fault | None) -> bool:
        """Sends a body with its fault; returns whether all of it was sent."""
        self.sent.append(0)
        broken = fault is not None and fault.kind in ("cut", "stall")
        end = min(fault.number, len(body)) if fault is not None and broken else len(body)
        for start in range(0, end, 1 << 16):
            block = body[start : min(end, start + (1 << 16))]
            connection.sendall(block)
            self.sent[-1] += len(block)
        if fault is not None and fault.kind == "stall":
            self.closing.wait(20)
        return not broken


@contextmanager
def http_server(data: bytes) -> Iterator[Remote]:
    """Serves `data` over HTTP at `Remote.url`."""
    remote = Remote(data)

    class Handler(_HttpHandler):
        served = remote

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler), remote, "http"):
        yield remote


@contextmanager
def ftp_server(data: bytes) -> Iterator[Remote]:
    """Serves `data` over FTP at `Remote.url`."""
    remote = Remote(data, version="20200101000000")

    class Handler(_FtpHandler):
        served = remote

    with _serving(_FtpServer(("127.0.0.1", 0), Handler), remote, "ftp"):
        yield remote


@contextmanager
def _serving(server: socketserver.TCPServer, remote: Remote, scheme: str) -> Iterator[None]:
    remote.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/folder/set.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        remote.closing.set()
        remote.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _HttpHandler(BaseHTTPRequestHandler):
    served: Remote
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        remote = self.served
        remote.requests.append({"path": self.path, **dict(self.headers.items())})
        fault = remote.next_fault()
        self.close_connection = True
        if fault is not None and fault.kind == "status":
            self.send_error(fault.number)
            return
        if fault is not None and fault.kind == "redirect":
            self.send_response(302)
            self.send_header("Location", fault.text)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self._start()
        if start >= len(remote.data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(remote.data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = remote.data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(remote.data) - 1}/{len(remote.data)}")
        if remote.say_length:
            claimed = fault.number if fault is not None and fault.kind == "length" else len(body)
            self.send_header("Content-Length", str(claimed))
        if remote.version is not None:
            self.send_header("ETag", remote.version)
        if remote.modified is not None:
            self.send_header("Last-Modified", remote.modified)
        self.end_headers()
        if fault is not None and fault.kind == "gate":
            remote.gate.wait(20)
        remote.send(body, self.connection, fault)

    def _start(self) -> int:
        remote = self.served
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        stale = condition is not None and remote.heed_if_range and condition not in (remote.version, remote.modified)
        return int(found[1]) if found and remote.ranges and not stale else 0

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _FtpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _FtpHandler(socketserver.StreamRequestHandler):
    served: Remote

    def handle(self) -> None:
        remote = self.served
        self.rest = 0
        self._reply("220 ready")
        while line := self.rfile.readline().decode().strip():
            command, _, argument = line.partition(" ")
            remote.requests.append({"command": command.upper(), "argument": argument})
            if command.upper() == "QUIT":
                self._reply("221 bye")
                return
            if command.upper() == "RETR":
                if not self._retrieve(argument):
                    return
            else:
                self._reply(self._answer(command.upper(), argument))

    def _answer(self, command: str, argument: str) -> str:
        remote = self.served
        if command == "USER":
            return "331 password?"
        if command == "PASS":
            return "230 welcome"
        if command == "TYPE":
            return "200 binary"
        if command == "SIZE" and remote.say_length:
            return f"213 {len(remote.data)}"
        if command == "MDTM" and remote.version is not None:
            return f"213 {remote.version}"
        if command == "REST" and remote.ranges:
            self.rest = int(argument)
            return "350 from there on"
        if command in ("PASV", "EPSV"):
            self.data = socket.create_server(("127.0.0.1", 0))
            self.data.settimeout(10)
            port = self.data.getsockname()[1]
            if command == "EPSV":
                return f"229 entered (|||{port}|)"
            return f"227 entered (127,0,0,1,{port // 256},{port % 256})"
        return "502 not here"

    def _retrieve(self, path: str) -> bool:
        """Sends the file; returns whether the session goes on."""
        remote = self.served
        fault = remote.next_fault()
        if path != "folder/set.bin" or (fault is not None and fault.kind == "status"):
            self.data.close()
            self._reply("550 no such file")
            return True
        connection = self.data.accept()[0]
        self._reply("150 here it comes")
        with connection:
            whole = remote.send(remote.data[self.rest :], connection, fault)
        self.data.close()
        self.rest = 0
        self._reply("226 done" if whole else "426 connection closed")
        return whole

    def _reply(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())
