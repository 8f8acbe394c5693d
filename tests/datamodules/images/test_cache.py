"""The cache of resized images: the same pictures, made once, and never a wrong one."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_dml.datamodules.images import cache as image_cache
from lightning_dml.datamodules.images import cache_file as image_cache_file
from lightning_dml.datamodules.images.cache import ImageCache
from lightning_dml.datamodules.images.opening import open_row
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError
from tests.datamodules.images.cases import RESIZE, build, files, picture_of_file


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("boxes", [True, False])
def test_raw_pictures_are_bit_for_bit_those_of_the_files(
    interpolation: str, boxes: bool, table: ImageTable, tmp_path: Path
) -> None:
    """A cache is about speed; a run with it must give the numbers of a run without."""
    table = table if boxes else replace(table, boxes=None)
    cache = build(table, tmp_path / "cache", interpolation=interpolation)
    assert len(cache) == 6
    for row in range(6):
        assert cache[row].mode == "RGB" and min(cache[row].size) == RESIZE
        assert np.array_equal(np.asarray(cache[row]), picture_of_file(table, row, interpolation=interpolation))
    assert np.array_equal(np.asarray(cache[-1]), np.asarray(cache[5]))
    assert np.array_equal(np.asarray(cache[np.int64(2)]), np.asarray(cache[2]))
    for row in (6, -7):
        with pytest.raises(IndexError, match="of 6 pictures"):
            cache[row]


def test_jpeg_pictures_are_near_those_of_the_files(table: ImageTable, tmp_path: Path) -> None:
    """The smaller encoding may cost a shade of colour, and not more."""
    cache = build(table, tmp_path / "cache", encoding="jpeg")
    for row in range(6):
        expected = picture_of_file(table, row).astype(int)
        away = np.abs(np.asarray(cache[row]).astype(int) - expected)
        assert away.shape == expected.shape and away.max() <= 16 and away.mean() < 2
    large = {encoding: build(table, tmp_path / encoding, resize=200, encoding=encoding) for encoding in ("raw", "jpeg")}
    assert large["jpeg"].nbytes < large["raw"].nbytes / 10
    assert large["raw"].nbytes == large["raw"].path.stat().st_size


def test_a_picture_may_be_written_into(table: ImageTable, tmp_path: Path) -> None:
    """Transforms work in place at times; what the next epoch reads must not change."""
    cache = build(table, tmp_path / "cache")
    before = np.array(cache[0])
    cache[0].paste((1, 2, 3), (0, 0, 9, 9))
    assert np.array_equal(np.asarray(cache[0]), before)


def test_a_second_build_opens_the_file_that_is_there(table: ImageTable, tmp_path: Path, opened: Counter[str]) -> None:
    """Building takes as long as an epoch; every start of a training would pay it."""
    first = build(table, tmp_path / "cache")
    assert opened == {"a.jpg": 1, "1.png": 2, "c.jpg": 1, "d.png": 1, "ü.png": 1}
    opened.clear()
    again = build(table.with_labels(np.zeros(6)), tmp_path / "cache")
    assert not opened and again.path == first.path
    assert np.array_equal(np.asarray(again[3]), np.asarray(first[3]))


def change(table: ImageTable, what: str) -> tuple[ImageTable, dict[str, Any]]:
    """Another table or other options, which need another cache."""
    path = table.path(0)
    if what == "touched":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    if what == "replaced":
        state = path.stat()
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    if what == "box":
        assert table.boxes is not None
        boxes = table.boxes.copy()
        boxes[0, 0] = 1
        table = replace(table, boxes=boxes)
    if what == "no boxes":
        table = replace(table, boxes=None)
    if what == "order":
        table = table.take([1, 0, 2, 3, 4, 5])
    options: dict[str, Any] = {
        "resize": {"resize": RESIZE + 1},
        "interpolation": {"interpolation": "bicubic"},
        "encoding": {"encoding": "jpeg"},
    }
    return table, options.get(what, {})


CHANGES = ["touched", "replaced", "box", "no boxes", "order", "resize", "interpolation", "encoding", "pillow"]


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_pictures_makes_another_cache(
    what: str, table: ImageTable, tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale cache trains on other pictures than the user believes, in silence; the old one is gone to save space."""
    folder = tmp_path / "cache"
    old = build(table, folder).path
    if what == "pillow":
        monkeypatch.setattr(image_cache, "pillow_version", "0.1")
    opened.clear()
    other, options = change(table, what)
    new = build(other, folder, **options)
    assert new.path != old and sum(opened.values()) == 6
    # Another list of files may be another data set, whose cache is still wanted.
    assert files(folder) == sorted([new.path.name, *([old.name] if what == "order" else [])])
    if what not in ("encoding", "replaced"):
        assert all(np.array_equal(np.asarray(new[row]), picture_of_file(other, row, **options)) for row in range(6))


@pytest.mark.parametrize("damage", ["empty", "head", "tables", "cut", "longer", "magic", "text", "other", "misnamed"])
def test_a_damaged_cache_is_built_anew(damage: str, table: ImageTable, tmp_path: Path, opened: Counter[str]) -> None:
    """Disks fill up and copies break off; the pictures behind a wrong offset would be noise."""
    folder = tmp_path / "cache"
    cache = build(table, folder)
    path, content = cache.path, cache.path.read_bytes()
    del cache
    gc.collect()
    text = content.index(b'"resize"')
    broken = {
        "empty": b"",
        "head": content[:20],
        "tables": content[: text + 200],
        "cut": content[:-1],
        "longer": content + b"x",
        "magic": b"x" + content[1:],
        "text": content[:text] + b"x" + content[text + 1 :],
        "other": content.replace(b'"resize": 24', b'"resize": 25'),
    }
    if damage == "misnamed":
        other = build(table, tmp_path / "other", resize=RESIZE + 1)
        shutil.copy(other.path, path)
    else:
        path.write_bytes(broken[damage])
        with pytest.raises(InputError, match="image cache "):
            ImageCache(path)
    opened.clear()
    with pytest.warns(UserWarning, match=r"image cache .* it is built anew now"):
        cache = build(table, folder)
    assert sum(opened.values()) == 6
    assert all(np.array_equal(np.asarray(cache[row]), picture_of_file(table, row)) for row in range(6))


def test_every_byte_of_the_tables_is_watched(table: ImageTable, tmp_path: Path) -> None:
    """A flipped bit in an offset would show parts of two pictures as one."""
    cache = build(table, tmp_path / "cache")
    content = bytearray(cache.path.read_bytes())
    first, other = int(cache._file.offsets[0]), tmp_path / "other.images"
    text = image_cache_file._HEAD.size + len(content[image_cache_file._HEAD.size : first].split(b"}")[0]) + 1
    padding = range(text, image_cache_file._after_text(text - image_cache_file._HEAD.size))
    for place in range(first):
        if place in padding:
            continue
        content[place] ^= 1
        other.write_bytes(content)
        with pytest.raises(InputError):
            ImageCache(other)
        content[place] ^= 1


def test_a_damaged_jpeg_in_the_cache_is_an_error(table: ImageTable, tmp_path: Path) -> None:
    """Half a grey picture is worse than a stop."""
    cache = build(table, tmp_path / "cache", encoding="jpeg")
    content = bytearray(cache.path.read_bytes())
    start, end = cache._file.offsets[2:4].tolist()
    content[start + 10 : end] = bytes(end - start - 10)
    other = tmp_path / "other.images"
    other.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.images \(row 2 "):
        ImageCache(other)[2]


class Pictures(Dataset[tuple[int, int, bytes]]):
    """The cache in a worker: which process reads, and what."""

    def __init__(self, cache: Sequence[Image.Image]) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> tuple[int, int, bytes]:
        """Process, row and pixels."""
        return os.getpid(), row, self.cache[row].tobytes()


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_read_the_same_pictures(start: str, table: ImageTable, tmp_path: Path) -> None:
    """Both ways to start workers are in use: one inherits the mapping, the other gets the path."""
    cache = build(table, tmp_path / "cache")
    assert len(pickle.dumps(cache)) < 400
    loader = DataLoader(Pictures(cache), batch_size=None, num_workers=2, multiprocessing_context=start)
    pictures = list(loader)
    assert len({process for process, _, _ in pictures} - {os.getpid()}) == 2
    assert [(row, pixels) for _, row, pixels in pictures] == [
        (row, picture_of_file(table, row).tobytes()) for row in range(6)
    ]


def test_the_file_is_let_go_of(table: ImageTable, tmp_path: Path) -> None:
    """A study of a hundred runs in one process must not keep a hundred caches mapped."""
    cache = build(table, tmp_path / "cache")
    name = cache.path.name
    assert name in Path("/proc/self/maps").read_text()
    del cache
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()
    assert not any(name in os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def test_many_rows_cost_no_objects(tmp_path: Path) -> None:
    """Each worker would copy a list of a million entries page by page, as it counts references to them."""
    path, rows = tmp_path / "large.images", 300_000
    about = {"rows": rows, "encoding": "raw", "key": ""}
    with open(path, "xb") as file:
        image_cache_file.write_cache(file, about, ((bytes([row % 256] * 3), (1, 1)) for row in range(rows)))
    ImageCache(path)
    tracemalloc.start()
    cache = ImageCache(path)
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 50_000
    assert len(cache) == rows and cache[299_999].getpixel((0, 0)) == (299_999 % 256,) * 3


def test_an_empty_table_has_an_empty_cache(tmp_path: Path) -> None:
    """A data set without images of some split is cached like the others."""
    assert len(build(ImageTable(tmp_path, Texts(), np.zeros(0, np.int64)), tmp_path / "cache")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "resize must be an integer of at least 1, got 0"),
        ({"encoding": "png"}, "encoding must be one of raw, jpeg, got 'png'"),
        ({"workers": 0}, "workers must be an integer of at least 1, got 0; None takes one for each core"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str, table: ImageTable, tmp_path: Path) -> None:
    """A config with a slip in it must be refused before the first image is read."""
    with pytest.raises(InputError, match=message):
        build(table, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_progress_bar_is_for_long_builds(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A silent hour looks like a hang; a bar in every log of a small run is noise."""
    build(table, tmp_path / "quick", progress=True)
    assert capsys.readouterr().err == ""

    def slow(table: ImageTable, row: int) -> Image.Image:
        time.sleep(0.25)
        return open_row(table, row)

    monkeypatch.setattr(image_cache, "open_row", slow)
    for progress in (False, True):
        build(table, tmp_path / str(progress), progress=progress, workers=1)
        assert ("caching images images" in capsys.readouterr().err) is progress
