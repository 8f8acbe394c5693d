"""A run resumed from a checkpoint in mid-epoch equals the uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from lightning_dml import MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from tests.tiny import QUIET, TinyData, tiny_module


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Files the loss under the global step, so that a resumed run is compared at the same place."""
        self.values[trainer.global_step] = float(outputs["loss"].detach())


def fit(
    folder: Path, momentum: float | None, checkpoint: Path | None = None, size: int = 30, every: int = 4
) -> tuple[MetricLearningModule, MemoryBankCallback, dict[int, float]]:
    """Trains on from `checkpoint`, or from the start, and keeps a checkpoint every few steps."""
    module, losses = tiny_module(), Losses()
    memory = MemoryBankCallback(size=size, start_step=2, momentum=momentum)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = Trainer(
        max_epochs=3, limit_val_batches=0, callbacks=[memory, losses, saver], **{**QUIET, "enable_checkpointing": True}
    )
    # Six steps to an epoch, so that 4 is in the middle of one and 12 at the end of another.
    data = TinyData(augment=True, batches_per_epoch=6)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 18
    return module, memory, losses.values


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_resumed_runs_equal_the_uninterrupted_one(tmp_path: Path, momentum: float | None) -> None:
    """A preempted job must not end up with another model than one that was left to run."""
    module, memory, losses = fit(tmp_path / "whole", momentum)
    for step in (4, 8, 12, 16):
        resumed, its_memory, its_losses = fit(tmp_path / str(step), momentum, tmp_path / f"whole/step={step}.ckpt")
        assert its_losses == {at: value for at, value in losses.items() if at > step}
        for name, tensor in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), (step, name)
        for part in ("embeddings", "labels", "indices", "steps"):
            assert torch.equal(getattr(its_memory.bank, part), getattr(memory.bank, part)), (step, part)
        if momentum is not None:
            assert memory.momentum_encoder is not None and its_memory.momentum_encoder is not None
            for name, tensor in memory.momentum_encoder.state_dict().items():
                assert torch.equal(its_memory.momentum_encoder.state_dict()[name], tensor), (step, name)


def test_without_the_callback_state_the_run_would_differ(tmp_path: Path) -> None:
    """The test above can fail: a resume that forgets the bank takes another course."""
    _, _, losses = fit(tmp_path / "whole", 0.9)
    path = tmp_path / "whole/step=8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {key: v for key, v in checkpoint["callbacks"].items() if "MemoryBank" not in key}
    torch.save(checkpoint, path)
    _, _, its_losses = fit(tmp_path / "resumed", 0.9, path)
    assert its_losses[9] != losses[9]


def test_a_resume_may_change_the_size(tmp_path: Path) -> None:
    """Who resumes with a smaller bank to save memory keeps the newest keys, the useful ones."""
    _, memory, _ = fit(tmp_path / "whole", None, every=17)
    _, smaller, _ = fit(tmp_path / "smaller", None, tmp_path / "whole/step=17.ckpt", size=10)
    assert memory.bank is not None and smaller.bank is not None
    assert smaller.bank.size == 10
    newest = memory.bank.steps.sort(descending=True).values[:10]
    assert torch.equal(smaller.bank.steps.sort(descending=True).values, newest)
