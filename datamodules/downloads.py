"""The archives of CUB-200-2011 and Stanford Online Products: fetched, verified, unpacked, and never there by halves."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from tqdm.utils import CallbackIOWrapper  # type: ignore[import-untyped]

from lightning_dml.errors import InputError

_TIMEOUT = 60.0  # seconds without a byte after which a connection counts as cut
_WAITS = (0.0, 2.0, 10.0)  # seconds before each attempt at a URL
_BLOCK = 1 << 20  # bytes that are read at a time
_LARGEST = 100 * 10**9  # bytes; contents above are a bomb

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Args:
        name: what people call it, for messages.
        urls: of http or https, tried in this order.
        filename: of the archive on disk; `.zip`, or else a tar file with any compression.
        size: in bytes.
        checksum: `sha256:` and 64 hexadecimal digits.
    """

    name: str
    urls: tuple[str, ...]
    filename: str
    size: int
    checksum: str

    def fault(self, path: Path) -> str | None:
        """The end of a sentence on a file that is not this archive; None for one that is."""
        if not path.is_file():
            return "is not a file"
        if (size := path.stat().st_size) != self.size:
            return f"has {size:,} bytes, expected {self.size:,}"
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        got = f"sha256:{digest.hexdigest()}"
        return None if got == self.checksum else f"has the checksum {got}, expected {self.checksum}"


CUB_200_2011 = Archive(
    name="CUB-200-2011",  # Caltech-UCSD Birds
    # The URL: pytorch-metric-learning 2.9.0 datasets/cub.py, and issue 5544 of tensorflow/datasets.
    urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    filename="CUB_200_2011.tgz",
    # tensorflow/datasets at 333639b3, url_checksums/caltech_birds2011.txt; fastai's download checks have the same.
    size=1_150_585_339,
    # The sha256 of that same line. Those who check md5 have 97eceeb196236b17998738112f37df78, among them cub2011.py of
    # TDeVries/cub2011_dataset at 939292d3.
    checksum="sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
)

STANFORD_ONLINE_PRODUCTS = Archive(
    name="Stanford Online Products",
    urls=(
        # The authors' server: chainercv's reader of the data set. The same over FTP, which is not for us, is
        # ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip in the file of tensorflow/datasets below.
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
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


def obtain(archive: Archive, folder: Path, contents: str) -> Path:
    """Downloads and unpacks an archive where its contents are missing.

    All work is done in a hidden folder beside the result, which gets its name when it is whole. An archive that a
    person has put at `folder / archive.filename` is verified and used in place of a download. The archive is removed
    once it is unpacked. Of several processes one works and the others wait.

    Args:
        archive: the archive.
        folder: where archive and contents go; made where it is missing.
        contents: the folder at the top of the archive that is kept.

    Returns:
        `folder / contents`.

    Raises:
        InputError: without pooch, a URL that gives the archive, room on the disk, or a tarfile that refuses what is
            unsafe; for another file in the archive's place; for an archive that is damaged, leads out of its folder,
            holds links or devices, or has no folder `contents`.
    """
    target, lock = folder / contents, folder / f".{archive.filename}.lock"
    if target.is_dir():
        return target
    if not hasattr(tarfile, "data_filter"):
        raise InputError(
            f"unpacking {archive.filename} takes a tarfile that refuses unsafe members, of Python 3.10.12, 3.11.4 or "
            f"later, got {sys.version.split()[0]}: take a later Python, or put the unpacked folder at {target}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(lock):
            if not target.is_dir():
                _make(target, archive)
    except (OSError, NotImplementedError) as error:  # the latter is filelock's, on a disk without locks
        raise InputError(
            f"cannot write {archive.name} to folder {folder} ({error}): make it writable, with room, or choose another"
        ) from error
    with suppress(OSError):
        lock.unlink()  # nobody works under it again: those that wait for it find the target
    return target


def _locked(path: Path) -> AbstractContextManager[Any]:
    """Takes a lock, and says so where it has to wait; the system frees the lock of a process that dies."""
    lock = FileLock(str(path))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that holds %s", path)
        return lock.acquire()


def _make(target: Path, archive: Archive) -> None:
    path, work = target.with_name(archive.filename), target.with_name(f".{archive.filename}.part")
    shutil.rmtree(work, ignore_errors=True)  # a process that was killed leaves it
    work.mkdir()
    try:
        if not path.exists():
            os.replace(_download(archive, work, path), path)
        elif fault := archive.fault(path):
            raise InputError(
                f"{path} is not {archive.name}: it {fault}; delete it to have it fetched, or put the right file there"
            )
        _unpack(path, work, target.name)
        os.rename(work / target.name, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    path.unlink()


def _download(archive: Archive, work: Path, path: Path) -> Path:
    """Fetches the archive into the folder `work`; `path` is where a person would put it."""
    command = f"curl -L -C - -o {shlex.quote(str(path))} {shlex.quote(archive.urls[0])}"
    by_hand = f"fetch it by hand ({command}, or a browser), put it at {path} and start again: it is verified and used"
    try:
        import pooch
        import requests
    except ImportError as error:
        raise InputError(
            f"downloading {archive.name} needs the package pooch: pip install 'lightning-dml[data]', or {by_hand}"
        ) from error
    _check_space(work, archive.size, f"downloading {archive.name}")
    # Servers that may compress call a .tgz compressed, and requests would then decompress it.
    fetch = pooch.HTTPDownloader(chunk_size=_BLOCK, timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"})

    def fetch_with_bar(url: str, output_file: str, pup: Any) -> None:
        bar = tqdm(desc=archive.filename, total=archive.size, unit="B", unit_scale=True, disable=None)

        def count(size: int) -> None:
            bar.update(size)
            if file.tell() > archive.size:
                raise ValueError(f"the file there has more than the expected {archive.size:,} bytes")

        with bar, open(output_file, "wb") as file:
            fetch(url, CallbackIOWrapper(count, file, "write"), pup)

    reasons: dict[str, Exception] = {}
    for url in archive.urls:
        for wait in _WAITS:
            time.sleep(wait)
            try:
                return Path(pooch.retrieve(url, archive.checksum, archive.filename, work, downloader=fetch_with_bar))
            except (requests.RequestException, ValueError) as error:
                reasons[url] = error
                if isinstance(error, ValueError):
                    break  # other bytes than the published ones, or a redirect to no web page, which would come again
    failures = "; ".join(f"{url} ({' '.join(str(reason).split())})" for url, reason in reasons.items())
    raise InputError(f"cannot download {archive.name} from {failures}: try again later, or {by_hand}")


def _unpack(path: Path, work: Path, contents: str) -> None:
    """Unpacks an archive that holds the folder `contents` to `work`, with the permissions and times of new files."""
    try:
        with zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path) as source:
            calls, total = [], 0
            for name, size, is_plain, extract in _members(source):
                inside = PureWindowsPath(name)  # knows both kinds of slashes, and drives
                if inside.anchor or ".." in inside.parts or "\0" in name:
                    raise InputError(f"archive {path} is refused: {name!r} would be written outside of its folder")
                if not is_plain:
                    raise InputError(f"archive {path} is refused: {name!r} is a link, a device or a pipe")
                total += size
                if total > _LARGEST:
                    raise InputError(f"archive {path} is refused: it would unpack to more than {_LARGEST:,} bytes")
                calls.append(extract)
            _check_space(work, total, f"unpacking {path.name}")
            for extract in tqdm(calls, desc=contents, unit="file", disable=None):
                extract(path=work)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        fault = f"is damaged or unsafe ({' '.join(str(error).split()) or type(error).__name__})"
        raise InputError(f"archive {path} {fault}: delete it to have it fetched") from error
    if not (work / contents).is_dir():
        raise InputError(f"archive {path} has no folder {contents!r}: put the right archive there")


def _members(source: zipfile.ZipFile | tarfile.TarFile) -> Iterator[tuple[str, int, bool, Callable[..., Any]]]:
    """Each member's name, its bytes, whether it is a file or a folder, and the call that unpacks it to a `path`."""
    if isinstance(source, zipfile.ZipFile):
        for info in source.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the file was not made on Unix
            yield info.filename, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR), partial(source.extract, info)
    else:
        for member in source:
            extract = partial(source.extract, member, set_attrs=False, filter="data")
            yield member.name, member.size, member.isreg() or member.isdir(), extract


def _check_space(folder: Path, size: int, purpose: str) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        problem = f"folder {folder.parent} has {free:,} bytes free, and {purpose} needs {size:,}"
        raise InputError(f"{problem}: free {size - free:,} bytes or choose a folder on another disk")
