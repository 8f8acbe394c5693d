"""The base of every data module whose images are files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn

from lightning_dml import distributed
from lightning_dml.checks import check_choice
from lightning_dml.datamodules.base import RetrievalDataModule
from lightning_dml.datamodules.images.cache import ImageCache
from lightning_dml.datamodules.images.check import check_images, raise_unreadable
from lightning_dml.datamodules.images.file_dataset import ImageFileDataset
from lightning_dml.datamodules.images.timm_config import module_config
from lightning_dml.datamodules.images.transforms import (
    ImageSettings,
    as_transform,
    eval_transform,
    image_settings,
    train_transform,
)
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.datamodules.tables.splits import HoldOut, Splits, Tables, by_name
from lightning_dml.datamodules.user_cache import user_cache
from lightning_dml.errors import InputError

OWN_SET = "val"  # name of the validation set beside others


class ImagesDataModule(RetrievalDataModule):
    """Image files that a subclass lists: transforms by recipe, a split by class, a check, and a cache of small images.

    A subclass implements `read`, and `fetch` where it can download. Before training, `prepare_data` fetches what is
    missing, checks the images and builds the cache, in one process of each machine; `setup` reads the tables on every
    rank, and refuses to go on where two ranks see different ones.

    Args:
        root: folder of the data set.
        recipe: name of the transforms, see `transforms.RECIPES`.
        model_name: timm model whose data config gives mean, standard deviation and interpolation; None takes those of
            the timm model in the module that the trainer trains, or ImageNet's where there is none or no trainer.
        image_size: side of the square that the model sees, in pixels; None is the recipe's, or the model's where it
            takes one size only.
        resize: shorter side of the image before it is cropped, in pixels, at least `image_size`; None keeps the
            recipe's ratio to `image_size`.
        crop_scale: smallest and largest share of the image's area in a random crop, within (0, 1]; None is the
            recipe's.
        mean: per channel, of images in [0, 1]; None is the model's.
        std: per channel, of images in [0, 1]; None is the model's.
        interpolation: `bilinear`, `bicubic` and so on; None is the model's.
        train_transform: PIL image -> float (3, H, W), instead of the recipe's: torchvision, albumentations, or any
            callable.
        eval_transform: the same for evaluation.
        val_fraction: share of the training classes that validates instead of training, in [0, 1), so that the test
            set is kept for the end; not used where the data set has validation images. 0 validates on the test set, as
            most papers do.
        folds: cut the training classes into as many parts instead, and validate on one of them.
        fold: which part that is, from 0.
        split_seed: of both splits; apart from `seed`, so that runs with other batches share their validation set.
        cache: folder for a cache of images that are scaled to `resize` already; None decodes the files in each epoch.
            Transforms of your own then start from the scaled images.
        cache_encoding: `raw` pixels, or `jpeg` for a tenth of the size and small differences.
        check_images: `headers` reads the beginning of every file before the first training, once; `decode` reads it
            all, which also finds files that were cut off; `none` leaves it to the training. A file that is overwritten
            in its place later is not looked at again.
        unreadable: `raise`, or `skip` to leave out images that cannot be read, with a warning that counts them; it
            reads them all, as `decode` does.
        options: of `RetrievalDataModule`.

    Raises:
        InputError: for an option out of range. From `prepare_data` and `setup`: for what `read` finds wrong, images
            that cannot be read, ranks that see different tables, or anything that `RetrievalDataModule` checks.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        recipe: str = "standard",
        model_name: str | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        crop_scale: tuple[float, float] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: str | None = None,
        train_transform: Callable[[Any], Any] | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        val_fraction: float = 0.0,
        folds: int | None = None,
        fold: int = 0,
        split_seed: int = 0,
        cache: str | Path | None = None,
        cache_encoding: Literal["raw", "jpeg"] = "raw",
        check_images: Literal["none", "headers", "decode"] = "headers",
        unreadable: Literal["raise", "skip"] = "raise",
        **options: Any,
    ) -> None:
        """Checks the options; see the class."""
        super().__init__(**options)
        check_choice("check_images", check_images, ("none", "headers", "decode"))
        check_choice("unreadable", unreadable, ("raise", "skip"))
        if unreadable == "skip" and check_images == "none":
            raise InputError(
                "unreadable='skip' needs to know which images cannot be read, and check_images is 'none': set it to "
                "'decode'"
            )
        check_choice("cache_encoding", cache_encoding, ("raw", "jpeg"))
        if cache is not None and resize is None and (train_transform is not None or eval_transform is not None):
            raise InputError(
                "cache scales the images before a transform of your own sees them: set resize to the shorter side, in "
                "pixels, that it may start from, or leave cache out"
            )
        self.root = Path(root)
        self.model_name = model_name
        self.hold_out = HoldOut(val_fraction, folds, fold, split_seed)
        self.cache = None if cache is None else Path(cache)
        self.cache_encoding = cache_encoding
        self.check_images = check_images
        self.unreadable = unreadable
        self._recipe: dict[str, Any] = {
            "recipe": recipe,
            "image_size": image_size,
            "resize": resize,
            "crop_scale": crop_scale,
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
        }
        self.image_settings()  # fails here where it can
        self._own_train = None if train_transform is None else as_transform(train_transform)
        self._own_eval = None if eval_transform is None else as_transform(eval_transform)
        self._prepared: Splits | None = None

    def read(self) -> Splits:
        """Reads the tables of the data set from its files; opens no image."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Downloads missing files, where a subclass can; called in one process of each machine."""

    def image_settings(self) -> ImageSettings:
        """Sizes, normalisation and interpolation by the options, the model and the recipe."""
        module = None if self.trainer is None else self.trainer.lightning_module
        config = None if module is None or self.model_name is not None else module_config(module)
        return image_settings(model_name=self.model_name, config=config, **self._recipe)

    def prepare_data(self) -> None:
        """Fetches, checks and caches the images that the coming stage needs, in one process of each machine."""
        self.fetch()
        splits = self.read()
        for name, table in self._needed(splits, self._stage()).items():
            self._usable(name, table, quiet=True)
        self._prepared = splits  # not to read it all again in this process

    def setup(self, stage: str | None = None) -> None:
        """Makes the data sets of every split and checks them."""
        splits, final, caches = distributed.together(partial(self._tables, stage))
        self._check_ranks(final)
        settings = self.image_settings()
        train = self._own_train or train_transform(settings)
        evaluate = self._own_eval or eval_transform(settings)
        held_out = splits.val is None and final.val is not None
        self.class_names = final.class_names
        self.train_set = ImageFileDataset(final.train, train, caches.get("train"))
        tests = _data_sets(final.test, evaluate, caches, "test")
        vals = _data_sets(final.val, evaluate, {"val": caches.get("train")} if held_out else caches, "val")
        if vals is None and not final.further:
            vals = tests
        others = _data_sets(final.further, evaluate, caches, "further")
        if isinstance(others, dict) and others:
            own = vals if isinstance(vals, Mapping) else {OWN_SET: vals} if vals is not None and len(vals) else {}
            vals = {**own, **others}
        self.val_set = vals
        self.test_set = tests if tests is not None else vals
        super().setup(stage)

    def _tables(self, stage: str | None) -> tuple[Splits, Splits, dict[str, ImageCache | None]]:
        """Reads the tables; returns them, the final ones less unreadable and held-out rows, and the caches by table."""
        splits, self._prepared = self._prepared or self.read(), None
        needed = self._needed(splits, stage)
        caches: dict[str, ImageCache | None] = {}
        for name, table in needed.items():
            needed[name], caches[name] = self._usable(name, table)
        return splits, self.hold_out(_replaced(splits, needed), np.unique(splits.train.labels)), caches

    def _needed(self, splits: Splits, stage: str | None) -> dict[str, ImageTable]:
        """Tables that a stage looks at, by name."""
        train = {"train": splits.train}
        test = by_name(splits.test, "test")
        val = by_name(splits.val, "val")
        if not val:
            val = train if self.hold_out.any and len(splits.train) else {} if splits.further else test
        val = {**val, **by_name(splits.further, "further")}
        if stage in ("test", "predict"):
            return test or val
        if stage == "validate":
            return val
        if stage != "fit":
            return {**train, **val, **test}
        # A fit may do without validation.
        return train if self.trainer is not None and self.trainer.limit_val_batches == 0 else {**train, **val}

    def _usable(self, name: str, table: ImageTable, quiet: bool = False) -> tuple[ImageTable, ImageCache | None]:
        """Rows of a table whose images can be read, and their cache."""
        if self.check_images != "none" and len(table):
            how = "decode" if self.unreadable == "skip" else self.check_images
            bad = check_images(table, how, user_cache() / "checked")
            if len(bad.rows):
                if self.unreadable == "raise":
                    raise_unreadable(table, bad, f"{name} set")
                if not quiet:
                    rank_zero_warn(
                        f"{len(bad.rows)} of {len(table)} images of the {name} set cannot be read and are left out; "
                        f"the first is {table.path(int(bad.rows[0]))}: {bad.reasons[0]}"
                    )
                table = table.take(np.setdiff1d(np.arange(len(table)), bad.rows))
        if self.cache is None or not len(table):
            return table, None
        settings = self.image_settings()
        cache = ImageCache.build(
            table,
            self.cache,
            resize=settings.resize,
            interpolation=settings.interpolation,
            encoding=self.cache_encoding,
            stem=name,
        )
        return replace(table, rows=np.arange(len(table))), cache

    def _stage(self) -> str | None:
        """The stage that the trainer is about to run with this data."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn is None:
            return None
        own = getattr(trainer, "datamodule", None) is self
        return str(trainer.state.fn.value) if own else "fit"  # `bank` takes the training set without a datamodule

    def _check_ranks(self, splits: Splits) -> None:
        """Raises where ranks have read different tables: each plans the batches of all from its own."""
        if distributed.world_size() == 1:
            return
        digest = hashlib.blake2b(digest_size=7)  # fits an int64
        for role, tables in vars(splits).items():
            for name, table in by_name(None if role == "class_names" else tables, role).items():
                digest.update(f"{name} {table.digest()}".encode())
        by_rank = distributed.gather_numbers([int(digest.hexdigest(), 16)], distributed.collective_device())
        for rank, theirs in enumerate(by_rank):
            if theirs != by_rank[0]:
                raise InputError(
                    f"rank {rank} reads other files under {self.root} than rank 0: the ranks must see the same data "
                    "set; copy it anew on that machine"
                )


def _replaced(splits: Splits, tables: Mapping[str, ImageTable]) -> Splits:
    """Splits with some tables exchanged, by name."""

    def exchanged(role_tables: Tables | None, role: str) -> Tables | None:
        if isinstance(role_tables, Mapping):
            return {name: tables.get(f"{role}/{name}", table) for name, table in role_tables.items()}
        return None if role_tables is None else tables.get(role, role_tables)

    return replace(
        splits,
        train=tables.get("train", splits.train),
        test=exchanged(splits.test, "test"),
        val=exchanged(splits.val, "val"),
        further={name: tables.get(f"further/{name}", table) for name, table in splits.further.items()},
    )


def _data_sets(
    tables: Tables | None, transform: Callable[[Any], Any], caches: Mapping[str, Any], role: str
) -> ImageFileDataset | dict[str, ImageFileDataset] | None:
    if isinstance(tables, Mapping):
        return {
            name: ImageFileDataset(table, transform, caches.get(f"{role}/{name}")) for name, table in tables.items()
        }
    return None if tables is None else ImageFileDataset(tables, transform, caches.get(role))
