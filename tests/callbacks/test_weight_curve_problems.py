"""The logger of pair weights where a module, a loss or a setting is not what it expects."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger
from pytorch_metric_learning import losses as others
from torch import Tensor

from lightning_dml.callbacks import WeightCurveLogger
from lightning_dml.errors import InputError
from lightning_dml.losses import (
    ContrastiveLoss,
)
from tests.callbacks.logger_cases import Foreign, fit, part_of, silent, warnings_of
from tests.tiny import TinyData, tiny_module


def test_a_batch_that_was_left_out_is_passed_over() -> None:
    """There is nothing to see, and the next batch is measured as before."""
    logger = silent(1, loss="criterion")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="WeightCurveLogger")
        fit(logger, Foreign(), steps=6, data=TinyData(batches_per_epoch=6))
    assert [figures["step"] for figures in logger.history] == [1, 2, 4, 5]


def test_a_loss_without_weights_of_pairs_is_reported_once() -> None:
    """A loss of proxies has none; a training of hours must not die of what only looks at it."""
    proxies = others.ProxyAnchorLoss(num_classes=12, embedding_size=6)
    logger, module = silent(2), tiny_module(loss=proxies, memory_loss=ContrastiveLoss(0.3))
    messages = warnings_of(lambda: fit(logger, module, bank={}))
    assert len(messages) == 1
    assert "ProxyAnchorLoss" in messages[0] and "the pairs of the batch" in messages[0]
    assert [figures["step"] for figures in logger.history] == [2, 4, 6, 8]
    assert all(part_of(figures, "memory") and not part_of(figures, "batch") for figures in logger.history)


class LossOnly(Foreign):
    """The most common foreign module: its training_step returns the loss alone."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Leaves out what is to be read."""
        return self.criterion(self.net(batch["image"]), batch["label"])


class Misshapen(Foreign):
    """Returns rows that do not fit together."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """A label too few."""
        loss = self.criterion(self.net(batch["image"]), batch["label"])
        return {"loss": loss, "embeddings": torch.eye(8), "labels": batch["label"][1:], "indices": batch["index"]}


@pytest.mark.parametrize(
    ("module", "words"), [(LossOnly, "embeddings, indices, labels missing"), (Misshapen, "(N, D)")]
)
def test_a_step_that_returns_too_little_is_reported_once(module: type[LightningModule], words: str) -> None:
    """The user learns what to return, and the training goes on."""
    logger = silent(1, loss="criterion")
    (message,) = warnings_of(lambda: fit(logger, module()))
    assert words in message
    assert logger.history == []


class WithoutLoss(Foreign):
    """Its loss is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: Any = lambda embeddings, labels: embeddings.sum()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: WeightCurveLogger(every_n_steps=0), "every_n_steps.*0"),
        (lambda: WeightCurveLogger(100, figure_every_n_steps=150), "figure_every_n_steps.*multiple.*100.*150"),
        (lambda: WeightCurveLogger(100, figure_every_n_steps=0), "figure_every_n_steps.*0"),
        (lambda: WeightCurveLogger(references=0), "references.*0"),
        (lambda: WeightCurveLogger(points=0), "points.*0"),
        (lambda: WeightCurveLogger(seed=-1), "seed.*-1"),
        (lambda: WeightCurveLogger(loss=""), "loss must be the name.*''"),
        (lambda: WeightCurveLogger(attribute="a.b"), "attribute must be the name.*'a.b'"),
        (lambda: fit(WeightCurveLogger(), Foreign()), "Foreign has no such attribute.*'loss'"),
        (lambda: fit(WeightCurveLogger(), WithoutLoss()), "WithoutLoss has a function there.*'loss'"),
        (lambda: fit(WeightCurveLogger(memory_loss="device")), "MetricLearningModule has a device there.*'device'"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """A wrong setting stops before the first step with its name and value."""
    with pytest.raises(InputError, match=words):
        call()


def test_a_logger_that_would_miss_figures_is_mentioned(tmp_path: Path) -> None:
    """Lightning drops what is logged between its own steps without a word."""
    with pytest.warns(UserWarning, match=r"every_n_steps=3.*log_every_n_steps=2"):
        fit(silent(3), logger=CSVLogger(tmp_path / "a"), log_every_n_steps=2)
    assert not warnings_of(lambda: fit(silent(2), logger=CSVLogger(tmp_path / "b"), log_every_n_steps=2))
