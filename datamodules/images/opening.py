"""Opening image files: one, and many of them by several threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageFile, UnidentifiedImageError

from lightning_dml.cores import cores
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError

Box = tuple[int, int, int, int]
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


class UnreadableImage(InputError):
    """An image that is missing or damaged, or whose box holds none of its pixels.

    Args:
        message: names the file, its row, the reason and the way out.
        reason: the reason alone, for lists of many files.
    """

    # One argument is enough, because a DataLoader raises the errors of its workers anew from their text.
    def __init__(self, message: str, reason: str = "") -> None:
        """Keeps the reason; see the class."""
        super().__init__(message)
        self.reason = reason


def open_image(path: Path, box: Box | None = None, row: int | None = None) -> Image.Image:
    """Reads an image file, in RGB.

    Nothing but the colours is converted, as PIL's `convert("RGB")` does it: an alpha channel or a transparent colour
    is dropped, not blended, and an orientation in the EXIF data is not applied. Of a file with several pictures
    the first is read.

    Args:
        path: the file.
        box: x_1, y_1, x_2, y_2 in pixels, the last two past the edge, of the part to return. What sticks out of the
            image is cut off, because boxes that people drew often do by a pixel or two.
        row: of the file in its data set, which the error names.

    Returns:
        The picture, of a size of at least 1 x 1; the file is closed.

    Raises:
        UnreadableImage: an InputError; if the file is missing, is no image, is cut off (whatever PIL's
            `LOAD_TRUNCATED_IMAGES` says) or otherwise damaged, or if the box lies outside the image or is empty.
    """
    with explaining(path, row):
        whole = decode(path)
        return whole if box is None else whole.crop(cut_box(box, whole.size, path, row))


def open_row(table: ImageTable, row: int) -> Image.Image:
    """The picture of a row of a table, cut to its box if it has one; see `open_image`."""
    return open_image(table.path(row), row_box(table, row), row)


def row_box(table: ImageTable, row: int) -> Box | None:
    """The box of a row; None is the whole image, as four zeros are."""
    if table.boxes is None or not table.boxes[row].any():
        return None
    x_1, y_1, x_2, y_2 = table.boxes[row].tolist()
    return x_1, y_1, x_2, y_2


def image_size(path: Path, row: int | None = None) -> tuple[int, int]:
    """Width and height in pixels as the file's header says; the rest of the file is not read.

    Args:
        path: the file.
        row: of the file in its data set, which the error names.

    Raises:
        UnreadableImage: if the file is missing, or its beginning is not that of an image.
    """
    with explaining(path, row), _STRICTLY, Image.open(path) as image:
        return image.size


def cut_box(box: Box, size: tuple[int, int], path: Path, row: int | None = None) -> Box:
    """The part of a box that lies inside an image of `size` (width, height).

    Raises:
        UnreadableImage: if there is none.

    Examples:
        >>> cut_box((-2, 5, 50, 30), (40, 30), Path("a.jpg"))
        (0, 5, 40, 30)
    """
    cut = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        reason = f"its box {tuple(box)} (x_1, y_1, x_2, y_2) holds no pixel of its {size[0]} x {size[1]}"
        raise _unreadable(path, row, reason, "correct the box or remove the row")
    return cut


def decode(source: Path | BinaryIO) -> Image.Image:
    """The whole picture of a file in RGB, by the rules of `open_image`, but with PIL's own errors."""
    with _STRICTLY, Image.open(source) as image:
        image.load()
        # PIL warns of a palette with several transparent colours, and converts the colours all the same.
        image.info.pop("transparency", None)
        return image.convert("RGB")


@contextmanager
def explaining(path: Path | str, row: int | None = None) -> Iterator[None]:
    """Turns any error of a file into an `UnreadableImage` that names the file and its row."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:  # PIL's readers of damaged files raise almost anything, KeyError and TypeError included
        raise _unreadable(path, row, *_reason(error)) from error


def in_order(
    function: Callable[[Task], Outcome], tasks: Iterable[Task], workers: int | None = None
) -> Generator[Outcome, None, None]:
    """Maps a function over tasks in threads; gives the results in the order of the tasks, few in memory at a time.

    Threads are enough, because PIL lets go of the interpreter while it decodes and resizes. The first error stops the
    rest.

    Args:
        function: called in any of the threads.
        tasks: its arguments, taken only as the results are.
        workers: how many threads; None means one for each core that this process may use, at most 8.
    """
    # PIL imports its formats at the first file that needs them, which fails where two threads meet there.
    Image.init()
    count = workers if workers is not None else min(8, cores())
    pool = ThreadPoolExecutor(count, thread_name_prefix="images")
    begun: deque[Future[Outcome]] = deque()
    try:
        for task in tasks:
            if len(begun) == 2 * count:
                yield begun.popleft().result()
            begun.append(pool.submit(function, task))
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Strictly:
    """Switches PIL's acceptance of truncated files off while any thread is inside, and then back.

    Other libraries switch it on for the whole process, and the missing part of a picture is then grey without a word.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts with nobody inside and the lock free, as it is in a process that was just forked."""
        self._lock = threading.Lock()
        self._inside = 0
        self._before = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_STRICTLY = _Strictly()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_STRICTLY.reset)


def _reason(error: Exception) -> tuple[str, str]:
    """Reason of an error in plain words, and the way out."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "there is no such file", "restore the file or remove its row"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, no image, or of a kind that Pillow cannot read", "replace or remove the file"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason, "replace or remove the file"


def _unreadable(path: Path | str, row: int | None, reason: str, way_out: str) -> UnreadableImage:
    where = "" if row is None else f" (row {int(row)} of the data set)"
    return UnreadableImage(f"cannot read image {path}{where}: {reason}; {way_out}", reason)
