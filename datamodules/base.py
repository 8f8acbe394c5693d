"""The base of every data module: class-balanced loaders, and checks of the data before the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_dml import distributed
from lightning_dml.checks import check_count
from lightning_dml.cores import cores
from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.samplers import (
    HierarchicalPKBatchSampler,
    PKBatchSampler,
    UnpaddedDistributedSampler,
)
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.lightning_repairs import CountResumedEpoch, add_callback, replaces_samplers

EvaluationSets = LabelledImages | Mapping[str, LabelledImages]


class RetrievalDataModule(LightningDataModule):
    """Class-balanced training batches and evaluation without duplicates, for a data set that a subclass names.

    A subclass implements `setup`: it sets `train_set`, `val_set` and `test_set` (and `class_names` where labels have
    names), then calls `super().setup(stage)`, which checks them. A batch is a dict of `image` (B, C, H, W) float,
    `label` (B,) int64 and `index` (B,) int64, the position in the data set. `val_set` and `test_set` may be dicts of
    several sets by name, which are then evaluated each by itself; the first is the one that figures show.

    Args:
        classes_per_batch: P, classes in a training batch on each rank.
        samples_per_class: K, images of each of them; at least 2.
        eval_batch_size: images in an evaluation batch on each rank.
        num_workers: processes that load images; 0 loads in the main process. None means one for each core that a rank
            has, at most 8, where the data set says that its images are files (`in_memory` is False), and 0 otherwise.
        seed: of the batches and of their augmentation.
        drop_small_classes: leave out training classes with one image instead of raising.
        batches_per_epoch: length of an epoch; None means about one pass over the training set.
        class_weights: how often each class is drawn: None in proportion to its images, `uniform` all alike, `sqrt` in
            between, or weights of some classes by name (by label, where the data set has no names), 1 for the others.
        super_classes_per_batch: draw the classes of a batch from as many super-classes, which makes its negatives
            harder; for data sets with super-classes. It must divide `classes_per_batch`.

    Raises:
        InputError: for `eval_batch_size` or `num_workers` out of range. From `setup`: without training or
            evaluation images, with too few classes for a batch, with no class of two images to evaluate, with fewer
            images to predict than ranks, or if the trainer would replace the samplers.
    """

    train_set: LabelledImages | None = None
    val_set: EvaluationSets | None = None
    test_set: EvaluationSets | None = None
    class_names: list[str] | None = None
    """The name of each label, where the data set knows it."""

    def __init__(
        self,
        *,
        classes_per_batch: int = 16,
        samples_per_class: int = 4,
        eval_batch_size: int = 256,
        num_workers: int | None = None,
        seed: int = 0,
        drop_small_classes: bool = False,
        batches_per_epoch: int | None = None,
        class_weights: str | dict[str, float] | None = None,
        super_classes_per_batch: int | None = None,
    ) -> None:
        """Checks the options; see the class."""
        super().__init__()
        check_count("eval_batch_size", eval_batch_size)
        if num_workers is not None:
            check_count("num_workers", num_workers, 0, hint="None chooses by the images and the cores")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_small_classes = drop_small_classes
        self.batches_per_epoch = batches_per_epoch
        self.class_weights = class_weights
        self.super_classes_per_batch = super_classes_per_batch

    def setup(self, stage: str | None = None) -> None:
        """Checks the sets that the subclass has made, so that a mistake shows before the first batch."""
        self._check_trainer()
        if stage in (None, "fit"):
            self._train_sampler(self._training())
            if self.trainer:
                add_callback(self.trainer, CountResumedEpoch)
            # A fit may do without validation, if it says so.
            if self.trainer is None or self.trainer.limit_val_batches != 0:
                self._evaluation(self.val_set, "validation")
        if stage == "validate":
            self._evaluation(self.val_set, "validation")
        if stage == "test":
            self._evaluation(self.test_set, "test")
        if stage == "predict":
            self._prediction()

    def train_dataloader(self) -> ResumableLoader:
        """Batches of P classes x K images; its place in the epoch goes into checkpoints."""
        train_set = self._training()
        return ResumableLoader(train_set, self._train_sampler(train_set), **self._options(train_set))

    def val_dataloader(self) -> Any:
        """Loader of the validation images, shared out over all ranks; a dict of loaders where `val_set` is a dict.

        With fewer images than ranks, the ranks that would have none repeat one each; its index tells.
        """
        return self._eval_loaders(self._evaluation(self.val_set, "validation"))

    def test_dataloader(self) -> Any:
        """Loader of the test images, as `val_dataloader`."""
        return self._eval_loaders(self._evaluation(self.test_set, "test"))

    def predict_dataloader(self) -> Any:
        """Loader that gives every test image once over all ranks; a dict of loaders where `test_set` is a dict."""
        return self._eval_loaders(self._prediction(), at_least_one=False)

    def eval_image(self, position: int) -> NDArray[np.uint8]:
        """A validation image as it is before any transform, for figures.

        Args:
            position: in the validation set, the first of several, as in `index` of a batch.

        Returns:
            uint8 (H, W) or (H, W, 3).

        Raises:
            InputError: before `setup`, or if there is no such image.
        """
        images = next(iter(_by_name(self.val_set).values()), None)
        if images is None:
            raise InputError("no validation images to show: call setup('validate') first")
        check_count("position", position, 0, len(images) - 1, hint="it counts the images of the first validation set")
        return images.picture(position)

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer and trainer.world_size > 1 and replaces_samplers(trainer):
            raise InputError(
                f"use_distributed_sampler is true on {trainer.world_size} ranks: Lightning would re-wrap the samplers, "
                "break K images per class and repeat evaluation images; set Trainer(use_distributed_sampler=False), "
                "the samplers here know their rank"
            )

    def _training(self) -> LabelledImages:
        if self.train_set is None or not len(self.train_set):
            raise InputError(
                f"{type(self).__name__} has no training images: check root and the split; to evaluate only, run "
                "validate or test"
            )
        labels, counts = np.unique(self.train_set.labels, return_counts=True)
        if counts.min() < 2 and not self.drop_small_classes:
            label = int(labels[counts < 2][0])
            raise InputError(
                f"training class {self._name(label)} has one image ({int((counts < 2).sum())} such class(es)), and a "
                "positive pair takes two: remove it, or set drop_small_classes=true"
            )
        return self.train_set

    def _evaluation(self, images: EvaluationSets | None, role: str) -> EvaluationSets:
        """Checks the set, or the sets, of an evaluation, and returns them."""
        named = _by_name(images)
        if images is None or not named:
            raise self._without_images(role)
        for name, one_set in named.items():
            which = f" {name!r}" if isinstance(images, Mapping) else ""
            if not len(one_set):
                raise self._without_images(role + which)
            labelled = one_set.labels[one_set.labels != UNLABELLED]  # the others are distractors, which match nothing
            if np.unique(labelled, return_counts=True)[1].max(initial=0) < 2:
                raise InputError(
                    f"no class of the {role} set{which} has two images, so no query has a match to find: add images, "
                    "or split by class"
                )
            for column in ("is_query", "is_gallery"):
                roles = getattr(getattr(one_set, "table", None), column, None)
                if roles is not None and not roles.any():
                    raise InputError(
                        f"{column} is false for every image of the {role} set{which}: there is nothing to evaluate"
                    )
        return images

    def _without_images(self, role: str) -> InputError:
        return InputError(
            f"{type(self).__name__} has no {role} images: check root and the split, or turn validation off with "
            "Trainer(limit_val_batches=0)"
        )

    def _prediction(self) -> EvaluationSets:
        images = self._evaluation(self.test_set, "test")
        for one_set in _by_name(images).values():
            if len(one_set) < distributed.world_size():
                raise InputError(
                    f"the test set has {len(one_set)} image(s) for {distributed.world_size()} ranks, and predict takes "
                    "each image once: use fewer ranks"
                )
        return images

    def _train_sampler(self, train_set: LabelledImages) -> PKBatchSampler | HierarchicalPKBatchSampler:
        options: dict[str, Any] = {
            "classes_per_batch": self.classes_per_batch,
            "samples_per_class": self.samples_per_class,
            "seed": self.seed,
            "num_batches": self.batches_per_epoch,
            "drop_small_classes": self.drop_small_classes,
            "class_weights": self._weights_by_label(set(train_set.labels.tolist())),
        }
        if self.super_classes_per_batch is None:
            return PKBatchSampler(train_set.labels, **options)
        if train_set.super_labels is not None and (train_set.super_labels < 0).any():
            raise InputError(
                f"super_classes_per_batch={self.super_classes_per_batch} needs a super-class for every training image, "
                f"and {int((train_set.super_labels < 0).sum())} have none: fill them in, or set it to null"
            )
        if train_set.super_labels is None:
            raise InputError(
                f"super_classes_per_batch={self.super_classes_per_batch} needs super-classes, which "
                f"{type(self).__name__} has not found: set it to null, or give the data set some"
            )
        return HierarchicalPKBatchSampler(
            train_set.labels, train_set.super_labels, self.super_classes_per_batch, **options
        )

    def _weights_by_label(self, trained: set[int]) -> Any:
        """Class weights by label, where the option has them by name."""
        if not isinstance(self.class_weights, Mapping):
            return self.class_weights
        labels = {name: label for label, name in enumerate(self.class_names or ())}
        weights = {}
        for name, weight in self.class_weights.items():
            label = labels.get(str(name)) if self.class_names is not None else _whole_number(name)
            if label not in trained:
                raise InputError(
                    f"class_weights names {name!r}, which is no training class: check the name, or take it out"
                )
            weights[label] = weight
        return weights

    def _eval_loaders(self, images: EvaluationSets, at_least_one: bool = True) -> Any:
        if isinstance(images, Mapping):
            # The workers of many sets would stand idle beside those of the training.
            return {
                name: self._eval_loader(one_set, at_least_one, len(images) == 1) for name, one_set in images.items()
            }
        return self._eval_loader(images, at_least_one, True)

    def _eval_loader(self, images: LabelledImages, at_least_one: bool, persistent: bool) -> DataLoader[Any]:
        sampler = UnpaddedDistributedSampler(len(images), at_least_one=at_least_one)
        options = self._options(images)
        options["persistent_workers"] &= persistent
        return DataLoader(images, batch_size=self.eval_batch_size, sampler=sampler, **options)

    def _options(self, images: LabelledImages) -> dict[str, Any]:
        workers = self._workers(images) if self.num_workers is None else self.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A loader without one draws from the global generator at every start, and a resumed run, which starts
            # its loaders at other times, would then have other dropout.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _workers(self, images: LabelledImages) -> int:
        """Default of `num_workers`; the ranks of a machine share its cores."""
        if getattr(images, "in_memory", True):  # a data set that does not tell is loaded as PyTorch loads it
            return 0
        ranks = self.trainer.num_devices if self.trainer else 1
        return min(8, max(1, cores() // ranks))

    def _name(self, label: int) -> str:
        return repr(self.class_names[label]) if self.class_names is not None else str(label)


def _whole_number(name: object) -> int | None:
    text = str(name)
    return int(text) if text.lstrip("-").isdecimal() else None


def _by_name(images: EvaluationSets | None) -> dict[str, LabelledImages]:
    """Evaluation sets by name; a single one is called by the empty text."""
    if isinstance(images, Mapping):
        return dict(images)
    return {} if images is None else {"": images}
