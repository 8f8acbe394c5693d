"""Building an image cache: by one process at a time, whole or not at all, and in place of the caches before it."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed
from PIL import Image, ImageFile

from lightning_dml.datamodules.images import cache as image_cache
from lightning_dml.datamodules.images.opening import open_row
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError
from tests.datamodules.images.cases import RESIZE, build, files, picture_of_file
from tests.helpers import run_ranks


def test_only_caches_of_the_same_stem_and_root_are_replaced(table: ImageTable, tmp_path: Path) -> None:
    """Splits and data sets may share a folder; each must find its cache again."""
    folder = tmp_path / "cache"
    shutil.copytree(table.root, tmp_path / "other")  # with other times of change
    caches = [
        build(table, folder, stem="train"),
        build(table, folder, stem="train-val"),
        build(table, folder, stem="night/val"),
        build(replace(table, root=tmp_path / "other"), folder, stem="train", resize=RESIZE + 2),
    ]
    names = {cache.path.name for cache in caches}
    del caches
    gc.collect()
    new = build(table, folder, stem="train", resize=RESIZE + 1)
    assert len(names) == 4
    left = set(files(folder))
    assert new.path.name in left and len(names & left) == 3 and len(left) == 4


def test_a_cache_that_is_in_use_is_not_deleted(table: ImageTable, tmp_path: Path) -> None:
    """Workers of another run map the file again at each epoch; without it that run would die."""
    folder = tmp_path / "cache"
    old_cache = build(table, folder)
    new = build(table, folder, resize=RESIZE + 1)
    assert files(folder) == sorted([old_cache.path.name, new.path.name])
    assert len(pickle.loads(pickle.dumps(old_cache))) == 6
    del old_cache
    gc.collect()
    newest = build(table, folder, resize=RESIZE + 2)
    assert files(folder) == sorted([new.path.name, newest.path.name])


def build_at_once(rank: int, ranks: int, table: ImageTable, folder: Path) -> tuple[int, bytes]:
    """Builds in one of several processes; returns the number of images that it opened, and one picture."""
    torch.distributed.barrier()
    counts = 0
    real = Image.open

    def counting(*args: Any) -> ImageFile.ImageFile:
        nonlocal counts
        counts += 1
        time.sleep(0.05)  # long enough for the other to come by
        return real(*args)

    Image.open = counting  # type: ignore[assignment]
    picture = build(table, folder)[4].tobytes()
    return counts, picture


def test_of_two_processes_one_builds(table: ImageTable, tmp_path: Path) -> None:
    """The ranks of a machine start together; each building its own would double the time and race for the name."""
    outcomes = run_ranks(2, build_at_once, table, tmp_path / "cache")
    assert sorted(count for count, _ in outcomes) == [0, 6]
    assert outcomes[0][1] == outcomes[1][1] == picture_of_file(table, 4).tobytes()
    assert len(files(tmp_path / "cache")) == 1


def build_slowly(table: ImageTable, folder: Path) -> None:
    """A build that hangs at its fourth picture."""

    def hanging(table: ImageTable, row: int) -> Image.Image:
        if row == 3:
            time.sleep(60)
        return open_row(table, row)

    with mock.patch.object(image_cache, "open_row", hanging):
        build(table, folder, workers=1)


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(
    table: ImageTable, tmp_path: Path, opened: Counter[str]
) -> None:
    """Jobs are killed at time limits; a half cache that passes would be black pictures for months."""
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("forkserver").Process(target=build_slowly, args=(table, folder))
    process.start()
    limit = time.monotonic() + 60
    while not folder.exists() or not files(folder):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = files(folder)
    assert ".part" in left
    # An earlier version called its parts so, and the next build asks for other settings than the one that was killed.
    name = left.strip(".").split(".")[0]
    (folder / f"{name}.images.{'0' * 32}.part").touch()
    other = folder / f"other-{name.split('-')[1]}.images.{'0' * 32}.part"
    other.touch()
    cache = build(table, folder, resize=RESIZE + 1)
    assert files(folder) == sorted([cache.path.name, other.name]) and sum(opened.values()) == 6


def test_an_unreadable_image_stops_the_build(table: ImageTable, tmp_path: Path) -> None:
    """A black picture in its place would be trained on for months."""
    path = table.path(3)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cannot read image .*d\.png \(row 3 of the data set\)"):
        build(table, tmp_path / "cache")
    assert files(tmp_path / "cache") == []
    path.unlink()
    with pytest.raises(
        InputError, match=r"cannot read image .*d\.png \(row 3 of the data set\): there is no such file"
    ):
        build(table, tmp_path / "cache")


def test_too_little_space_is_said_before_the_disk_is_full(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of building that end in a full disk, shared with others, help nobody."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(image_cache, "_CHECKED", 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 3000, 3000))
    read: list[int] = []

    def counting(table: ImageTable, row: int) -> Image.Image:
        read.append(row)
        return open_row(table, row)

    monkeypatch.setattr(image_cache, "open_row", counting)
    many = table.take(np.arange(600) % 6)
    with pytest.raises(
        InputError, match=r"the cache of 600 images, about 0\.00 GiB, does not fit into .*another folder"
    ):
        build(many, tmp_path / "cache", workers=1)
    assert len(read) < 10 and files(tmp_path / "cache") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_leaves_nothing_behind(
    code: int, table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a cache on a full disk would keep it full."""

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    message = "cannot write an image cache" if code == errno.EIO else "does not fit into"
    with pytest.raises(InputError, match=f"{message}.*another folder"):
        build(table, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_an_interrupt_leaves_nothing_behind(table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a long build is the usual way to stop one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(table, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_named(table: ImageTable, tmp_path: Path) -> None:
    """The path comes from a config; the error must say which it was."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write an image cache to .*file.*another folder"):
        build(table, tmp_path / "file" / "cache")
