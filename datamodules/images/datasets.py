"""Data sets of labelled images: their common base, and images in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dml.datamodules.arrays import IntArray, integer_vector, share_arrays, unshare_arrays
from lightning_dml.datamodules.seeded_index import SeededIndex
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
    """The base of data sets: labels, samples with a transformed image, and plain pictures for figures.

    A subclass says in `load` how to open a picture. Random transforms run under the seed that the index carries,
    if it carries one (see `SeededIndex`), and leave the global random state as it was; they must draw from torch.

    Args:
        labels: (N,) integers.
        transform: makes the float image (C, H, W) of what `load` returns.

    Raises:
        InputError: if labels are not a vector of integers.
    """

    in_memory = False
    """True where `load` has nothing to read or decode, so that worker processes would cost more than they save."""

    @property
    def super_labels(self) -> IntArray | None:
        """Coarser classes, (N,); None where the data set has none."""
        return None

    def __init__(self, labels: Sequence[int] | NDArray[Any], transform: Callable[[Any], Tensor]) -> None:
        """Checks the labels; see the class."""
        self.labels: IntArray = integer_vector("labels", labels).astype(np.int64)
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
        """State for a worker process: arrays as tensors, which processes share instead of copying."""
        return share_arrays(self.__dict__)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restores the arrays."""
        self.__dict__.update(unshare_arrays(state))

    def load(self, index: int) -> Any:
        """The untransformed image, in the form that `transform` takes."""
        raise NotImplementedError

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The untransformed image for a figure, uint8 (H, W) or (H, W, 3)."""
        raise NotImplementedError


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

    in_memory = True

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
