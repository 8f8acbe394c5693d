"""Dropout after a resume, with the callback and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_dml.callbacks import MemoryBankCallback, ReproducibleSteps
from lightning_dml.errors import InputError
from tests.tiny import QUIET, TinyData, tiny_module


def fit(folder: Path, callbacks: list[Callback], checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """Trains a module with dropout, from the start or a checkpoint, and returns its weights."""
    module = tiny_module()
    module.embedder.net.insert(2, nn.Dropout(0.3))  # type: ignore[union-attr,operator]
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True}
    torch.manual_seed(0 if checkpoint is None else 1)  # a new process starts elsewhere
    memory = MemoryBankCallback(size=30)
    trainer = Trainer(max_steps=10, limit_val_batches=0, callbacks=[memory, saver, *callbacks], **settings)
    trainer.fit(module, TinyData(batches_per_epoch=6), ckpt_path=checkpoint, weights_only=True)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("seeded", [True, False])
def test_dropout_is_drawn_as_if_the_run_had_not_stopped(tmp_path: Path, seeded: bool) -> None:
    """A preempted job with dropout must not end up with another model, and without the callback it does."""
    callbacks: list[Callback] = [ReproducibleSteps(seed=5)] if seeded else []
    whole = fit(tmp_path / "whole", callbacks)
    resumed = fit(tmp_path / "resumed", callbacks, tmp_path / "whole/step=4.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) == seeded


def test_steps_and_seeds_draw_differently(tmp_path: Path) -> None:
    """The same units dropped in every step would be another network, not dropout."""
    draws: list[float] = []

    class Drawing(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            draws.append(float(torch.rand(())))

    for seed in (0, 1):
        fit(tmp_path / str(seed), [ReproducibleSteps(seed=seed), Drawing()])
    assert len(set(draws)) == len(draws) == 20


def test_a_negative_seed_is_named() -> None:
    """It would end in an error of numpy in the first step."""
    with pytest.raises(InputError, match=r"seed.*-1"):
        ReproducibleSteps(seed=-1)
