"""A check that every image of a table can be opened, made once and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_dml.checks import check_choice
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.images.opening import UnreadableImage, cut_box, image_size, in_order, open_image, row_box
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile, write_whole

How = Literal["headers", "decode"]


@dataclass(frozen=True, eq=False)
class Unreadable:
    """The images that cannot be read.

    Args:
        rows: (M,) int64 rows of the table, ascending.
        reasons: what is wrong with each of them.
    """

    rows: IntArray
    reasons: list[str]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)


def check_images(table: ImageTable, how: How, folder: Path, *, progress: bool = True) -> Unreadable:
    """Opens every image of a table, each file once, and lists those that cannot be read.

    The result is kept in `folder`, and the next call with the same paths and boxes opens only the files that were
    unreadable, to see whether they were replaced. It holds as long as the folders that the images lie in have not
    changed, by their times of change. So a file that was added, removed or renamed is noticed; one whose content was
    overwritten in its place is not, and is met when it is read.

    Args:
        table: rows of image files, with or without boxes.
        how: `headers` reads the beginning of each file, which finds what is missing, empty or no image, and boxes that
            hold none of it; `decode` reads it all, which also finds files that were cut off. A kept result of
            `decode` answers for `headers` as well.
        folder: where results are kept; where that is impossible, a warning says so.
        progress: show a progress bar if it takes more than a second.

    Raises:
        InputError: if `how` is neither of the two.
    """
    check_choice("how", how, get_args(How))
    # Before the files are looked at, so that a change in the meantime shows at the next call.
    stamp = _stamp(table)
    at_least: tuple[How, ...] = ("decode",) if how == "decode" else ("decode", "headers")
    for earlier_how in at_least:
        path = _result_path(table, earlier_how, folder)
        earlier = _read(path, stamp, len(table))
        if earlier is not None:
            now = _unreadable(table, earlier.rows, earlier_how, progress)
            if now.rows.tolist() != earlier.rows.tolist() or now.reasons != earlier.reasons:
                _write(path, stamp, now)
            return now
    unreadable = _unreadable(table, np.arange(len(table)), how, progress)
    _write(_result_path(table, how, folder), stamp, unreadable)
    return unreadable


def raise_unreadable(table: ImageTable, unreadable: Unreadable, name: str = "data set") -> None:
    """Raises an error that names the first image that cannot be read, and the way out; returns if all can.

    Raises:
        InputError: if there are rows in `unreadable`.
    """
    if len(unreadable):
        row = int(unreadable.rows[0])
        raise InputError(
            f"{len(unreadable)} of {len(table)} images cannot be read, the first is {table.path(row)} (row {row} of "
            f"the {name}): {unreadable.reasons[0]}; replace them, or set unreadable='skip' to leave them out"
        )


_VERSION = 1  # of the result files; raise it where an image that passed may no longer pass
_CHUNK = 16  # files that a thread takes at a time


def _unreadable(table: ImageTable, rows: IntArray, how: How, progress: bool) -> Unreadable:
    """Opens the files of some rows, (M,) ascending, and lists the rows that cannot be read."""
    by_file, starts = _by_file(table, rows)
    files = len(starts) - 1
    unreadable: list[tuple[int, str]] = []

    def look(first: int) -> tuple[int, list[tuple[int, str]]]:
        last = min(first + _CHUNK, files)
        faults = [_faults(table, by_file[starts[f] : starts[f + 1]].tolist(), how) for f in range(first, last)]
        return last - first, [fault for of_file in faults for fault in of_file]

    with tqdm(total=files, desc="checking images", unit=" files", disable=not progress, delay=1, leave=False) as bar:
        for files_done, faults in in_order(look, range(0, files, _CHUNK)):
            unreadable += faults
            bar.update(files_done)
    unreadable.sort()
    return Unreadable(np.array([row for row, _ in unreadable], np.int64), [reason for _, reason in unreadable])


def _by_file(table: ImageTable, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Rows sorted by file, (M,), files in the order in which they come first, and where each file begins, (F + 1,)."""
    codes, names = table.paths.take(rows).codes()
    first = np.full(len(names), len(codes))
    np.minimum.at(first, codes, np.arange(len(codes)))
    places = np.empty(len(names), np.int64)
    places[np.argsort(first)] = np.arange(len(names))
    files = places[codes]
    ends = np.cumsum(np.bincount(files, minlength=len(names)))
    return rows[np.argsort(files, kind="stable")], np.concatenate([[0], ends]).astype(np.int64)


def _faults(table: ImageTable, rows: list[int], how: How) -> list[tuple[int, str]]:
    """Rows of one file that cannot be read, and the reasons."""
    path = table.path(rows[0])
    try:
        size = open_image(path).size if how == "decode" else image_size(path)
    except UnreadableImage as error:
        return [(row, error.reason) for row in rows]
    faults = []
    for row in rows:
        box = row_box(table, row)
        try:
            if box is not None:
                cut_box(box, size, path)
        except UnreadableImage as error:
            faults.append((row, error.reason))
    return faults


def _result_path(table: ImageTable, how: How, folder: Path) -> Path:
    """File of a result. Labels and roles do not count: other splits of the same rows are as readable."""
    digest = hashlib.blake2b(
        f"{_VERSION} {how} {table.root.absolute()}".encode(errors="surrogateescape"), digest_size=16
    )
    digest.update(table.paths.digest().encode())
    if table.boxes is not None:
        digest.update(np.ascontiguousarray(table.boxes).tobytes())
    return Path(folder) / f"{digest.hexdigest()}.json"


def _stamp(table: ImageTable) -> str:
    """Hash of the times of change of the folders that the images lie in: far fewer questions than files."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in sorted({os.path.dirname(path) for path in table.paths}):
        try:
            changed = os.stat(table.root / folder).st_mtime_ns
        except OSError:
            changed = -1
        digest.update(f"{changed} ".encode())
    return digest.hexdigest()


def _read(path: Path, stamp: str, count: int) -> Unreadable | None:
    """Reads an earlier result; None where there is none that is whole and still holds."""
    try:
        result = json.loads(path.read_text("utf-8"))
        rows, reasons = np.array(result["rows"], np.int64), [str(reason) for reason in result["reasons"]]
        whole = result["stamp"] == stamp and len(rows) == len(reasons) and bool(np.all((rows >= 0) & (rows < count)))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Unreadable(rows, reasons) if whole else None


def _write(path: Path, stamp: str, unreadable: Unreadable) -> None:
    result = {"stamp": stamp, "rows": unreadable.rows.tolist(), "reasons": unreadable.reasons}
    try:
        write_whole(path, json.dumps(result))
    except UnwritableFile as error:
        # Not worth stopping for: the next start looks at the files once more.
        warnings.warn(f"cannot keep the result of the image check in {path.parent}: {error}", stacklevel=3)
