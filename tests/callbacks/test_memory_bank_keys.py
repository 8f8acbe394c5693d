"""The keys that enter the bank: whose they are, when they come, and which rows stay out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from tests.callbacks.bank_cases import Foreign, Masked, assert_bank, fit
from tests.tiny import QUIET, TinyData, TinyEmbedder, bank_of


def test_online_keys_are_in_the_bank_before_the_loss() -> None:
    """XBM's order: the loss sees the batch in the bank, and the callback asks nothing of the module but its encoder."""
    module = fit(MemoryBankCallback(size=20, momentum=None, encoder="net"))
    expected = MemoryBank(20, 6)
    for step, (batch, embeddings, state, _) in enumerate(module.records):
        expected.enqueue(embeddings, batch["label"], batch["index"], step)
        if step:  # at the first step the module had read an attribute that the bank was not yet in
            assert_bank(state, expected)
    assert not module.net._forward_hooks


def test_the_first_batch_finds_its_bank() -> None:
    """A module that asks for the bank after it has embedded the batch must not wait a step for it."""
    module = fit(MemoryBankCallback(size=20, momentum=None, encoder="net"), steps=1)
    assert module.records[0][2] is not None


def test_momentum_keys_may_come_after_the_loss() -> None:
    """MoCo's order: the loss compares with earlier batches alone."""
    before = fit(MemoryBankCallback(size=100, momentum=0.0, encoder="net"))
    after = fit(MemoryBankCallback(size=100, momentum=0.0, encoder="net", enqueue="after"), copy.deepcopy(Foreign()))
    for module, rows in ((before, [8, 16, 24, 32, 40, 48]), (after, [0, 8, 16, 24, 32, 40])):
        assert [0 if state is None else len(state["labels"]) for _, _, state, _ in module.records] == rows
    batch, embeddings, _, _ = after.records[-1]
    torch.testing.assert_close(bank_of(after).embeddings[-8:], embeddings)  # a momentum of 0 copies the encoder
    assert torch.equal(bank_of(after).labels[-8:], batch["label"])


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_manual_optimization_has_the_same_bank(momentum: float | None) -> None:
    """Modules with several optimizers, GAN-like ones, cannot use automatic optimization."""
    automatic = fit(MemoryBankCallback(size=30, momentum=momentum, encoder="net"))
    manual = fit(MemoryBankCallback(size=30, momentum=momentum, encoder="net"), Foreign(manual=True))
    assert_bank(bank_of(manual).state_dict(), bank_of(automatic))


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_embedders_have_the_same_bank(momentum: float | None, way: str) -> None:
    """torch.compile changes what hooks and copies see of a module; the keys must stay those of the embedder."""
    net: Any = TinyEmbedder()
    if way == "wrapped":
        net = torch.compile(net, backend="eager")
    else:
        net.compile(backend="eager")
    callback = MemoryBankCallback(size=30, momentum=momentum, encoder="net", start_step=2)
    compiled = fit(callback, Foreign(net))
    plain = fit(MemoryBankCallback(size=30, momentum=momentum, encoder="net", start_step=2))
    torch.testing.assert_close(bank_of(compiled).embeddings, bank_of(plain).embeddings)
    assert torch.equal(bank_of(compiled).indices, bank_of(plain).indices)
    if momentum is not None:  # the saved encoder fits an embedder that is not compiled
        assert set(callback.state_dict()["encoder"]) == set(TinyEmbedder().state_dict())


class TwoHeads(Foreign):
    """A trunk with two heads, each compared with a bank of its own."""

    first: MemoryBank | None
    second: MemoryBank | None

    def __init__(self) -> None:
        super().__init__()
        self.other = TinyEmbedder(seed=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns the second head's embeddings under a name of their own."""
        outputs = super().training_step(batch, batch_idx)
        others = self.other(batch["image"])
        outputs["loss"] = outputs["loss"] + self.loss(others, batch["label"])
        return {**outputs, "other_embeddings": others.detach()}


@pytest.mark.parametrize("enqueue", ["before", "after"])
def test_two_banks_of_two_heads(tmp_path: Path, enqueue: Any) -> None:
    """Each bank keeps to its head, in training and in the checkpoint."""
    options: dict[str, Any] = {"size": 20, "momentum": None, "enqueue": enqueue}
    callbacks = [
        MemoryBankCallback(**options, encoder="net", attribute="memory_bank"),
        MemoryBankCallback(**options, encoder="other", attribute="second", output="other_embeddings"),
    ]
    module = TwoHeads()
    trainer = Trainer(max_steps=5, limit_val_batches=0, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, TinyData())
    assert module.memory_bank is not None and module.second is not None
    assert torch.equal(module.memory_bank.indices, module.second.indices)
    assert not torch.allclose(module.memory_bank.embeddings, module.second.embeddings)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    states = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    embeddings_of_banks = [states[callback.state_key]["bank"]["embeddings"] for callback in callbacks]
    for callback, embeddings in zip(callbacks, embeddings_of_banks, strict=True):
        assert callback.bank is not None
        assert torch.equal(callback.bank.embeddings, embeddings)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"enqueue": "after"}, {"momentum": None, "enqueue": "after"}]
)
def test_a_mask_keeps_rows_out(options: dict[str, Any]) -> None:
    """Noisy or augmented samples may train the network without standing in the bank."""
    callback = MemoryBankCallback(size=100, encoder="net", **options)
    module = fit(callback, data=Masked())
    unmasked = torch.cat([batch["index"][batch["index"] % 2 == 0] for batch, _, _, _ in module.records])
    assert torch.equal(bank_of(module).indices, unmasked)


class Numbered(Masked):
    """Gives the mask as numbers."""

    def setup(self, stage: str | None = None) -> None:
        """Makes every sample's flag an integer."""
        super().setup(stage)
        inner: Any = self.train_set
        inner.__class__ = type("Numbered", (type(inner),), {"__getitem__": _numbered(type(inner).__getitem__)})


def _numbered(getter: Any) -> Any:
    return lambda self, position: {**getter(self, position), "enqueue": int(position % 2 == 0)}


def test_a_mask_of_numbers_is_refused() -> None:
    """As an index it would store the rows 0 and 1 again and again."""
    with pytest.raises(InputError, match=r"enqueue must be bool, got torch\.int64"):
        fit(MemoryBankCallback(size=100, encoder="net"), data=Numbered())


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("kind", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_keeps_keys_on_the_sphere(momentum: float | None, kind: Any) -> None:
    """Keys that autocast rounded would be shorter or longer than the embeddings that they are compared with."""
    scaler = torch.amp.GradScaler("cpu") if kind == "16-mixed" else None
    callback = MemoryBankCallback(size=20, encoder="net", momentum=momentum)
    module = fit(callback, steps=3, plugins=[MixedPrecision(kind, "cpu", scaler)])
    assert bank_of(module).dtype == torch.float32
    torch.testing.assert_close(bank_of(module).embeddings.norm(dim=1), torch.ones(20))
    if momentum is None:  # the third batch: its first rows fill the end, the others the start
        last = module.records[-1][1]
        assert torch.equal(torch.cat((bank_of(module).embeddings[16:], bank_of(module).embeddings[:4])), last)


class Skipping(Foreign):
    """Leaves every other batch out, as modules do whose batch holds nothing to learn from."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Returns None to skip."""
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("enqueue", ["before", "after"])
def test_a_skipped_batch_leaves_nothing(enqueue: Any) -> None:
    """Lightning lets training_step return None; a bank must not end the training for it."""
    callback = MemoryBankCallback(size=100, encoder="net", momentum=None, enqueue=enqueue)
    module = Skipping()
    trainer = Trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0, callbacks=[callback], **QUIET)
    trainer.fit(module, TinyData())
    assert len(bank_of(module)) == 16
