"""Data sets of labelled images: files on disk, or an array in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dml.datamodules.samplers import IntArray, SeededIndex
from lightning_dml.errors import InputError


class Sample(TypedDict):
    """One item of a data set; the default collate makes the batch of it."""

    image: Tensor
    label: int
    index: int


class LabelledImages(Dataset[Sample]):
    """What the data modules need of a data set: its labels, its samples and their plain pictures.

    A subclass says in `load` how to open a picture. Random transforms run under the seed that the index carries,
    if it carries one (see `SeededIndex`), and leave the global random state as it was; they must draw from torch.

    Args:
        labels: (N,) integers.
        transform: makes the float image (C, H, W) of what `load` returns.

    Raises:
        InputError: if labels are not a vector of integers.
    """

    def __init__(self, labels: Sequence[int] | NDArray[Any], transform: Callable[[Any], Tensor]) -> None:
        """Checks the labels; see the class."""
        values = np.asarray(labels)
        if values.ndim != 1 or (len(values) and not np.issubdtype(values.dtype, np.integer)):
            raise InputError(f"labels must be a vector of integers, got shape {values.shape} of {values.dtype}")
        self.labels: IntArray = values.astype(np.int64)
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """Opens and transforms one image: `image` float (C, H, W), `label` and `index` ints."""
        opened = self.load(index)
        with _seeded(index):
            image = self.transform(opened)
        return {"image": image, "label": int(self.labels[index]), "index": int(index)}

    def load(self, index: int) -> Any:
        """The untransformed image, in the form that `transform` takes."""
        raise NotImplementedError

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The untransformed image for a figure, uint8 (H, W) or (H, W, 3)."""
        raise NotImplementedError


class ImageFileDataset(LabelledImages):
    """Image files, opened in RGB when they are asked for.

    Args:
        paths: N files that PIL can open.
        labels: (N,) integers.
        transform: makes the float image (3, H, W) of a PIL image.

    Raises:
        InputError: if there are not as many labels as paths; on access, if a file cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Sequence[int] | NDArray[Any],
        transform: Callable[[Any], Tensor],
    ) -> None:
        """Checks the lengths; see the class."""
        super().__init__(labels, transform)
        if len(paths) != len(self.labels):
            raise InputError(f"paths and labels must be as many, got {len(paths)} and {len(self.labels)}")
        # One array of text instead of N objects: workers that are forked do not copy it page by page.
        self.paths = np.array([str(path) for path in paths], dtype=np.str_)

    def load(self, index: int) -> Image.Image:
        """The image in RGB."""
        path = str(self.paths[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"cannot read image {path} (row {int(index)} of the data set): {error}; replace or remove the file"
            ) from error

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The whole image, uint8 (H, W, 3)."""
        return np.asarray(self.load(index), dtype=np.uint8)


class ArrayDataset(LabelledImages):
    """Grey images held in memory.

    Args:
        images: (N, H, W) uint8.
        labels: (N,) integers.
        transform: makes the float image (C, H, W) of a uint8 tensor (1, H, W).

    Raises:
        InputError: if `images` has another shape or dtype, or another length than `labels`.

    Examples:
        >>> data = ArrayDataset(np.zeros((2, 4, 4), np.uint8), [0, 1], lambda image: image / 255)
        >>> data[1]["image"].shape, data[1]["label"], data[1]["index"]
        (torch.Size([1, 4, 4]), 1, 1)
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: Sequence[int] | NDArray[Any],
        transform: Callable[[Any], Tensor],
    ) -> None:
        """Checks shape, dtype and length; see the class."""
        super().__init__(labels, transform)
        if images.ndim != 3 or images.dtype != np.uint8:
            raise InputError(f"images must be uint8 of shape (N, H, W), got {images.dtype} of shape {images.shape}")
        if len(images) != len(self.labels):
            raise InputError(f"images and labels must be as many, got {len(images)} and {len(self.labels)}")
        self.images = images

    def load(self, index: int) -> Tensor:
        """The image as a uint8 tensor (1, H, W) of its own."""
        return torch.from_numpy(self.images[index].copy())[None]

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The image, uint8 (H, W)."""
        return np.array(self.images[index], dtype=np.uint8)


@contextlib.contextmanager
def _seeded(index: int) -> Iterator[None]:
    if not isinstance(index, SeededIndex):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the GPUs as well, which this block would not put back.
        torch.default_generator.manual_seed(index.seed)
        yield
