"""Archives of public data sets: fetched with resumption, checked, unpacked, and never there by halves."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_dml.datamodules.archives import Archive
from lightning_dml.datamodules.disk import byte_bar, check_space, explained, locked, write_all
from lightning_dml.datamodules.transfers import Transfer, TransferError, open_transfer
from lightning_dml.datamodules.unpacking import check_contents, unpack
from lightning_dml.errors import InputError

__all__ = ["CUB_200_2011", "STANFORD_ONLINE_PRODUCTS", "Archive", "download", "obtain"]

_LONGEST_WAIT = 60.0  # seconds

CUB_200_2011 = Archive(
    name="CUB-200-2011",
    # The URL: pytorch-metric-learning 2.9.0 datasets/cub.py, and issue 5544 of tensorflow/datasets.
    urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    filename="CUB_200_2011.tgz",
    # tensorflow/datasets at 333639b3, url_checksums/caltech_birds2011.txt; fastai's download checks have the same.
    size=1_150_585_339,
    # The sha256 of that same line. Those who check md5 have 97eceeb196236b17998738112f37df78, among them cub2011.py of
    # TDeVries/cub2011_dataset at 939292d3.
    checksum="sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
)
"""Caltech-UCSD Birds 200-2011, which unpacks to `CUB_200_2011`."""

STANFORD_ONLINE_PRODUCTS = Archive(
    name="Stanford Online Products",
    urls=(
        # The authors' server over HTTP: chainercv's reader of the data set.
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        # The same over FTP: tensorflow/datasets, url_checksums/stanford_online_products.txt.
        "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        # The authors' second place: pytorch-metric-learning 2.9.0 datasets/sop.py.
        "https://drive.usercontent.google.com/download"
        "?id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8&export=download&authuser=0&confirm=t",
    ),
    filename="Stanford_Online_Products.zip",
    # Size and sha256: tensorflow/datasets at 333639b3, url_checksums/stanford_online_products.txt. Older loaders check
    # the md5 7f73d41a2f44250d4779881525aea32e.
    size=3_083_860_082,
    checksum="sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
)
"""Stanford Online Products, which unpacks to `Stanford_Online_Products`."""


def download(
    archive: Archive,
    folder: Path,
    timeout: float = 60.0,
    progress: bool = True,
    attempts: int = 5,
    backoff: float = 1.0,
) -> Path:
    """Fetches an archive, or what is missing of it.

    The bytes go to `<filename>.part` and get the final name when size and checksum are right, so what has that name is
    whole. After a break, in this process or an earlier one, the rest is asked for; what the server has since changed is
    fetched anew. A file that has the final name already is checked and used. Of several processes one fetches and the
    others wait.

    Args:
        archive: what to fetch.
        folder: where it goes; made where it is missing.
        timeout: seconds without a byte after which a connection counts as cut.
        progress: show a bar where there is a terminal.
        attempts: how often in a row a URL may fail without bringing more of the file than there was.
        backoff: seconds to wait after a failure; twice as long after each further one, up to a minute.

    Returns:
        The path of the archive.

    Raises:
        InputError: if no URL gave the file, naming each with its reason; for a file under the final name that is not
            the archive; without room on the disk; for options out of range.
    """
    job = _Download(archive, Path(folder), timeout, progress, attempts, backoff)
    with locked(job.lock):
        return job.run()


def obtain(
    archive: Archive,
    folder: Path,
    contents: str,
    timeout: float = 60.0,
    progress: bool = True,
    attempts: int = 5,
    backoff: float = 1.0,
    keep_archive: bool = False,
) -> Path:
    """The unpacked folder of an archive: downloads and unpacks it where it is missing.

    Args:
        archive: what to fetch, see `download` for the options.
        folder: where archive and contents go.
        contents: the folder in the archive, which is there when it is whole.
        timeout: see `download`.
        progress: see `download`.
        attempts: see `download`.
        backoff: see `download`.
        keep_archive: leave the archive beside its contents.

    Returns:
        `folder / contents`.

    Raises:
        InputError: see `download` and `unpack`.
    """
    check_contents(contents)
    if contents == archive.filename:
        raise InputError(f"contents must not be called as the archive, got {contents!r} for both")
    job = _Download(archive, Path(folder), timeout, progress, attempts, backoff)
    target = job.folder / contents
    if target.is_dir():
        return target
    with locked(job.lock):
        if not target.is_dir():
            path = job.run()
            unpack(path, job.folder, contents, progress)
            if not keep_archive:
                with explained(path):
                    path.unlink()
    return target


@dataclass(frozen=True)
class _Begun:
    """What is kept beside a part: where it is from, which version of the file it is, and of how many bytes."""

    url: str
    version: str | None
    total: int | None


@dataclass(frozen=True)
class _Download:
    archive: Archive
    folder: Path
    timeout: float
    progress: bool
    attempts: int
    backoff: float

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise InputError(f"timeout must be positive seconds, got {self.timeout}")
        if self.attempts < 1:
            raise InputError(f"attempts must be at least 1, got {self.attempts}")
        if self.backoff < 0:
            raise InputError(f"backoff must not be negative seconds, got {self.backoff}")

    @property
    def final(self) -> Path:
        return self.folder / self.archive.filename

    @property
    def part(self) -> Path:
        return self.folder / f"{self.archive.filename}.part"

    @property
    def note(self) -> Path:
        return self.folder / f"{self.archive.filename}.part.json"

    @property
    def lock(self) -> Path:
        return self.folder / f".{self.archive.filename}.lock"

    def run(self) -> Path:
        if self.final.exists():
            if fault := self.archive.fault(self.final):
                raise InputError(
                    f"{self.final} is not {self.archive.name}: it {fault}; delete it to have it fetched, or put the "
                    "right file there"
                )
            return self.final
        failures = []
        for url in self.archive.urls:
            try:
                self._fetch(url)
                return self.final
            except TransferError as error:
                failures.append(f"{url} ({error})")
        raise InputError(
            f"cannot download {self.archive.name} from {'; '.join(failures)}: try again later, or fetch it by hand and "
            f"put it at {self.final}"
        )

    def _fetch(self, url: str) -> None:
        """Tries one URL until it has given the whole file, or gives nothing more."""
        furthest, failed = self._have(), 0
        while True:
            try:
                in_one_piece = self._attempt(url)
                self._finish(in_one_piece)
                return
            except TransferError as error:
                failed = 1 if self._have() > furthest else failed + 1
                furthest = max(furthest, self._have())
                if error.lasting or failed >= self.attempts:
                    raise
            time.sleep(min(self.backoff * 2 ** (failed - 1), _LONGEST_WAIT))

    def _attempt(self, url: str) -> bool:
        """Fetches what is missing of the part; returns whether all of it came just now."""
        begun = self._begun()
        # Without a version to compare, only the checksum would tell that two halves do not belong together.
        same = begun is not None and begun.url == url and begun.version is not None
        start = self._have() if begun is not None and (same or self.archive.checksum) else 0
        if begun is not None and start and start == begun.total:
            return False
        try:
            with closing(
                open_transfer(url, start, begun.version if begun and same else None, self.timeout)
            ) as transfer:
                self._check_size(transfer)
                if not start or begun is None or transfer.start == 0 or _continues(transfer, start, begun, same):
                    self._write(url, transfer)
                    return transfer.start == 0
        except TransferError as error:
            if not (start and error.refused_range):
                raise
        self._discard()
        return self._attempt(url)

    def _check_size(self, transfer: Transfer) -> None:
        size = self.archive.size
        if size is not None and transfer.total is not None and transfer.total != size:
            raise TransferError(f"the file there has {transfer.total:,} bytes, expected {size:,}", lasting=True)

    def _write(self, url: str, transfer: Transfer) -> None:
        """Appends the transfer to the part; the part is as long as what has come, whenever it breaks."""
        if transfer.start not in (0, self._have()):
            raise TransferError("the server sends another part than it was asked for", lasting=True)
        total = self.archive.size if transfer.total is None else transfer.total
        have = transfer.start
        if not have:
            self._discard()
        check_space(self.folder, (total or 0) - have, f"downloading {self.archive.name}")
        begun = _Begun(url, transfer.version, total)
        with explained(self.part):
            if self._begun() != begun:
                self.note.write_text(json.dumps(asdict(begun)), encoding="utf-8")
            file = open(self.part, "ab", buffering=0)
        with file, byte_bar(self.archive.filename, total, have, self.progress) as bar:
            for chunk in transfer.chunks():
                needed = None if total is None else total - have
                with explained(self.part, needed, f"{self.part.name} stays and is resumed"):
                    write_all(file, chunk)
                have += len(chunk)
                bar.update(len(chunk))
                if total is not None and have >= total:
                    break
        if total is not None and have < total:
            raise TransferError(f"the connection was cut after {have:,} of {total:,} bytes")

    def _finish(self, in_one_piece: bool) -> None:
        """Gives the part its final name if it is right, and removes it otherwise."""
        if fault := self.archive.fault(self.part):
            self._discard()
            # Pieces may have been damaged on this disk between two runs; a file that came whole was sent so.
            raise TransferError(f"what came {fault}; it is deleted", lasting=in_one_piece)
        with explained(self.final):
            with open(self.part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.part, self.final)
            self.note.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _begun(self) -> _Begun | None:
        try:
            return _Begun(**json.loads(self.note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # never begun, or killed while it was noted

    def _discard(self) -> None:
        with explained(self.part):
            self.note.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)


def _continues(transfer: Transfer, start: int, begun: _Begun, same: bool) -> bool:
    """Whether the transfer goes on where the part ends, with the same file."""
    return (
        transfer.start == start
        and (transfer.total is None or begun.total in (None, transfer.total))
        and (not same or transfer.version in (None, begun.version))
    )
