"""Splits by class: those that a data set brings along, and classes that are held out of training on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_dml.checks import check_count, check_number
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError

Tables = ImageTable | Mapping[str, ImageTable]


@dataclass(frozen=True)
class Splits:
    """The tables of a data set.

    Args:
        train: training images.
        test: evaluation set, or several by name; None means that the validation sets serve.
        class_names: name of each label, in all tables.
        val: validation set that the data set brings along, or several by name; None means one that is held out of the
            training classes, or else `further` alone, or else the evaluation sets.
        further: sets by name that are validated beside `val`.
    """

    train: ImageTable
    test: Tables | None
    class_names: list[str]
    val: Tables | None = None
    further: Mapping[str, ImageTable] = field(default_factory=dict)


@dataclass(frozen=True)
class HoldOut:
    """Rule that holds training classes out for validation: a share of them, or one of several folds.

    The split is by class, so that validation is on classes that training never saw, as the test is. It follows from
    the seed and the labels alone.

    Args:
        fraction: share of the training classes, in [0, 1); 0 holds out none.
        folds: number of parts that the classes are cut into, instead of `fraction`; at least 2.
        fold: which part is held out.
        seed: of the order of the classes.

    Raises:
        InputError: for a value out of range, or a fraction beside folds.

    Examples:
        >>> labels = np.repeat(np.arange(6), 2)
        >>> [np.unique(labels[HoldOut(folds=3, fold=fold).rows(labels)]).tolist() for fold in range(3)]
        [[3, 4], [0, 2], [1, 5]]
    """

    fraction: float = 0.0
    folds: int | None = None
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options."""
        check_number("val_fraction", self.fraction, "a share of the training classes, such as 0.1", least=0, below=1)
        check_count("split_seed", self.seed, 0)
        if self.folds is not None:
            check_count("folds", self.folds, 2, hint="None cuts no folds")
        if self.folds is not None and self.fraction:
            raise InputError(f"val_fraction={self.fraction} and folds={self.folds} are two splits: set one of them")
        if self.folds is None and self.fold:
            raise InputError(f"fold={self.fold} needs folds, the number of parts: set it too")
        if self.folds is not None:
            check_count("fold", self.fold, 0, self.folds - 1, hint="it counts from 0 and is less than folds")

    @property
    def any(self) -> bool:
        """True if classes are held out."""
        return self.folds is not None or self.fraction > 0

    def rows(self, labels: IntArray) -> IntArray:
        """Rows of the classes that are held out, (M,).

        Args:
            labels: (N,) int64.

        Raises:
            InputError: if there are fewer classes than folds.
        """
        return np.flatnonzero(np.isin(labels, self._chosen(np.unique(labels))))

    def __call__(self, splits: Splits, classes: IntArray | None = None) -> Splits:
        """Takes a validation set out of the training classes, and numbers the labels anew, those that train first.

        A validation set that the data set brings along stays, and then nothing is held out.

        Args:
            splits: as a data set has them.
            classes: (C,) ascending labels that trained before rows were left out, so that the same classes are held out
                whatever is left of them; None takes those of the training rows.

        Raises:
            InputError: for folds where the data set brings a validation set along.
        """
        classes = np.unique(splits.train.labels) if classes is None else classes
        if not self.any or not len(classes):
            return splits
        if splits.val is not None:
            if self.folds is not None:
                raise InputError(
                    f"folds={self.folds}, but the data set has validation images of its own, which every fold would "
                    "validate on: leave folds out, or give the data set without them"
                )
            return splits
        classes_out = self._chosen(classes)
        validates = np.isin(splits.train.labels, classes_out)
        apart = replace(splits, train=splits.train.take(~validates), val=splits.train.take(validates))
        return _relabelled(apart, np.setdiff1d(classes, classes_out))

    def _chosen(self, classes: IntArray) -> IntArray:
        order = classes[np.random.default_rng(self.seed).permutation(len(classes))]
        if self.folds is not None:
            if len(classes) < self.folds:
                raise InputError(
                    f"folds={self.folds} needs as many training classes, there are {len(classes)}: use fewer"
                )
            return order[self.fold :: self.folds]
        count = round(self.fraction * len(classes))
        if self.fraction:
            count = min(max(1, count), max(0, len(classes) - 1))
        return order[:count]


def by_name(tables: Tables | None, role: str) -> dict[str, ImageTable]:
    """Tables by name: a single one is called as its role, several `role/name`."""
    if tables is None:
        return {}
    if isinstance(tables, Mapping):
        return {f"{role}/{name}": table for name, table in tables.items()}
    return {role: tables}


def _relabelled(splits: Splits, trained: IntArray) -> Splits:
    """Numbers the labels anew: the classes `trained` from 0 in their old order, then the others in theirs."""
    count = len(splits.class_names)
    order = np.concatenate([trained, np.setdiff1d(np.arange(count), trained)])
    label = np.empty(count + 1, np.int64)
    label[order] = np.arange(count)
    label[-1] = -1  # distractors stay what they are

    def table(one: ImageTable) -> ImageTable:
        return one.with_labels(label[one.labels])

    def tables(several: Tables | None) -> Tables | None:
        if isinstance(several, Mapping):
            return {name: table(item) for name, item in several.items()}
        return None if several is None else table(several)

    return Splits(
        train=table(splits.train),
        test=tables(splits.test),
        class_names=[splits.class_names[old] for old in order],
        val=tables(splits.val),
        further={name: table(one) for name, one in splits.further.items()},
    )
