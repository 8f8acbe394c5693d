"""A data set in folders, one for each class."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.images import ImageFileDataset
from lightning_dml.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
OWN = "val"  # what the own validation set is called where there are others
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FolderDataModule(RetrievalDataModule):
    """Images in class folders: `root/<class>/*.jpg`, or `root/<split>/<class>/*.jpg`.

    With `root/train` and `root/val` (and `root/test`; without it the test sets are the validation sets) the
    splits are as they lie, and no training class may appear in another split. Otherwise the classes of `root` are split
    at random, so that evaluation is on classes that training never saw. Training labels count from 0 in sorted order
    of the class names; the other classes follow. Images are read in RGB; other files and hidden ones are passed over.

    Args:
        root: folder of the data set.
        val_fraction: share of the classes that validates, in [0, 1); used only without `root/train`. 0 trains on all
            classes, for which validation needs `val_roots`.
        split_seed: of that split; apart from `seed`, so that runs with other batches share their validation set.
        image_size: side of the square that the model sees, in pixels.
        resize: shorter side of the image before it is cropped, in pixels; at least `image_size`.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        train_transform: PIL image -> float (3, H, W), instead of resize, random crop, flip and normalisation.
        eval_transform: PIL image -> float (3, H, W), instead of resize, centre crop and normalisation.
        crop_scale: smallest and largest share of the image's area in a random crop, within (0, 1].
        allow_shared_classes: let classes appear in `root/train` and in another split, or in training and in one of
            `val_roots`.
        val_roots: further folders `<val_root>/<class>/*.jpg` by name, each validated as a set of its own beside that of
            `root`, which comes first and is called `val`; where `root` has no validation images, they are alone, in
            the order that they are given in. Classes are the same where their folders have one name.
        options: of `RetrievalDataModule`.

    Raises:
        InputError: for an option out of range, `val_roots` that are not folders by name, or a name among them that is
            empty or `val`. From `setup`: for a missing root, no images, an empty class folder, a class in several
            splits, or anything that `RetrievalDataModule` checks.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.5,
        split_seed: int = 0,
        image_size: int = 224,
        resize: int = 256,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        train_transform: Callable[[Any], Any] | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        allow_shared_classes: bool = False,
        val_roots: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Builds the transforms; see the class for the options."""
        super().__init__(**options)
        # Their types are Any because jsonargparse takes the class of a callable's result for a class to make.
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction must be in [0, 1), got {val_fraction}")
        if split_seed < 0:
            raise InputError(f"split_seed must not be negative, got {split_seed}")
        if image_size < 1 or resize < image_size:
            raise InputError(
                f"image_size must be at least 1 and resize at least image_size, got image_size={image_size} and "
                f"resize={resize}"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop_scale must be two ascending numbers in (0, 1], got {crop_scale}")
        _check_val_roots(val_roots)
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.allow_shared_classes = allow_shared_classes
        self.val_roots = {name: Path(folder) for name, folder in (val_roots or {}).items()}
        to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.train_transform = train_transform or v2.Compose(
            [
                v2.Resize(resize),
                v2.RandomResizedCrop(image_size, scale=crop_scale),
                v2.RandomHorizontalFlip(0.5),
                *to_float,
            ]
        )
        self.eval_transform = eval_transform or v2.Compose([v2.Resize(resize), v2.CenterCrop(image_size), *to_float])

    def setup(self, stage: str | None = None) -> None:
        """Lists the files of every split and checks them; opens none."""
        if not self.root.is_dir():
            raise InputError(f"root {self.root} is not a folder: give the folder that holds the class folders")
        splits = self._splits()
        if not any(splits.values()):
            raise InputError(
                f"root {self.root} has no class folders with images: expected root/<class>/*.jpg or "
                "root/train/<class>/*.jpg and root/val/<class>/*.jpg"
            )
        others = {name: self._val_root(name, splits["train"]) for name in self.val_roots}
        first = sorted(splits["train"])
        rest = sorted({name for classes in (*splits.values(), *others.values()) for name in classes} - set(first))
        self.class_names = first + rest
        label = {name: number for number, name in enumerate(self.class_names)}
        self.train_set = _data_set(splits["train"], label, self.train_transform)
        own = _data_set(splits["val"], label, self.eval_transform)
        further = {name: _data_set(classes, label, self.eval_transform) for name, classes in others.items()}
        self.val_set = own
        if further:
            self.val_set = {OWN: own, **further} if len(own) else further
        self.test_set = _data_set(splits["test"], label, self.eval_transform) if "test" in splits else self.val_set
        super().setup(stage)

    def _splits(self) -> dict[str, dict[str, list[Path]]]:
        """Split -> class -> files; `test` only where there is one."""
        # A folder of images may be a class that is called train, so a split is known by the folders in it.
        if not any(_folders(self.root / split) for split in ("train", "val")):
            return self._split_by_class(_scan(self.root))
        splits = {split: _scan(self.root / split) for split in ("train", "val", "test")}
        if not splits["test"]:
            del splits["test"]
        for split in splits.keys() - {"train"}:
            self._check_unseen(splits["train"], splits[split], self.root / split)
        return splits

    def _val_root(self, name: str, training: Container[str]) -> dict[str, list[Path]]:
        """Class -> files of one of `val_roots`."""
        folder = self.val_roots[name]
        if not folder.is_dir():
            raise InputError(f"val_roots[{name!r}] {folder} is not a folder: give the folder that holds class folders")
        classes = _scan(folder)
        if not classes:
            raise InputError(f"val_roots[{name!r}] {folder} has no class folders with images: expected <class>/*.jpg")
        self._check_unseen(training, classes, folder)
        return classes

    def _check_unseen(self, training: Container[str], classes: Iterable[str], folder: Path) -> None:
        shared = sorted(name for name in classes if name in training)
        if shared and not self.allow_shared_classes:
            raise InputError(
                f"class {shared[0]!r} ({len(shared)} such class(es)) is in the training set and in {folder}: retrieval "
                "is evaluated on unseen classes; move one, or set allow_shared_classes=true"
            )

    def _split_by_class(self, classes: Mapping[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
        names = sorted(classes)
        count = round(self.val_fraction * len(names))
        if self.val_fraction:
            count = min(max(1, count), max(0, len(names) - 1))
        order = np.random.default_rng(self.split_seed).permutation(len(names))
        unseen = {names[place] for place in order[:count]}
        return {
            "train": {name: files for name, files in classes.items() if name not in unseen},
            "val": {name: files for name, files in classes.items() if name in unseen},
        }


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
    if wrong := {"", OWN} & set(val_roots):
        raise InputError(
            f"val_roots must not have a set called {wrong.pop()!r}: {OWN!r} is the set of root, choose another name"
        )


def _data_set(
    classes: Mapping[str, list[Path]], label: Mapping[str, int], transform: Callable[[Any], Tensor]
) -> ImageFileDataset:
    paths = [path for name in sorted(classes) for path in classes[name]]
    labels = [label[name] for name in sorted(classes) for _ in classes[name]]
    return ImageFileDataset(paths, labels, transform)


def _scan(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images in sorted order."""
    found: dict[str, list[Path]] = {}
    for each in _folders(folder):
        found[each.name] = [path for path in _visible(each.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not found[each.name]:
            raise InputError(f"class folder {each} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): remove it")
    return found


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.name)
