"""What every retrieval data module shares: its loaders, and the checks that come before the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_dml import distributed
from lightning_dml.cores import cores
from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.loading import ResumableLoader
from lightning_dml.datamodules.samplers.evaluation import UnpaddedDistributedSampler
from lightning_dml.datamodules.samplers.hierarchical import HierarchicalPKBatchSampler
from lightning_dml.datamodules.samplers.pk import PKBatchSampler
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
        num_workers: processes that load images; 0 loads in the main process, None means one for each core that a rank
            has, at most 8.
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
        classes_per_batch: int = 16,
        samples_per_class: int = 4,
        eval_batch_size: int = 256,
        num_workers: int | None = 0,
        seed: int = 0,
        drop_small_classes: bool = False,
        batches_per_epoch: int | None = None,
        class_weights: str | dict[str, float] | None = None,
        super_classes_per_batch: int | None = None,
    ) -> None:
        """Checks the options; see the class."""
        super().__init__()
        if eval_batch_size < 1:
            raise InputError(f"eval_batch_size must be at least 1, got {eval_batch_size}")
        if num_workers is not None and num_workers < 0:
            raise InputError(f"num_workers must not be negative, got {num_workers}")
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
        """Checks what the subclass has set, so that a mistake shows before training and not at the first batch."""
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
        return ResumableLoader(train_set, self._train_sampler(train_set), **self._options())

    def val_dataloader(self) -> Any:
        """Every validation image over all ranks: a DataLoader, or a dict of them where `val_set` is a dict.

        With fewer images than ranks, the ranks that would have none repeat one each; its index tells.
        """
        return self._eval_loaders(self._evaluation(self.val_set, "validation"))

    def test_dataloader(self) -> Any:
        """Every test image over all ranks, as `val_dataloader`."""
        return self._eval_loaders(self._evaluation(self.test_set, "test"))

    def predict_dataloader(self) -> Any:
        """The test images, once over all ranks: a DataLoader, or a dict of them where `test_set` is a dict."""
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
        if not 0 <= position < len(images):
            raise InputError(f"position must be at least 0 and less than {len(images)}, got {position}")
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
        """The set, or the sets, that are evaluated, checked."""
        named = _by_name(images)
        if images is None or not named:
            raise self._without_images(role)
        for name, each in named.items():
            which = f" {name!r}" if isinstance(images, Mapping) else ""
            if not len(each):
                raise self._without_images(role + which)
            labelled = each.labels[each.labels != UNLABELLED]  # others are distractors, which match nothing
            if np.unique(labelled, return_counts=True)[1].max(initial=0) < 2:
                raise InputError(
                    f"no class of the {role} set{which} has two images, so no query has a match to find: add images, "
                    "or split by class"
                )
            for column in ("is_query", "is_gallery"):
                roles = getattr(getattr(each, "table", None), column, None)
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
        for each in _by_name(images).values():
            if len(each) < distributed.world_size():
                raise InputError(
                    f"the test set has {len(each)} image(s) for {distributed.world_size()} ranks, and predict takes "
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
        """`class_weights` with labels for names."""
        if not isinstance(self.class_weights, Mapping):
            return self.class_weights
        labels = {name: label for label, name in enumerate(self.class_names or ())}
        found = {}
        for name, weight in self.class_weights.items():
            label = labels.get(str(name)) if self.class_names is not None else _whole_number(name)
            if label not in trained:
                raise InputError(
                    f"class_weights names {name!r}, which is no training class: check the name, or take it out"
                )
            found[label] = weight
        return found

    def _eval_loaders(self, images: EvaluationSets, at_least_one: bool = True) -> Any:
        if isinstance(images, Mapping):
            # The workers of many sets would stand idle beside those of the training.
            return {name: self._eval_loader(each, at_least_one, len(images) == 1) for name, each in images.items()}
        return self._eval_loader(images, at_least_one, True)

    def _eval_loader(self, images: LabelledImages, at_least_one: bool, persistent: bool) -> DataLoader[Any]:
        sampler = UnpaddedDistributedSampler(len(images), at_least_one=at_least_one)
        options = self._options()
        options["persistent_workers"] &= persistent
        return DataLoader(images, batch_size=self.eval_batch_size, sampler=sampler, **options)

    def _options(self) -> dict[str, Any]:
        workers = self._workers() if self.num_workers is None else self.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A loader without one draws from the global generator at every start, and a resumed run, which starts
            # its loaders at other times, would then have other dropout.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _workers(self) -> int:
        """One for each core that this rank has: the ranks of a machine share its cores."""
        ranks = self.trainer.num_devices if self.trainer else 1
        return min(8, max(1, cores() // ranks))

    def _name(self, label: int) -> str:
        return repr(self.class_names[label]) if self.class_names is not None else str(label)


def _whole_number(name: object) -> int | None:
    text = str(name)
    return int(text) if text.lstrip("-").isdecimal() else None


def _by_name(images: EvaluationSets | None) -> dict[str, LabelledImages]:
    """The sets by name; a single one has none."""
    if isinstance(images, Mapping):
        return dict(images)
    return {} if images is None else {"": images}
