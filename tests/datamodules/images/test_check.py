"""The check before training: what it finds, what it opens, and for how long it believes its last result."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_dml.datamodules.images import check as image_check
from lightning_dml.datamodules.images.check import How, Unreadable, check_images, raise_unreadable
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError

SIZE = (40, 30)


def make(folder: Path, names: list[str], boxes: Any = None) -> ImageTable:
    """A table with a file for each distinct name; those of the name `cut` lack their second half, `gone` is missing."""
    for name in set(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(SIZE, 90).save(path)
        if "cut" in name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if "text" in name:
            path.write_text("no image")
        if "gone" in name:
            path.unlink()
    columns = None if boxes is None else np.array(boxes, np.int32)
    return ImageTable(folder, Texts(names), np.arange(len(names)), columns)


NAMES = ["a/1.jpg", "a/2cut.jpg", "b/3text.png", "b/4gone.png", "c/5.png", "a/1.jpg"]


@pytest.mark.parametrize(("how", "rows"), [("headers", [2, 3]), ("decode", [1, 2, 3])])
def test_finds_what_cannot_be_read(how: How, rows: list[int], tmp_path: Path) -> None:
    """A file that fails at hour three of a training costs three hours; only `decode` can see a file that was cut."""
    unreadable = check_images(make(tmp_path / "images", NAMES), how, tmp_path / "kept")
    assert unreadable.rows.dtype == np.int64 and unreadable.rows.tolist() == rows and len(unreadable) == len(rows)
    reasons = {1: "truncated", 2: "no image", 3: "no such file"}
    assert all(reasons[row] in reason for row, reason in zip(rows, unreadable.reasons, strict=True))


def test_many_files_come_out_in_the_order_of_their_rows(tmp_path: Path) -> None:
    """Rows are taken out of the table by number; one that is off by one would keep the broken file."""
    rng = np.random.default_rng(0)
    names = [f"{place % 7}/{place}{rng.choice(['', '', 'gone', 'text'])}.ppm" for place in range(150)]
    names = [names[place] for place in rng.integers(0, 150, 300)]
    unreadable = check_images(make(tmp_path / "images", names), "headers", tmp_path / "kept")
    expected = [row for row, name in enumerate(names) if "gone" in name or "text" in name]
    assert unreadable.rows.tolist() == expected
    assert [("no such file" in reason) for reason in unreadable.reasons] == ["gone" in names[row] for row in expected]


@pytest.mark.parametrize("how", ["headers", "decode"])
def test_boxes_are_checked_against_the_size(how: How, tmp_path: Path, opened: Counter[str]) -> None:
    """Boxes of another release of the images are a common mistake; each file is opened once for all of its boxes."""
    boxes = [[0, 0, 40, 30], [40, 0, 50, 10], [-5, -5, 99, 99], [3, 9, 3, 12], [0, 0, 9, 9]]
    table = make(tmp_path / "images", ["a.png"] * 4 + ["b.png"], boxes)
    unreadable = check_images(table, how, tmp_path / "kept")
    assert unreadable.rows.tolist() == [1, 3] and all("holds no pixel" in reason for reason in unreadable.reasons)
    assert opened == {"a.png": 1, "b.png": 1}


def test_the_next_start_opens_only_what_was_bad(tmp_path: Path, opened: Counter[str]) -> None:
    """On a network drive, opening a million files takes an hour; one that was replaced in its place must be seen."""
    table = make(tmp_path / "images", NAMES)
    first = check_images(table, "decode", tmp_path / "kept")
    opened.clear()
    for how in ("decode", "headers"):  # what was decoded has readable headers, too
        again = check_images(table, how, tmp_path / "kept")
        assert again.rows.tolist() == first.rows.tolist() and again.reasons == first.reasons
    assert opened == {"2cut.jpg": 2, "3text.png": 2, "4gone.png": 2}
    path = table.path(2)
    with io.BytesIO() as buffer:
        Image.new("RGB", SIZE).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())  # the folder's time of change stays as it is
    assert check_images(table, "decode", tmp_path / "kept").rows.tolist() == [1, 3]
    opened.clear()
    assert check_images(table, "decode", tmp_path / "kept").rows.tolist() == [1, 3]
    assert "3text.png" not in opened


def test_headers_do_not_answer_for_decoding(tmp_path: Path) -> None:
    """A user who asks for more than last time must get it."""
    table = make(tmp_path / "images", NAMES)
    check_images(table, "headers", tmp_path / "kept")
    assert check_images(table, "decode", tmp_path / "kept").rows.tolist() == [1, 2, 3]


def test_other_labels_are_the_same_images(tmp_path: Path, opened: Counter[str]) -> None:
    """Five folds of a data set must not check it five times."""
    table = make(tmp_path / "images", ["a.png", "b.png"])
    check_images(table, "headers", tmp_path / "kept")
    opened.clear()
    check_images(table.with_labels(np.zeros(2)), "headers", tmp_path / "kept")
    assert not opened


@pytest.mark.parametrize("change", ["removed", "renamed over", "other boxes", "other paths", "other root"])
def test_a_changed_data_set_is_looked_at_again(change: str, tmp_path: Path, opened: Counter[str]) -> None:
    """A result that is believed for too long lets the training start on files that are gone."""
    table = make(tmp_path / "images", ["a.png", "b.png"], [[0, 0, 9, 9]] * 2)
    assert not len(check_images(table, "headers", tmp_path / "kept"))
    expected = [1]
    if change == "removed":
        table.path(1).unlink()
    if change == "renamed over":
        (tmp_path / "text").write_text("no image")
        os.replace(tmp_path / "text", table.path(1))
    if change == "other boxes":
        table = ImageTable(table.root, table.paths, table.labels, np.array([[0, 0, 9, 9], [90, 90, 99, 99]], np.int32))
    if change == "other paths":
        table = ImageTable(table.root, Texts(["a.png", "c.png"]), table.labels, table.boxes)
    if change == "other root":
        table, expected = ImageTable(tmp_path, table.paths, table.labels, table.boxes), [0, 1]
    assert check_images(table, "headers", tmp_path / "kept").rows.tolist() == expected


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"stamp": 1, "rows": [77], "reasons": ["x"]}', b"\xff\xfe"])
def test_a_damaged_result_is_not_believed(content: bytes, tmp_path: Path, opened: Counter[str]) -> None:
    """A job that is killed or a full disk may leave anything there; it must not stop or mislead the next one."""
    table = make(tmp_path / "images", ["a.png", "b.png"])
    check_images(table, "headers", tmp_path / "kept")
    (result,) = (tmp_path / "kept").iterdir()
    result.write_bytes(content)
    opened.clear()
    assert not len(check_images(table, "headers", tmp_path / "kept"))
    assert opened == {"a.png": 1, "b.png": 1}


def test_rows_of_a_damaged_result_are_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beyond the table would be an IndexError far from its cause."""
    table = make(tmp_path / "images", ["a.png", "b.png"])
    monkeypatch.setattr(image_check, "_stamp", lambda table: "same")
    check_images(table, "headers", tmp_path / "kept")
    (result,) = (tmp_path / "kept").iterdir()
    result.write_text('{"stamp": "same", "rows": [2], "reasons": ["x"]}')
    assert not len(check_images(table, "headers", tmp_path / "kept"))


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path: Path) -> None:
    """The result is a convenience; a read-only home must not stop a training."""
    table = make(tmp_path / "images", NAMES)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot keep the result of the image check in"):
        unreadable = check_images(table, "headers", tmp_path / "file" / "kept")
    assert unreadable.rows.tolist() == [2, 3]


def test_nothing_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not fill up further with each start."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="No space left"):
        check_images(make(tmp_path / "images", ["a.png"]), "headers", tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_an_empty_table_has_nothing_unreadable(tmp_path: Path) -> None:
    """A data set without a test split is checked like the others."""
    table = ImageTable(tmp_path, Texts(), np.zeros(0, np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(check_images(table, "decode", tmp_path / "kept")) == 0


def test_the_error_names_the_first_file_its_row_and_the_way_out(tmp_path: Path) -> None:
    """It is what a user reads before a training that did not start."""
    table = make(tmp_path, ["a.png", "b/2.png", "c.png"])
    raise_unreadable(table, Unreadable(np.zeros(0, np.int64), []))
    with pytest.raises(InputError) as caught:
        raise_unreadable(table, Unreadable(np.array([1, 2]), ["it is empty", "it is late"]))
    assert str(caught.value) == (
        f"2 of 3 images cannot be read, the first is {tmp_path / 'b/2.png'} (row 1 of the data set): it is empty; "
        "replace them, or set unreadable='skip' to leave them out"
    )


def test_how_must_be_known(tmp_path: Path) -> None:
    """A misspelt word must not mean the quicker check."""
    with pytest.raises(InputError, match="how must be one of headers, decode, got 'full'"):
        check_images(make(tmp_path, ["a.png"]), "full", tmp_path)  # type: ignore[arg-type]


def test_a_progress_bar_is_for_long_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts start often on small sets; on large ones a silent hour looks like a hang."""
    table = make(tmp_path / "images", [f"{place}.png" for place in range(40)])
    check_images(table, "headers", tmp_path / "kept")
    assert capsys.readouterr().err == ""
    real = image_check._faults

    def slow(*args: Any) -> Any:
        time.sleep(0.03)
        return real(*args)

    monkeypatch.setattr(image_check, "_faults", slow)
    monkeypatch.setattr(image_check, "in_order", lambda function, tasks: map(function, tasks))
    for progress in (False, True):
        check_images(table, "decode", tmp_path / str(progress), progress=progress)
        assert ("checking images" in capsys.readouterr().err) is progress
