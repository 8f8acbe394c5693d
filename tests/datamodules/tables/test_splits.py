"""Classes that are held out of training, and the labels that follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import HoldOut, Splits
from lightning_dml.errors import InputError


def table(labels: list[int]) -> ImageTable:
    """Rows whose file names tell their class, so that a mixed-up label shows."""
    return ImageTable(Path("r"), Texts(f"{label}.jpg" for label in labels), np.array(labels, np.int64))


def split(labels: list[int], hold_out: HoldOut, test: list[int] | None = None) -> Splits:
    """Training rows of some classes and a test set of others; class names are the old labels."""
    count = max([*labels, *(test or [])]) + 1
    return hold_out(
        Splits(table(labels), None if test is None else table(test), [str(number) for number in range(count)])
    )


def names(splits: Splits, rows: ImageTable) -> list[str]:
    """The class of each row by its new label."""
    return [f"{splits.class_names[label]}.jpg" for label in rows.labels]


@given(
    labels=st.lists(st.integers(0, 9), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_held_out_classes_do_not_train(labels: list[int], fraction: float, seed: int) -> None:
    """Validation on classes that trained measures memory; and no row may be lost or renamed on the way."""
    splits = split(labels, HoldOut(fraction, seed=seed), test=[11, 12, 10])
    assert isinstance(splits.val, ImageTable) and isinstance(splits.test, ImageTable)
    for rows in (splits.train, splits.val, splits.test):
        assert names(splits, rows) == list(rows.paths)
    assert sorted([*splits.train.paths, *splits.val.paths]) == sorted(f"{label}.jpg" for label in labels)
    assert not set(splits.train.paths) & set(splits.val.paths)
    trained = np.unique(splits.train.labels)
    assert trained.tolist() == list(range(len(trained)))
    assert splits.class_names[: len(trained)] == sorted(splits.class_names[: len(trained)], key=int)


@given(classes=st.integers(2, 20), folds=st.integers(2, 6), seed=st.integers(0, 5))
def test_each_class_is_in_one_fold(classes: int, folds: int, seed: int) -> None:
    """A mean over folds counts each class once, and folds differ by one class at most."""
    labels = np.repeat(np.arange(classes), 2)
    if classes < folds:
        with pytest.raises(InputError, match=f"folds={folds} needs as many training classes, there are {classes}"):
            HoldOut(folds=folds, seed=seed).rows(labels)
        return
    parts = [labels[HoldOut(folds=folds, fold=fold, seed=seed).rows(labels)] for fold in range(folds)]
    assert sorted(np.concatenate(parts)) == sorted(labels)
    sizes = [len(np.unique(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_what_a_data_set_brings_along_stays() -> None:
    """A published validation split is part of the benchmark."""
    given_val = Splits(table([0, 0, 1]), None, ["a", "b", "c"], val=table([2, 2]))
    assert HoldOut(0.5)(given_val) is given_val
    with pytest.raises(InputError, match="folds=2, but the data set has validation images of its own"):
        HoldOut(folds=2)(given_val)


def test_nothing_is_held_out_of_nothing() -> None:
    """A table of test rows alone can be tested, whatever the config says of training."""
    alone = Splits(table([]), table([0, 0]), ["a"])
    assert HoldOut(folds=3)(alone) is alone and HoldOut(0.5)(alone) is alone


def test_distractors_stay_distractors() -> None:
    """Label -1 is no class and gets no number."""
    splits = split([3, 3, 1, 1], HoldOut(0.5), test=[2, -1])
    assert isinstance(splits.test, ImageTable)
    assert splits.test.labels[1] == -1 and splits.class_names[splits.test.labels[0]] == "2"


@pytest.mark.parametrize(
    ("hold_out", "message"),
    [
        ({"fraction": 1.0}, r"val_fraction must be a share of .*, at least 0 and less than 1, got 1.0"),
        ({"fraction": -0.1}, "got -0.1"),
        ({"fraction": 0.5, "folds": 2}, "two splits: set one of them"),
        ({"folds": 1}, "folds must be an integer of at least 2, got 1; None cuts no folds"),
        ({"folds": 3, "fold": 3}, "fold must be an integer from 0 to 2, got 3; .* less than folds"),
        ({"fold": 1}, "fold=1 needs folds"),
        ({"seed": -1}, "split_seed must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_options(hold_out: dict[str, float], message: str) -> None:
    """A wrong split shows in no error later, only in wrong numbers."""
    with pytest.raises(InputError, match=message):
        HoldOut(**hold_out)  # type: ignore[arg-type]
