"""Retrieval sets for the studies: the glyphs, and grey images in an .npz archive that is not part of this repository.

Both keep the unseen classes for reporting and offer a part of the training classes to choose settings on.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.transforms import v2

from lightning_dml.datamodules import GlyphsDataModule
from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.errors import InputError

Part = Literal["dev", "unseen"]
DEVELOPMENT_SHARE = 0.2


class GlyphsPartDataModule(GlyphsDataModule):
    """The glyphs, evaluated on the unseen characters or on a fifth of the training characters, held out.

    Args:
        part: "unseen" trains on all training classes and evaluates on the unseen ones; "dev" trains on four fifths of
            the training classes and evaluates on the others, always the same.
        classes: how many classes to evaluate, drawn once; 0 means all.
        options: of `GlyphsDataModule`.
    """

    def __init__(self, part: Part = "unseen", classes: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.part = part
        self.classes = classes

    def setup(self, stage: str | None = None) -> None:
        """Loads the drawings and cuts them."""
        super().setup(stage)
        assert isinstance(self.train_set, ArrayDataset) and isinstance(self.val_set, ArrayDataset)
        self.train_set, self.val_set = cut(self.train_set, self.val_set, self.part, self.classes)
        self.test_set = self.val_set


class ArchiveDataModule(RetrievalDataModule):
    """Grey images of an .npz archive, dark on light, turned to ink on 0 and shaken as the glyphs are.

    The archive holds `images` uint8 (N, H, W, 1), `labels` integers (N,) and `split` bool (N,), true for the images of
    unseen classes.

    Args:
        path: the archive.
        part: see `GlyphsPartDataModule`.
        classes: how many classes to evaluate, drawn once; 0 means all.
        options: of `RetrievalDataModule`.

    Raises:
        InputError: if there is no such file; from `setup`, if it is not such an archive.
    """

    def __init__(self, path: str | Path, part: Part = "unseen", classes: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.path = Path(path)
        self.part = part
        self.classes = classes
        if not self.path.is_file():
            raise InputError(
                f"npz {self.path} does not exist: this data set is no part of the repository; give the place of the "
                "archive with --npz, or run on the glyphs alone with --data glyphs"
            )
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        shake = v2.RandomAffine(
            8, translate=(0.07, 0.07), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )
        self.train_transform = v2.Compose([shake, *to_float])
        self.eval_transform = v2.Compose(to_float)

    def setup(self, stage: str | None = None) -> None:
        """Reads the archive and cuts it."""
        try:
            with np.load(self.path) as stored:
                images, labels, unseen = stored["images"], stored["labels"], stored["split"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"npz {self.path} cannot be read ({error}): it must hold images (N, H, W, 1) uint8, labels (N,) and "
                "split (N,) bool"
            ) from error
        images = 255 - images[..., 0]
        self.train_set, self.val_set = cut(
            ArrayDataset(images[~unseen], labels[~unseen], self.train_transform),
            ArrayDataset(images[unseen], labels[unseen], self.eval_transform),
            self.part,
            self.classes,
        )
        self.test_set = self.val_set
        super().setup(stage)


def cut(train: ArrayDataset, unseen: ArrayDataset, part: Part, classes: int) -> tuple[ArrayDataset, ArrayDataset]:
    """The images to train on and those to evaluate, without a class in common.

    Args:
        train: all images of the training classes.
        unseen: all images of the unseen classes, with the transform of evaluation.
        part: "dev" evaluates a fifth of the training classes and trains on the others.
        classes: how many of the classes to evaluate; 0 means all.
    """
    evaluated = unseen
    if part == "dev":
        names = np.unique(train.labels)
        development = np.isin(train.labels, _draw(names, round(DEVELOPMENT_SHARE * len(names))))
        evaluated = ArrayDataset(train.images[development], train.labels[development], unseen.transform)
        train = ArrayDataset(train.images[~development], train.labels[~development], train.transform)
    names = np.unique(evaluated.labels)
    if 0 < classes < len(names):
        chosen = np.isin(evaluated.labels, _draw(names, classes))
        evaluated = ArrayDataset(evaluated.images[chosen], evaluated.labels[chosen], evaluated.transform)
    return train, evaluated


def _draw(names: np.ndarray[Any, np.dtype[Any]], count: int) -> np.ndarray[Any, np.dtype[Any]]:
    # Not by the seed of a run: every run must be measured on the same classes.
    return np.random.default_rng(0).choice(names, count, replace=False)
