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
from lightning_dml.errors import InputError
from tests.tiny import QUIET, TinyData, tiny_module


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Files the loss under the global step, so that a resumed run is compared at the same place."""
        self.values[trainer.global_step] = float(outputs["loss"].detach())


MOMENTUM: dict[str, Any] = {"momentum": 0.9}
ONLINE: dict[str, Any] = {"momentum": None}
SAMPLES: dict[str, Any] = {"size": 60, "policy": "samples", "average": 0.5}


def fit(
    folder: Path, settings: dict[str, Any], checkpoint: Path | None = None, every: int = 4
) -> tuple[MetricLearningModule, MemoryBankCallback, dict[int, float]]:
    """Trains on from `checkpoint`, or from the start, and keeps a checkpoint every few steps."""
    module, losses = tiny_module(), Losses()
    memory = MemoryBankCallback(**{"size": 30, "start_step": 2, **settings})
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = Trainer(
        max_epochs=3, limit_val_batches=0, callbacks=[memory, losses, saver], **{**QUIET, "enable_checkpointing": True}
    )
    # Six steps to an epoch, so that 4 is in the middle of one and 12 at the end of another.
    data = TinyData(augment=True, batches_per_epoch=6)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 18
    return module, memory, losses.values


@pytest.mark.parametrize(
    "settings",
    [
        MOMENTUM,
        ONLINE,
        {**ONLINE, "enqueue": "after"},
        {**MOMENTUM, "enqueue": "after", "momentum_end": 1.0, "warmup_steps": 9},
        {**MOMENTUM, "initial_fill": True, "adaptation": "moments", "dtype": "float16"},
        {**MOMENTUM, **SAMPLES, "adaptation": "kalman"},
        {**ONLINE, **SAMPLES},
    ],
    ids=["momentum", "online", "online-after", "schedules", "fill-moments", "samples-kalman", "samples-online"],
)
def test_resumed_runs_equal_the_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A preempted job must not end up with another model than one that was left to run."""
    module, memory, losses = fit(tmp_path / "whole", settings)
    for step in (4, 12) if len(settings) > 1 else (4, 8, 12, 16):
        resumed, its_memory, its_losses = fit(tmp_path / str(step), settings, tmp_path / f"whole/step={step}.ckpt")
        assert its_losses == {at: value for at, value in losses.items() if at > step}
        for name, tensor in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), (step, name)
        for part in ("embeddings", "labels", "indices", "steps"):
            assert torch.equal(getattr(its_memory.bank, part), getattr(memory.bank, part)), (step, part)
        if settings["momentum"] is not None:
            assert memory.momentum_encoder is not None and its_memory.momentum_encoder is not None
            for name, tensor in memory.momentum_encoder.state_dict().items():
                assert torch.equal(its_memory.momentum_encoder.state_dict()[name], tensor), (step, name)


def test_without_the_callback_state_the_run_would_differ(tmp_path: Path) -> None:
    """The test above can fail: a resume that forgets the bank takes another course."""
    _, _, losses = fit(tmp_path / "whole", MOMENTUM)
    path = tmp_path / "whole/step=8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {key: v for key, v in checkpoint["callbacks"].items() if "MemoryBank" not in key}
    torch.save(checkpoint, path)
    _, _, its_losses = fit(tmp_path / "resumed", MOMENTUM, path)
    assert its_losses[9] != losses[9]


def test_a_resume_may_change_the_size(tmp_path: Path) -> None:
    """Who resumes with a smaller bank to save memory keeps the newest keys, the useful ones."""
    _, memory, _ = fit(tmp_path / "whole", ONLINE, every=17)
    _, smaller, _ = fit(tmp_path / "smaller", {**ONLINE, "size": 10}, tmp_path / "whole/step=17.ckpt")
    assert memory.bank is not None and smaller.bank is not None
    assert smaller.bank.size == 10
    newest = memory.bank.steps.sort(descending=True).values[:10]
    assert torch.equal(smaller.bank.steps.sort(descending=True).values, newest)


def test_a_resume_may_change_the_policy(tmp_path: Path) -> None:
    """The newest key of each sample finds its slot; back in a queue, rows come in the order of their steps."""
    _, queue, _ = fit(tmp_path / "queue", ONLINE, every=17)
    _, slots, _ = fit(tmp_path / "slots", {**ONLINE, **SAMPLES}, tmp_path / "queue/step=17.ckpt", every=18)
    assert queue.bank is not None and slots.bank is not None
    assert slots.bank.policy == "samples"
    assert set(queue.bank.indices.tolist()) <= set(slots.bank.indices.tolist())
    _, again, _ = fit(tmp_path / "again", {**ONLINE, "size": 20}, tmp_path / "slots/step=18.ckpt")
    assert again.bank is not None
    assert again.bank.steps.tolist() == sorted(again.bank.steps.tolist())
    assert int(again.bank.steps.min()) >= int(slots.bank.steps[slots.bank.steps >= 0].sort().values[-20])


def test_a_changed_embedder_is_named(tmp_path: Path) -> None:
    """Keys of another embedder, or an encoder that does not fit, must not be mixed with new ones."""
    _, memory, _ = fit(tmp_path / "whole", MOMENTUM, every=17)
    state = memory.state_dict()
    other = MemoryBankCallback(size=30, momentum=0.9)
    state["encoder"] = {name: torch.zeros(3) for name in state["encoder"]}
    other.setup(Trainer(**QUIET), tiny_module(), "fit")
    other.load_state_dict(state)
    with pytest.raises(InputError, match="does not fit the embedder"):
        other.on_fit_start(Trainer(**QUIET), tiny_module())


def test_a_finished_run_keeps_its_bank_in_the_next_checkpoint(tmp_path: Path) -> None:
    """Resumed with nothing left to do, and saved again for another machine, it must not come out empty."""
    for path, checkpoint in ((tmp_path / "end.ckpt", None), (tmp_path / "again.ckpt", tmp_path / "end.ckpt")):
        memory = MemoryBankCallback(size=30, momentum=0.9)
        trainer = Trainer(max_steps=4, limit_val_batches=0, callbacks=[memory], **QUIET)
        trainer.fit(tiny_module(), TinyData(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(path)
        assert len(torch.load(path, weights_only=True)["callbacks"][memory.state_key]["bank"]["labels"]) == 30
