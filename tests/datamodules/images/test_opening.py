"""Opening image files: what comes out, what a bad file says, and that threads change nothing."""

from __future__ import annotations

import pickle
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from lightning_dml.datamodules.images.opening import UnreadableImage, image_size, in_order, open_image, open_row
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A lossless file of 40 x 30."""
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    return path


def cut_jpeg(path: Path) -> Path:
    """A JPEG that lacks its lower half."""
    Image.fromarray(PIXELS).resize((400, 300)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_box_is_the_part_that_numpy_would_cut_out(picture: Path) -> None:
    """A box read with its corners the wrong way round would train on the background."""
    assert np.array_equal(np.asarray(open_image(picture)), PIXELS)
    assert np.array_equal(np.asarray(open_image(picture, (5, 7, 36, 8))), PIXELS[7:8, 5:36])
    table = ImageTable(
        picture.parent, Texts([picture.name] * 2), np.arange(2), np.array([[0, 0, 1, 1], [3, 4, 9, 6]], np.int32)
    )
    assert np.array_equal(np.asarray(open_row(table, 1)), PIXELS[4:6, 3:9])


def test_what_sticks_out_is_cut_off_and_not_painted_black(picture: Path) -> None:
    """PIL pads with black, which the model would learn as a mark of those rows."""
    assert np.array_equal(np.asarray(open_image(picture, (-5, 20, 10, 99))), PIXELS[20:, :10])


@pytest.mark.parametrize("box", [(40, 0, 50, 10), (-9, 0, 0, 10), (0, 31, 10, 40), (8, 5, 8, 9), (9, 5, 8, 9)])
def test_a_box_without_pixels_is_named(box: tuple[int, int, int, int], picture: Path) -> None:
    """An empty picture would fail in the first resize, without a word of which row it was."""
    with pytest.raises(InputError) as caught:
        open_image(picture, box, row=12)
    message = str(caught.value)
    assert f"{picture} (row 12 of the data set): its box {box}" in message and "40 x 30; correct the box" in message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I", "F", "YCbCr"])
def test_every_mode_comes_out_as_pil_converts_it(mode: str, tmp_path: Path) -> None:
    """One grey or transparent file among colour ones would break the batch."""
    path = tmp_path / "a.tif"
    source = Image.fromarray(PIXELS)
    source = source.convert("P").convert(mode) if mode == "PA" else source.convert("L" if mode in "IF" else mode)
    source = source.convert(mode)
    source.save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    opened = open_image(path)
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), expected)


def test_a_palette_with_transparent_colours_opens_without_a_warning(tmp_path: Path) -> None:
    """Logs with a warning for each image of each epoch hide the others; the colours must stay those of the palette."""
    path = tmp_path / "a.png"
    source = Image.fromarray(PIXELS).quantize(16)
    source.save(path, transparency=bytes(range(16)))
    with Image.open(path) as image, pytest.warns(UserWarning, match="Transparency"):
        image.convert("RGB")  # the case is really one that PIL warns of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(source.convert("RGB")))


def test_a_truncated_jpeg_is_an_error_whatever_pil_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries switch PIL's tolerance on globally; half of the picture is then grey, and nobody learns of it."""
    path = cut_jpeg(tmp_path / "a.jpg")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(path) as image:
        image.load()  # the case is really one that the switch lets pass
    with pytest.raises(
        UnreadableImage, match=r"cannot read image .*a\.jpg \(row 3 of .*truncated.*; replace or remove"
    ):
        open_image(path, row=3)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "what another library has set must be as it was"
    assert image_size(path) == (400, 300)


def test_truncated_jpegs_are_errors_in_threads_that_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread that is done must not put the tolerance back while others still read."""
    cut, whole = cut_jpeg(tmp_path / "a.jpg"), tmp_path / "b.jpg"
    Image.fromarray(PIXELS).save(whole)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    slow, fast_is_out = threading.Event(), threading.Event()
    load = ImageFile.ImageFile.load

    def waiting(self: Any) -> Any:
        if self.filename == str(cut):
            slow.set()
            assert fast_is_out.wait(5)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", waiting)

    def read(path: Path) -> bool:
        if path == whole:
            assert slow.wait(5)
        try:
            open_image(path)
        except UnreadableImage:
            return False
        finally:
            if path == whole:
                fast_is_out.set()
        return True

    assert list(in_order(read, [cut, whole], workers=2)) == [False, True]
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no image"), (b"no image", "no image"), (None, "no such file"), ("folder", "directory")],
)
def test_what_is_no_image_is_named_with_its_row(content: Any, reason: str, tmp_path: Path) -> None:
    """Among a million files the user must learn which one to replace, and why."""
    path = tmp_path / "x.jpg"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for function in (open_image, image_size):
        with pytest.raises(UnreadableImage) as caught:
            function(path, row=7)
        assert str(path) in str(caught.value) and "(row 7 of the data set)" in str(caught.value)
        assert reason in caught.value.reason.lower() and caught.value.reason in str(caught.value)
    with pytest.raises(UnreadableImage, match=r"x\.jpg: "):
        open_image(path)


@pytest.mark.parametrize("error", [KeyError("tag"), TypeError("bad"), EOFError(), Image.DecompressionBombError("big")])
def test_any_error_of_a_decoder_is_named(error: Exception, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's readers raise whatever a damaged file leads them to, and a bare KeyError names no file."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImage, match=r"a\.png \(row 0 .*; replace") as caught:
        open_image(picture, row=0)
    assert caught.value.reason


def test_the_error_travels_between_processes() -> None:
    """Workers send it to the main process, pickled or as its text alone."""
    error = pickle.loads(pickle.dumps(UnreadableImage("cannot read", "cut off")))
    assert (str(error), error.reason) == ("cannot read", "cut off")
    assert str(UnreadableImage("text")) == "text"


def test_files_are_closed(picture: Path, tmp_path: Path) -> None:
    """A loader that leaks one descriptor per image stops after a thousand."""
    cut = cut_jpeg(tmp_path / "b.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(list(Path("/proc/self/fd").iterdir()))
        kept: list[Any] = [open_image(picture), image_size(picture)]
        for function in (open_image, open_image):
            with pytest.raises(UnreadableImage) as caught:
                function(cut)
            kept.append(caught)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_results_keep_the_order_and_few_are_in_memory() -> None:
    """A cache has its pictures in the order of the rows, and a million of them must not pile up in front of it."""
    begun: list[int] = []

    def work(task: int) -> int:
        begun.append(task)
        time.sleep(0.001 * (task % 3))
        return task * task

    ahead = 0
    results = []
    for place, result in enumerate(in_order(work, iter(range(60)), workers=3)):
        ahead = max(ahead, len(begun) - place)
        results.append(result)
        time.sleep(0.002)  # whoever takes the results is slower than the threads
    assert results == [task * task for task in range(60)]
    assert 1 < ahead <= 7


def test_the_first_error_stops_the_rest() -> None:
    """A build over a million files must not go on for hours after it has failed."""
    begun: list[int] = []

    def work(task: int) -> int:
        begun.append(task)
        if task == 4:
            raise InputError("four")
        return task

    with pytest.raises(InputError, match="four"):
        list(in_order(work, range(1000), workers=2))
    count = len(begun)
    assert count < 20
    time.sleep(0.02)
    assert len(begun) == count
