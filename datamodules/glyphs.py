"""Characters in different typefaces: real retrieval that needs no download."""

from __future__ import annotations

import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import ImageFont, features
from PIL import __version__ as pillow_version
from torchvision.transforms import v2

from lightning_dml.checks import check_count
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.images.datasets import ArrayDataset, LabelledImages
from lightning_dml.datamodules.user_cache import user_cache
from lightning_dml.errors import InputError
from lightning_dml.files import delete_parts, locked, write_whole

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    "STIXGeneral",
)
CHARACTERS = 1200
DRAWINGS = 8
SIDE = 28

_VERSION = 1  # of the drawing; raise it with any change to the result of draw_glyphs
_EM = 20  # pixels
_ALIKE = 0.95  # cosine of two drawings in one face; from here on they are one shape
_REFERENCE_FACES = ("DejaVuSans", "DejaVuSerif")
_DIFFERENT = 0.5 * 255**2  # squared distance; two drawings of a character differ by more than half a pixel's ink


class GlyphsDataModule(RetrievalDataModule):
    """9,600 images of 1,200 characters, 8 typefaces each, drawn from the fonts that matplotlib ships.

    Half of the characters train, the other half validates and tests, unseen. The drawings are 28 x 28, light on dark,
    kept in one file that `prepare_data` draws in about two seconds and draws again if it is damaged.

    Raw pixels (cosine) find the same character for 53 % of the unseen images, with MAP@R 0.29.

    Args:
        root: folder of the cache; None means `lightning_dml` in the user's cache folder (`XDG_CACHE_HOME`, or
            `~/.cache`).
        image_size: side of the images, in pixels; other than 28 the drawings are scaled.
        augment: rotate, shift and scale training images slightly.
        options: of `RetrievalDataModule`.

    Raises:
        InputError: for an `image_size` below 1. From `prepare_data`: if the installed fonts have too few characters.
    """

    val_set: LabelledImages | None = None

    def __init__(
        self, root: str | Path | None = None, *, image_size: int = SIDE, augment: bool = True, **options: Any
    ) -> None:
        """Builds the transforms; see the class for the options."""
        super().__init__(**options)
        check_count("image_size", image_size)
        self.root = Path(root) if root is not None else user_cache()
        scale = [] if image_size == SIDE else [v2.Resize(image_size)]
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        bilinear = v2.InterpolationMode.BILINEAR
        shake = v2.RandomAffine(8, translate=(0.07, 0.07), scale=(0.9, 1.1), interpolation=bilinear)
        self.train_transform = v2.Compose([*([shake] if augment else []), *scale, *to_float])
        self.eval_transform = v2.Compose([*scale, *to_float])

    def prepare_data(self) -> None:
        """Draws the cache file where there is none that can be read; of several processes, one draws."""
        path = self.root / _cache_name()
        if _read(path) is not None:
            return
        try:
            with locked(path.with_name(f".{path.stem}.lock")):
                delete_parts(path)
                if _read(path) is None:
                    _write(path, *draw_glyphs())
        except OSError as error:
            # Not worth stopping for: every process then draws for itself.
            warnings.warn(f"cannot keep the drawings in root {self.root}: {error}", stacklevel=2)

    def setup(self, stage: str | None = None) -> None:
        """Loads the drawings and splits the characters, always in the same way."""
        images, _, characters = _read(self.root / _cache_name()) or draw_glyphs()
        order = np.random.default_rng(0).permutation(CHARACTERS)
        half = CHARACTERS // 2
        order = np.concatenate([np.sort(order[:half]), np.sort(order[half:])])
        images = images.reshape(CHARACTERS, DRAWINGS, SIDE, SIDE)[order].reshape(-1, SIDE, SIDE)
        labels = np.repeat(np.arange(CHARACTERS), DRAWINGS)
        boundary = half * DRAWINGS
        self.class_names = [characters[place] for place in order]
        self.train_set = ArrayDataset(images[:boundary], labels[:boundary], self.train_transform)
        self.val_set = ArrayDataset(images[boundary:], labels[boundary:], self.eval_transform)
        self.test_set = self.val_set
        super().setup(stage)


def draw_glyphs() -> tuple[NDArray[np.uint8], IntArray, list[str]]:
    """Draws the data set of `GlyphsDataModule`.

    Of the letters, numbers, symbols and punctuation in the 13 faces, one whose shape another with a lower code point
    has already (Latin A, Greek Alpha) is left out. Of each character the 8 drawings that differ most are
    taken, and of the characters the 1,200 whose drawings differ most.

    Returns:
        images uint8 (9600, 28, 28), ink 255 on 0; labels int64 (9600,), ascending, 8 of each; the 1,200 characters by
        label, in order of code point. The same on every machine with the same matplotlib and Pillow.

    Raises:
        InputError: if fewer than 1,200 characters qualify.
    """
    points, drawings, has_drawing = _draw_all()
    unlike = ~_look_alikes(drawings, has_drawing)
    faces, spread = _farthest(drawings, has_drawing)
    good = np.flatnonzero(unlike & (spread > _DIFFERENT))
    if len(good) < CHARACTERS:
        raise InputError(
            f"the fonts of matplotlib {matplotlib.__version__} in {_font_folder()} have {len(good)} characters with "
            f"{DRAWINGS} different drawings, and the glyph data set takes {CHARACTERS}: reinstall matplotlib"
        )
    good = np.sort(good[np.argsort(-spread[good], kind="stable")[:CHARACTERS]])
    images = drawings[good[:, None], faces[good]].reshape(-1, SIDE, SIDE)
    labels = np.repeat(np.arange(CHARACTERS), DRAWINGS)
    return images, labels, [chr(points[place]) for place in good]


def _draw_all() -> tuple[list[int], NDArray[np.uint8], NDArray[np.bool_]]:
    """Draws n characters in every face: code points (n,), drawings (n, faces, 28, 28), and their mask (n, faces)."""
    folder = _font_folder()
    maps = [set(FT2Font(folder / f"{face}.ttf").get_charmap()) for face in FACES]
    faces_with = Counter(point for known in maps for point in known)
    points = sorted(
        point
        for point, count in faces_with.items()
        # Letters, numbers, symbols, punctuation: neither combining marks nor whitespace nor controls.
        if count >= DRAWINGS and unicodedata.category(chr(point))[0] in "LNSP"
    )
    drawings = np.zeros((len(points), len(FACES), SIDE, SIDE), np.uint8)
    for column, face in enumerate(FACES):
        # The basic layout is in every build of Pillow; Raqm is not, and shapes differently.
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), _EM, layout_engine=ImageFont.Layout.BASIC)
        for row, point in enumerate(points):
            if point not in maps[column]:
                continue
            mask, _ = font.getmask2(chr(point), mode="L")
            width, height = mask.size
            if 0 < width <= SIDE and 0 < height <= SIDE:
                left, top = (SIDE - width) // 2, (SIDE - height) // 2
                ink = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
                drawings[row, column, top : top + height, left : left + width] = ink
    has_drawing: NDArray[np.bool_] = drawings.max(axis=(2, 3)) > 0
    return points, drawings, has_drawing


def _look_alikes(drawings: NDArray[np.uint8], has_drawing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mask (n,) of the characters that look like one that comes earlier and is kept, in a reference face."""
    alike = np.zeros(len(drawings), bool)
    for face in _REFERENCE_FACES:
        column = FACES.index(face)
        rows = np.flatnonzero(has_drawing[:, column])
        # float64 holds these sums of products exactly, so the outcome is the same whatever the BLAS.
        pixels = drawings[rows, column].reshape(len(rows), -1).astype(np.float64)
        dots = pixels @ pixels.T
        norms = np.diag(dots)
        for place, row in enumerate(rows):
            if not alike[row]:
                after = slice(place + 1, None)
                same = dots[place, after] ** 2 > _ALIKE**2 * norms[place] * norms[after]
                alike[rows[after][same]] = True
    return alike


def _farthest(drawings: NDArray[np.uint8], has_drawing: NDArray[np.bool_]) -> tuple[IntArray, NDArray[np.float64]]:
    """Chooses 8 faces for each character, (n, 8), each the face whose drawing is the farthest from those before it.

    The second array is the squared distance of the last drawing from the others, (n,); -1 where there are not 8.
    """
    faces = np.zeros((len(drawings), DRAWINGS), np.int64)
    spread = np.empty(len(drawings))
    for row in range(len(drawings)):
        pixels = drawings[row].reshape(len(FACES), -1).astype(np.float64)
        dots = pixels @ pixels.T
        norms = np.diag(dots)
        distances = np.where(has_drawing[row], norms[:, None] + norms - 2 * dots, -1.0)
        faces[row, 0] = has_drawing[row].argmax()
        nearest = distances[faces[row, 0]].copy()
        for turn in range(1, DRAWINGS):
            faces[row, turn] = nearest.argmax()
            spread[row] = nearest.max()
            nearest = np.minimum(nearest, distances[faces[row, turn]])
    return faces, spread


def _font_folder() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _cache_name() -> str:
    """Name of the cache file, with all that a drawing depends on, so that an upgrade draws anew."""
    freetype = features.version("freetype2")
    return f"glyphs-{_VERSION}-matplotlib-{matplotlib.__version__}-pillow-{pillow_version}-freetype-{freetype}.npz"


def _read(path: Path) -> tuple[NDArray[np.uint8], IntArray, list[str]] | None:
    """Images, labels and characters from the cache file; None where there is none or it is damaged."""
    try:
        with np.load(path) as stored:
            images, labels, points = stored["images"], stored["labels"], stored["points"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    shapes = (CHARACTERS * DRAWINGS, SIDE, SIDE), (CHARACTERS * DRAWINGS,), (CHARACTERS,)
    if (images.shape, labels.shape, points.shape) != shapes or images.dtype != np.uint8:
        return None
    return images, labels, [chr(point) for point in points]


def _write(path: Path, images: NDArray[np.uint8], labels: IntArray, characters: list[str]) -> None:
    points = np.array([ord(character) for character in characters])
    write_whole(path, lambda aside: np.savez(aside, images=images, labels=labels, points=points))
