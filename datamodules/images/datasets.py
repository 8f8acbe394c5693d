"""Data sets of labelled images: files on disk, or an array in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.images.opening import open_row
from lightning_dml.datamodules.samplers.seeded_index import SeededIndex
from lightning_dml.datamodules.tables.rows import ImageTable, shared, unshared
from lightning_dml.errors import InputError


class _Always(TypedDict):
    image: Tensor
    label: int
    index: int


class Sample(_Always, total=False):
    """One item of a data set; the default collate makes the batch of it."""

    is_query: bool
    is_gallery: bool
    group: int
    super_label: int


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

    @property
    def super_labels(self) -> IntArray | None:
        """(N,) coarser classes, where the data set has them."""
        return None

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

    def __getstate__(self) -> dict[str, Any]:
        """The arrays as tensors, which worker processes share instead of copying."""
        return shared(self.__dict__)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Takes the arrays back."""
        self.__dict__.update(unshared(state))

    def load(self, index: int) -> Any:
        """The untransformed image, in the form that `transform` takes."""
        raise NotImplementedError

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The untransformed image for a figure, uint8 (H, W) or (H, W, 3)."""
        raise NotImplementedError


_COLUMNS = {"is_query": "is_query", "is_gallery": "is_gallery", "group": "groups", "super_label": "super_labels"}


class ImageFileDataset(LabelledImages):
    """Rows of image files, opened in RGB when they are asked for.

    A sample has besides `image`, `label` and `index` what the table knows: `is_query` and `is_gallery` (bool),
    `group` and `super_label` (int).

    Args:
        table: where the images lie, and their labels.
        transform: makes the float image (3, H, W) of a PIL image, which is cropped to the row's box.
        cache: pictures of the table that `table.rows` counts in, scaled already; None opens the files.

    Raises:
        InputError: on access, if a file cannot be read; it names the file and the row.
    """

    def __init__(
        self, table: ImageTable, transform: Callable[[Any], Tensor], cache: Sequence[Image.Image] | None = None
    ) -> None:
        """Keeps the rows; see the class."""
        super().__init__(table.labels, transform)
        self.table = table
        self.cache = cache
        # Names only: the columns themselves go to the workers with the table.
        self._columns = {key: name for key, name in _COLUMNS.items() if getattr(table, name) is not None}

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row; see the class."""
        sample = super().__getitem__(index)
        for key, name in self._columns.items():
            sample[key] = getattr(self.table, name)[index].item()  # type: ignore[literal-required]
        return sample

    @property
    def super_labels(self) -> IntArray | None:
        """(N,) coarser classes, where the table has them."""
        return self.table.super_labels

    def load(self, index: int) -> Image.Image:
        """The image in RGB, cropped to its box; scaled, where there is a cache."""
        if self.cache is not None:
            return self.cache[int(index if self.table.rows is None else self.table.rows[index])]
        return self._open(index)

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The image from its file, cropped to its box, uint8 (H, W, 3)."""
        return np.asarray(self._open(index), dtype=np.uint8)

    def _open(self, index: int) -> Image.Image:
        return open_row(self.table, int(index))


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
