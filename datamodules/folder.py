"""A data set in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dml.datamodules.image_files import OWN_SET, ImagesDataModule
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Classes = dict[str, list[str]]  # class -> names of its images in sorted order


class FolderDataModule(ImagesDataModule):
    """Images in class folders: `root/<class>/*.jpg`, or `root/<split>/<class>/*.jpg`.

    With `root/train` and `root/val` (and `root/test`; without it the test sets are the validation sets) the
    splits are as they lie, and no training class may appear in another split. Without `root/val`, classes are held out
    of training at random, so that evaluation is on classes that training never saw. Training labels count from 0 in
    sorted order of the class names; the other classes follow. Images are read in RGB; other files and hidden ones are
    passed over.

    Args:
        root: folder of the data set.
        val_fraction: share of the training classes that validates, in [0, 1); used only without `root/val`. 0 trains on
            all classes, for which validation needs `root/test` or `val_roots`.
        allow_shared_classes: let classes appear in `root/train` and in another split, or in training and in one of
            `val_roots`.
        val_roots: further folders `<val_root>/<class>/*.jpg` by name, each validated as a set of its own beside that of
            `root`, which comes first and is called `val`; where `root` has no validation images, they are alone, in
            the order that they are given in. Classes are the same where their folders have one name.
        options: of `ImagesDataModule`.

    Raises:
        InputError: for an option out of range, `val_roots` that are not folders by name, or a name among them that is
            empty or `val`. From `setup`: for a missing root, no images, an empty class folder, a class in several
            splits, or anything that `ImagesDataModule` checks.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        val_fraction: float = 0.5,
        allow_shared_classes: bool = False,
        val_roots: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Checks the options; see the class."""
        super().__init__(root, val_fraction=0.0 if options.get("folds") else val_fraction, **options)
        _check_val_roots(val_roots)
        if self.cache is not None and self.root.resolve() in (self.cache.resolve(), *self.cache.resolve().parents):
            raise InputError(f"cache {self.cache} is in root {self.root}, among the classes: choose a folder elsewhere")
        self.allow_shared_classes = allow_shared_classes
        self.val_roots = {name: Path(folder) for name, folder in (val_roots or {}).items()}

    def read(self) -> Splits:
        """Lists the files of every split and checks the classes; opens no file."""
        if not self.root.is_dir():
            raise InputError(f"root {self.root} is not a folder: give the folder that holds the class folders")
        # A folder of images may be a class that is called train, so a split is known by the folders in it.
        in_splits = any(_folders(self.root / split) for split in ("train", "val"))
        splits = self._splits() if in_splits else {"train": _scan(self.root)}
        if not any(splits.values()):
            raise InputError(
                f"root {self.root} has no class folders with images: expected root/<class>/*.jpg or "
                "root/train/<class>/*.jpg and root/val/<class>/*.jpg"
            )
        others = {name: self._val_root(name) for name in self.val_roots}
        first = sorted(splits["train"])
        rest = sorted({name for classes in (*splits.values(), *others.values()) for name in classes} - set(first))
        label = {name: number for number, name in enumerate(first + rest)}
        tables = {
            split: _table(self.root / split if in_splits else self.root, classes, label)
            for split, classes in splits.items()
        }
        result = Splits(
            train=tables["train"],
            test=tables.get("test"),
            class_names=first + rest,
            val=tables.get("val"),
            further={name: _table(self.val_roots[name], classes, label) for name, classes in others.items()},
        )
        self._check_others(result, others)
        return result

    def _splits(self) -> dict[str, Classes]:
        """Images by class, by split; `val` and `test` only where they have any."""
        splits = {split: _scan(self.root / split) for split in ("train", "val", "test")}
        for split in ("val", "test"):
            if not splits[split]:
                del splits[split]
            else:
                self._check_unseen(splits["train"], splits[split], self.root / split)
        return splits

    def _val_root(self, name: str) -> Classes:
        """Images by class of one of `val_roots`."""
        folder = self.val_roots[name]
        if not folder.is_dir():
            raise InputError(f"val_roots[{name!r}] {folder} is not a folder: give the folder that holds class folders")
        classes = _scan(folder)
        if not classes:
            raise InputError(f"val_roots[{name!r}] {folder} has no class folders with images: expected <class>/*.jpg")
        return classes

    def _check_others(self, splits: Splits, others: Mapping[str, Classes]) -> None:
        """Raises for a class that trains and is in `val_roots`; one that is held out of training may be there."""
        remaining = self.hold_out(splits)
        training = {remaining.class_names[label] for label in np.unique(remaining.train.labels)}
        for name, classes in others.items():
            self._check_unseen(training, classes, self.val_roots[name])

    def _check_unseen(self, training: Container[str], classes: Iterable[str], folder: Path) -> None:
        shared = sorted(name for name in classes if name in training)
        if shared and not self.allow_shared_classes:
            raise InputError(
                f"class {shared[0]!r} ({len(shared)} such class(es)) is in the training set and in {folder}: retrieval "
                "is evaluated on unseen classes; move one, or set allow_shared_classes=true"
            )


def _check_val_roots(val_roots: Any) -> None:
    if val_roots is None:
        return
    if not isinstance(val_roots, Mapping) or not all(
        isinstance(name, str) and isinstance(folder, str | Path) for name, folder in val_roots.items()
    ):
        raise InputError(
            f"val_roots must map names to folders, such as {{night: data/night}}, got {val_roots!r}; give each folder "
            "a name"
        )
    if wrong := {"", OWN_SET} & set(val_roots):
        raise InputError(
            f"val_roots must not have a set called {wrong.pop()!r}: {OWN_SET!r} is the set of root, choose another name"
        )


def _table(folder: Path, classes: Classes, label: Mapping[str, int]) -> ImageTable:
    names = sorted(classes)
    return ImageTable(
        root=folder,
        paths=Texts(f"{name}/{file}" for name in names for file in classes[name]),
        labels=np.repeat(
            np.array([label[name] for name in names], np.int64), np.array([len(classes[name]) for name in names], int)
        ),
    )


def _scan(folder: Path) -> Classes:
    """Names of the images in each class folder, in sorted order."""
    classes: Classes = {}
    for name in _folders(folder):
        classes[name] = [
            file for file in _visible(folder / name) if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
        if not classes[name]:
            raise InputError(
                f"class folder {folder / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): remove it"
            )
    return classes


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [name for name in _visible(folder) if (folder / name).is_dir()]


def _visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
