"""A cache of images that are cropped and resized already, in one memory-mapped file."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import operator
import os
import re
import shutil
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_dml.checks import check_choice, check_count
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.images.cache_file import (
    FORMAT,
    delete_unused,
    map_cache,
    read_about,
    write_cache,
)
from lightning_dml.datamodules.images.opening import decode, explaining, in_order, open_row
from lightning_dml.datamodules.images.transforms import resize_image
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile, delete_parts, locked, replacing

Encoding = Literal["raw", "jpeg"]


class ImageCache(Sequence[Image.Image]):
    """The pictures of a table, cropped to their boxes and scaled, in the order of its rows.

    They lie in one file that every process maps, so that all of them share one copy in memory, and which the operating
    system keeps in memory as far as there is room. Pickled to a worker, only the path travels.

    Args:
        path: a file that `build` made.

    Raises:
        InputError: if there is no such file, or it is damaged. On access, if a picture in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file until the object is deleted."""
        self.path = Path(path)
        self._file = map_cache(self.path)

    @classmethod
    def build(
        cls,
        table: ImageTable,
        folder: Path,
        *,
        resize: int,
        interpolation: str,
        encoding: Encoding = "raw",
        stem: str = "images",
        progress: bool = True,
        workers: int | None = None,
    ) -> ImageCache:
        """Opens the cache of a table, after making it where there is none that fits.

        The name of the file holds a hash of the settings, of the version of Pillow, and of every row's path, box, file
        size and time of change: whatever else is asked for, or a changed file, makes another. When it stands, older
        caches of that stem, root and list of paths are deleted, except those that a process still has open. Of several
        processes on a machine one builds, and the others wait.

        Args:
            table: rows of image files, with or without boxes.
            folder: of the caches; it is made if need be.
            resize: pixels of the shorter side, as the first step of the transforms makes it.
            interpolation: of the transforms, such as `bilinear`.
            encoding: `raw` keeps the pixels, 3 bytes each, exactly as the resize gives them; `jpeg` keeps them in JPEG
                of quality 95 without chroma subsampling, in about a tenth of the space, with small differences.
            stem: beginning of the file's name, one for each split.
            progress: show a progress bar if it takes more than a second.
            workers: threads that open and scale images; None means one for each core, at most 8.

        Raises:
            InputError: for an option out of range, an image that cannot be read (with its row), or a folder that
                cannot be written to or has too little space. Nothing but an empty lock file is then left behind.
        """
        check_count("resize", resize)
        check_choice("encoding", encoding, get_args(Encoding))
        if workers is not None:
            check_count("workers", workers, hint="None takes one for each core")
        settings = {"resize": resize, "interpolation": str(interpolation), "encoding": encoding}
        key = _key(table, settings, workers)
        whose = {"root": str(table.root.absolute()), "paths": table.paths.digest()}
        about: dict[str, Any] = {**settings, **whose, "rows": len(table), "key": key}
        name = urllib.parse.quote(stem, safe="")
        path = Path(folder) / f"{name}-{key}.images"
        with suppress(InputError):
            return cls._fitting(path, key)
        pictures = in_order(partial(_picture, table, resize, interpolation, encoding), range(len(table)), workers)
        try:
            with locked(path.with_name(f".{name}.lock")):
                _delete_parts(path, name)
                if path.exists():
                    try:
                        return cls._fitting(path, key)
                    except InputError as error:
                        warnings.warn(f"{error}; it is built anew now", stacklevel=2)
                bar = tqdm(total=len(table), desc=f"caching {stem} images", disable=not progress, delay=1, leave=False)
                with bar, closing(pictures):
                    _write(path, about, _watched(pictures, path.parent, len(table), bar.update))
                cache = cls(path)
                _delete_older(path, name, whose)
                return cache
        except OSError as error:
            reason = error.__cause__ if isinstance(error, UnwritableFile) else error
            if getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(path.parent, len(table)) from error
            raise InputError(
                f"cannot write an image cache to {path.parent}: {reason}; give the cache another folder"
            ) from error

    @classmethod
    def _fitting(cls, path: Path, key: str) -> ImageCache:
        cache = cls(path)
        if cache._file.about.get("key") != key:
            raise InputError(f"image cache {path} is not what its name says")
        return cache

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._file.sizes)

    def __getitem__(self, row: SupportsIndex) -> Image.Image:  # type: ignore[override]  # of no use in slices
        """The picture of a row in RGB, a copy of its own; negative rows count from the end."""
        row = operator.index(row)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} pictures")
        row %= len(self)
        data = self._file.data[self._file.offsets[row] : self._file.offsets[row + 1]]
        if self._file.about["encoding"] == "raw":
            width, height = self._file.sizes[row].tolist()
            return Image.fromarray(data.reshape(height, width, 3))
        with explaining(self.path, row):
            return decode(io.BytesIO(data.data))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.data.nbytes

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        """Pickles as the path; the other process maps the file anew."""
        return type(self), (self.path,)


_CHUNK = 4096  # files that a thread asks for their size at a time
_CHECKED = 256  # pictures between two looks at the free space


def _key(table: ImageTable, settings: dict[str, Any], workers: int | None) -> str:
    # Another Pillow may decode or scale with other rounding.
    digest = hashlib.blake2b(json.dumps([FORMAT, pillow_version, settings]).encode(), digest_size=16)
    digest.update(table.paths.digest().encode())
    if table.boxes is not None:
        digest.update(np.ascontiguousarray(table.boxes, "<i4").data)
    chunks = (range(first, min(first + _CHUNK, len(table))) for first in range(0, len(table), _CHUNK))
    for states in in_order(partial(_states, table), chunks, workers):
        digest.update(states.data)
    return digest.hexdigest()


def _states(table: ImageTable, rows: range) -> IntArray:
    """Sizes in bytes and times of change in nanoseconds of the files of some rows, (M, 2)."""
    root = os.fspath(table.root)
    states = np.empty((len(rows), 2), "<i8")
    for place, row in enumerate(rows):
        path = os.path.join(root, table.paths[row])
        with explaining(path, row):
            state = os.stat(path)
        states[place] = state.st_size, state.st_mtime_ns
    return states


def _picture(
    table: ImageTable, resize: int, interpolation: str, encoding: Encoding, row: int
) -> tuple[bytes, tuple[int, int]]:
    image = resize_image(open_row(table, row), resize, interpolation)
    if encoding == "raw":
        return image.tobytes(), image.size
    with io.BytesIO() as buffer:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue(), image.size


def _watched(
    pictures: Iterator[tuple[bytes, tuple[int, int]]], folder: Path, rows: int, report: Callable[[], object]
) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Passes the pictures on for as long as the rest of them seems to find room in the folder."""
    bytes_so_far = 0
    for count, picture in enumerate(pictures, start=1):
        yield picture
        report()
        bytes_so_far += len(picture[0])
        # A tenth less than the estimate, so that a guess does not stop a cache that would have fitted.
        if count % _CHECKED == 0 and 0.9 * bytes_so_far * (rows / count - 1) > shutil.disk_usage(folder).free:
            raise _no_room(folder, rows, bytes_so_far * rows // count)


def _no_room(folder: Path, rows: int, size: int | None = None) -> InputError:
    about = "" if size is None else f", about {size / 2**30:.2f} GiB"
    free = shutil.disk_usage(folder).free / 2**30
    return InputError(
        f"the cache of {rows} images{about}, does not fit into {folder}, where {free:.2f} GiB are free: give the cache "
        "another folder, or store it as 'jpeg' or at a smaller resize"
    )


def _write(path: Path, about: dict[str, Any], pictures: Iterator[tuple[bytes, tuple[int, int]]]) -> None:
    with replacing(path) as aside, open(aside, "xb") as file:
        write_cache(file, about, pictures)


def _delete_parts(path: Path, name: str) -> None:
    """Deletes parts that killed processes left of caches of this stem; under the lock, so that nobody is writing."""
    keyed = rf"{re.escape(name)}-[0-9a-f]{{32}}"
    delete_parts(path, keyed)
    for entry in list(path.parent.iterdir()):
        # Earlier versions called their parts so, and one may be as large as a data set.
        if re.fullmatch(rf"{keyed}\.images\.[0-9a-f]{{32}}\.part", entry.name):
            entry.unlink(missing_ok=True)


def _delete_older(path: Path, name: str, whose: dict[str, str]) -> None:
    """Deletes the other caches of the same stem and files, and damaged ones of that stem, where nobody uses them."""
    for entry in list(path.parent.iterdir()):
        if entry != path and re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{32}}\.images", entry.name):
            about = read_about(entry)
            if about is None or {**about, **whose} == about:
                delete_unused(entry)
