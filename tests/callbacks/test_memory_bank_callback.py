"""The callback in one process: what the bank holds at each step, whose keys, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lightning_dml import MemoryBank, MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss
from tests.tiny import QUIET, TinyData, TinyEmbedder, bank_of, tiny_module


class Watched(MetricLearningModule):
    """Notes at each training step the batch, the bank as the loss sees it, and the weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(TinyEmbedder(), ContrastiveLoss(0.3), **options)
        self.records: list[tuple[dict[str, Tensor], dict[str, Any] | None, nn.Module]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Copies the state before the step, as the step itself would change it."""
        bank = None if self.memory_bank is None else self.memory_bank.state_dict()
        self.records.append((batch, bank, copy.deepcopy(self.embedder)))
        return super().training_step(batch, batch_idx)


def fit(callback: MemoryBankCallback, steps: int = 6, **settings: Any) -> Watched:
    """Trains a few steps on a rate that moves the weights visibly, so that stale keys differ from fresh ones."""
    module = Watched(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = Trainer(max_steps=steps, limit_val_batches=0, callbacks=[callback], **QUIET, **settings)
    trainer.fit(module, TinyData())
    return module


def test_online_keys_are_the_step_outputs_enqueued_after_it() -> None:
    """A batch already in the bank at its own step would be compared with itself."""
    module = fit(MemoryBankCallback(size=20, momentum=None, enqueue="after"))
    expected = MemoryBank(20, 6)
    for step, (batch, bank, embedder) in enumerate(module.records):
        if step == 0:
            assert bank is None
        else:
            assert bank is not None
            for key, value in expected.state_dict().items():
                assert torch.equal(torch.as_tensor(bank[key]), torch.as_tensor(value)), key
        expected.enqueue(embedder(batch["image"]), batch["label"], batch["index"], step)
    assert torch.equal(bank_of(module).embeddings, expected.embeddings)


def test_momentum_keys_follow_the_formula_and_hold_the_current_batch() -> None:
    """MoCo's formula step by step; off by one update, the keys would lag behind what papers report."""
    module = fit(MemoryBankCallback(size=20, momentum=0.8))
    keys = copy.deepcopy(module.records[0][2])
    expected = MemoryBank(20, 6)
    for step, (batch, bank, embedder) in enumerate(module.records):
        if step:
            for key, online in zip(keys.parameters(), embedder.parameters(), strict=True):
                key.data = 0.8 * key.data + 0.2 * online.data
        expected.enqueue(keys(batch["image"]), batch["label"], batch["index"], step)
        assert bank is not None
        torch.testing.assert_close(bank["embeddings"], expected.embeddings)
        assert torch.equal(bank["indices"], expected.indices)
        assert torch.equal(bank["steps"], expected.steps)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_bank_waits_for_its_start_step(momentum: float | None) -> None:
    """Keys from before the warm-up would drag early, useless embeddings into the loss."""
    enqueue: Any = "after" if momentum is None else "before"
    module = fit(MemoryBankCallback(size=100, start_step=3, momentum=momentum, enqueue=enqueue))
    rows = [0 if bank is None else len(bank["labels"]) for _, bank, _ in module.records]
    assert rows == ([0, 0, 0, 0, 8, 16] if momentum is None else [0, 0, 0, 8, 16, 24])
    if momentum is not None:  # the encoder starts as the embedder of that step, not of the first
        batch, bank, embedder = module.records[3]
        assert bank is not None
        torch.testing.assert_close(bank["embeddings"], embedder(batch["image"]).detach())


def test_a_start_beyond_the_end_leaves_the_bank_out() -> None:
    """The baseline without memory is this setting; an empty bank must not change the loss."""
    module = fit(MemoryBankCallback(size=20, start_step=100))
    assert module.memory_bank is None


@pytest.mark.parametrize(("size", "entries"), [(0.5, 30), (1.0, 60), (2, 2), (3, 3)])
def test_size_is_entries_or_a_share_of_the_training_set(size: float, entries: int) -> None:
    """A ratio that is taken for entries, or the other way round, makes a bank of the wrong size."""
    assert bank_of(fit(MemoryBankCallback(size=size), steps=2)).size == entries


def test_the_encoder_moves_once_per_optimizer_step() -> None:
    """With gradient accumulation, a move per batch would make the momentum another one than was set."""
    module = fit(MemoryBankCallback(size=100, momentum=0.5), steps=2, accumulate_grad_batches=3)
    assert len(module.records) == 6
    keys, previous = copy.deepcopy(module.records[0][2]), module.records[0][2]
    for batch, bank, embedder in module.records:
        assert bank is not None
        if not torch.equal(previous.get_parameter("net.1.weight"), embedder.get_parameter("net.1.weight")):
            for key, online in zip(keys.parameters(), embedder.parameters(), strict=True):
                key.data = 0.5 * key.data + 0.5 * online.data
        torch.testing.assert_close(bank["embeddings"][-8:], keys(batch["image"]).detach())
        previous = embedder


def test_the_model_state_holds_neither_bank_nor_encoder(tmp_path: Path) -> None:
    """Weights for inference would otherwise be as large as the bank, and not load without it."""
    module = tiny_module()
    trainer = Trainer(max_steps=3, limit_val_batches=0, callbacks=[MemoryBankCallback(size=20)], **QUIET)
    trainer.fit(module, TinyData())
    assert set(module.state_dict()) == {f"embedder.{name}" for name in TinyEmbedder().state_dict()}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if "MemoryBankCallback" in key]
    assert torch.equal(state["bank"]["labels"], bank_of(module).labels)


def test_the_dtype_is_kept() -> None:
    """Who halves the memory of a large bank must get what was asked for."""
    assert bank_of(fit(MemoryBankCallback(size=20, dtype="bfloat16"), steps=2)).dtype == torch.bfloat16


def test_a_second_trainer_starts_with_an_empty_bank() -> None:
    """Keys of another model, left over in a notebook, would poison the new training."""
    callback = MemoryBankCallback(size=60)
    fit(callback, steps=4)
    module = fit(callback, steps=1)
    assert len(bank_of(module)) == 8


def test_autocast_keys_stay_float32_in_the_bank() -> None:
    """Mixed precision must not round the stored keys off the unit sphere."""
    module = fit(MemoryBankCallback(size=20), steps=2, precision="bf16-mixed")
    assert bank_of(module).dtype == torch.float32
    torch.testing.assert_close(bank_of(module).embeddings.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_nan_keys_before_the_loss_are_refused_and_reported(momentum: float | None) -> None:
    """The default order as well: an encoder that breaks down must not take the bank with it."""

    class Breaking(TinyEmbedder):
        def forward(self, images: Tensor) -> Tensor:
            keys = super().forward(images)
            broken = torch.zeros_like(keys)
            broken[0] = torch.nan
            return keys if torch.is_grad_enabled() and momentum is not None else keys + broken

    loss = ContrastiveLoss(0.3, validate=False)
    module = MetricLearningModule(Breaking(), loss, batch_weight=0.0, memory_weight=1e-9)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        callbacks=[MemoryBankCallback(size=100, momentum=momentum)],
        **QUIET,
    )
    with pytest.warns(UserWarning, match=r"\d+ embeddings were NaN"):
        trainer.fit(module, TinyData())
    assert torch.isfinite(bank_of(module).embeddings).all()
    assert int((bank_of(module).labels == -1).sum()) >= 2


def test_nan_embeddings_are_refused_and_reported() -> None:
    """One bad batch would spoil every later loss; the user learns of it and the bank stays clean."""

    class Broken(Watched):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            outputs = super().training_step(batch, batch_idx)
            outputs["embeddings"][0] = torch.nan
            return outputs

    module = Broken()
    callback = MemoryBankCallback(size=100, momentum=None, enqueue="after")
    trainer = Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, callbacks=[callback], **QUIET)
    with pytest.warns(UserWarning, match="3 embeddings were NaN"):
        trainer.fit(module, TinyData())
    assert torch.isfinite(bank_of(module).embeddings).all()
    assert int((bank_of(module).labels == -1).sum()) == 3


class WithoutDict(Watched):
    """The most common foreign module: its training_step returns the loss alone."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        """Leaves out what the callback needs."""
        return super().training_step(batch, batch_idx)["loss"]


class TupleData(TinyData):
    """The most common foreign data: (image, label) tuples instead of dicts."""

    def train_dataloader(self) -> Any:
        """Has no index and no names."""
        pairs: Any = [(torch.zeros(1, 8, 8), 0)] * 8
        return torch.utils.data.DataLoader(pairs, batch_size=4)


def run(callback: MemoryBankCallback, module: Any = None, data: Any = None) -> None:
    """Trains just long enough for the callback to see a batch and a step's output."""
    trainer = Trainer(max_steps=2, limit_val_batches=0, callbacks=[callback], **QUIET)
    trainer.fit(module or tiny_module(), data or TinyData())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryBankCallback(size=-1), r"memory size must be positive or a ratio in \(0, 1\], got -1"),
        (lambda: MemoryBankCallback(size=1.5), "got 1.5"),
        (lambda: MemoryBankCallback(size=float("nan")), "got nan"),
        (lambda: MemoryBankCallback(size=True), "got True"),
        (lambda: MemoryBankCallback(size=1), "single entry.*ratio 1.0"),
        (lambda: run(MemoryBankCallback(attribute="embedder")), "attribute must name.*embedder is a TinyEmbedder"),
        (lambda: run(MemoryBankCallback(size=50, policy="samples", start_step=99)), "each of the 60 training samples"),
        (lambda: MemoryBankCallback(start_step=-1), "start_step.*-1"),
        (lambda: MemoryBankCallback(momentum=1.1), "momentum.*1.1"),
        (lambda: MemoryBankCallback(dtype="int8"), "dtype.*'int8'"),  # type: ignore[arg-type]
        (lambda: run(MemoryBankCallback(encoder="net")), "MetricLearningModule has no submodule 'net'"),
        (
            lambda: run(MemoryBankCallback(momentum=None, enqueue="after"), WithoutDict()),
            "embeddings, indices, labels missing",
        ),
        (lambda: run(MemoryBankCallback(), data=TupleData()), "got list.*momentum=None"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """A wrong setting or module stops with its name and value, not with a traceback from deep inside."""
    with pytest.raises(InputError, match=words):
        call()


def test_a_validated_checkpoint_does_not_come_back_in_the_next_fit(tmp_path: Path) -> None:
    """Its bank is that of other weights; loading it unasked would undo the newer one."""
    callback, module, data = MemoryBankCallback(size=100), tiny_module(), TinyData()
    trainer = Trainer(max_steps=2, limit_val_batches=1, callbacks=[callback], **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, data)
    assert len(callback.bank or []) == 32
    trainer.validate(module, data, ckpt_path=tmp_path / "early.ckpt", verbose=False, weights_only=True)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, data)
    assert len(callback.bank or []) == 48


def test_half_precision_parameters_are_refused() -> None:
    """In bfloat16 a step of a hundredth rounds to nothing: the encoder would never move."""
    with pytest.raises(InputError, match=r"float32 parameters.*bfloat16"):
        fit(MemoryBankCallback(size=20, start_step=1000), precision="bf16-true")  # long before the encoder is made
