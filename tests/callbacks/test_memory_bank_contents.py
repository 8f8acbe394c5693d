"""The contents of the bank: its filling, a slot per sample, averages, adaptation, files and resets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, SupConLoss, TripletLoss
from tests.callbacks.bank_cases import Foreign, Masked, bank_of_callback, fit
from tests.helpers import run_ranks
from tests.tiny import QUIET, TinyData, bank_of, tiny_module


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_initial_fill_encodes_random_training_samples(momentum: float | None) -> None:
    """The XBM paper starts the memory full; every key is that of its sample under the weights of that step."""
    torch.manual_seed(0)
    callback = MemoryBankCallback(size=40, encoder="net", momentum=momentum, start_step=3, initial_fill=True)
    module = fit(callback, Foreign(), steps=4)
    _, _, state, _ = module.records[3]
    assert state is not None
    assert len(state["labels"]) == 40
    data = TinyData()
    data.setup("fit")
    filled = state["indices"][8:]  # the first slots, the oldest rows, gave way to the batch of the step
    assert len(set(filled.tolist())) == 32
    assert bool((state["steps"] == 3).all())
    images = torch.stack([data.train_set[int(i)]["image"] for i in filled])  # type: ignore[index]
    again = fit(MemoryBankCallback(size=40, encoder="net", momentum=momentum, start_step=100), Foreign(), steps=3)
    torch.testing.assert_close(state["embeddings"][8:], again.net(images).detach())


def test_the_initial_fill_keeps_masked_samples_out() -> None:
    """A sample that is to stay out of the bank must not come in by the back door."""
    module = fit(MemoryBankCallback(size=40, encoder="net", initial_fill=True), steps=1, data=Masked())
    assert bool((bank_of(module).indices % 2 == 0).all())
    assert len(bank_of(module)) >= 20


def test_a_slot_per_sample_holds_its_latest_key() -> None:
    """With a queue as large as the training set, a sample may stand in it twice and another not at all."""
    module = fit(MemoryBankCallback(size=1.0, encoder="net", momentum=None, policy="samples"), steps=12)
    bank = bank_of(module)
    assert bank.size == 60
    latest: dict[int, Tensor] = {}
    for batch, embeddings, _, _ in module.records:
        latest.update(zip(batch["index"].tolist(), embeddings, strict=True))
    for index in range(60):
        if index in latest:
            assert int(bank.indices[index]) == index
            assert torch.equal(bank.embeddings[index], latest[index])
        else:
            assert int(bank.labels[index]) == -1


def test_a_sample_may_keep_a_moving_average() -> None:
    """The formula, sample by sample: an average that is off by one step would be another method."""
    callback = MemoryBankCallback(size=1.0, encoder="net", momentum=None, policy="samples", average=0.75)
    module = fit(callback, steps=12)
    slots: dict[int, Tensor] = {}
    for batch, embeddings, _, _ in module.records:
        for index, key in zip(batch["index"].tolist(), embeddings, strict=True):
            slots[index] = F.normalize(0.75 * slots[index] + 0.25 * key, dim=0) if index in slots else key
    for index, expected in slots.items():
        torch.testing.assert_close(bank_of(module).embeddings[index], expected)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adaptation_brings_the_bank_to_the_moments_of_the_keys(momentum: float | None) -> None:
    """Rows from before the last steps are to lie where the network now puts its embeddings."""
    plain = fit(MemoryBankCallback(size=60, encoder="net", momentum=momentum), steps=8)
    callback = MemoryBankCallback(size=60, encoder="net", momentum=momentum, adaptation="moments")
    module = fit(callback, Foreign(), steps=8)
    for trained, near in ((module, True), (plain, False)):
        bank = bank_of(trained)
        newest = bank.steps == 7
        gap = (bank.embeddings[~newest].mean(dim=0) - bank.embeddings[newest].mean(dim=0)).norm()
        assert bool(gap < 0.15) == near


def test_a_fit_starts_from_a_bank_file(tmp_path: Path) -> None:
    """A bank that took an hour to make is of use in more than one training; it is not there before its start."""
    saved = MemoryBank(12, 6)
    saved.enqueue(F.normalize(torch.randn(12, 6), dim=1), torch.arange(12), torch.arange(12))
    saved.save(tmp_path / "bank.pt")
    callback = MemoryBankCallback(size=40, encoder="net", start_step=2, bank_file=str(tmp_path / "bank.pt"))
    module = fit(callback, steps=3)
    states = [state for _, _, state, _ in module.records]
    assert [None if state is None else len(state["labels"]) for state in states] == [None, None, 20]
    assert torch.equal(bank_of(module).embeddings[:12], saved.embeddings)
    assert bank_of(module).size == 40


def test_a_loaded_bank_of_another_dimension_is_named(tmp_path: Path) -> None:
    """The embedder was changed since: its embeddings cannot be compared with those rows."""
    saved = MemoryBank(12, 5)
    saved.enqueue(F.normalize(torch.randn(2, 5), dim=1), torch.arange(2), torch.arange(2))
    saved.save(tmp_path / "bank.pt")
    callback = MemoryBankCallback(size=40, encoder="net", bank_file=str(tmp_path / "bank.pt"))
    with pytest.raises(InputError, match="5 columns and the keys have 6"):
        fit(callback)
    module = Foreign()
    module.net.dim = 6  # type: ignore[assignment]
    with pytest.raises(InputError, match="5 columns and net gives 6"):  # an embedder that tells, before any step
        fit(callback, module)


def test_a_reset_empties_the_bank_and_copies_the_encoder_anew() -> None:
    """After a change of the data, or of the loss, the old keys are those of another task."""
    callback = MemoryBankCallback(size=40, encoder="net")

    class Resetting(Foreign):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            if batch_idx == 3:
                callback.reset()
            return super().training_step(batch, batch_idx)

    module = fit(callback, Resetting(), steps=5)
    assert len(bank_of(module)) == 8  # those of the last step: the fourth step's had been enqueued before the reset
    torch.testing.assert_close(bank_of(module).embeddings, module.records[4][1])


@pytest.mark.parametrize("loss", [ContrastiveLoss(0.3), MultiSimilarityLoss(), TripletLoss(), SupConLoss()])
def test_a_bank_without_the_classes_of_the_batch_has_negatives_alone(tmp_path: Path, loss: nn.Module) -> None:
    """Right after the start no anchor may have a positive in the bank; nothing must become NaN by it."""
    saved = MemoryBank(12, 6)
    saved.enqueue(F.normalize(torch.randn(12, 6), dim=1), 1000 + torch.arange(12), 1000 + torch.arange(12))
    saved.save(tmp_path / "bank.pt")
    callback = MemoryBankCallback(size=12, momentum=None, enqueue="after", bank_file=str(tmp_path / "bank.pt"))
    module = fit(callback, tiny_module(loss=loss), steps=1)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


@pytest.mark.parametrize("options", [{"momentum": None}, {"policy": "queue"}])
def test_a_batch_larger_than_the_bank_leaves_its_last_rows(options: dict[str, Any]) -> None:
    """A small bank with a large batch is a user's slip, not a reason to lose the newest rows or to stop."""
    module = fit(MemoryBankCallback(size=3, encoder="net", **options), steps=3)
    batch, _, _, _ = module.records[-1]
    assert sorted(bank_of(module).indices.tolist()) == sorted(batch["index"][-3:].tolist())


class Late(SingleDeviceStrategy):
    """Loads checkpoints after setup, as the strategies for large models do."""

    restore_checkpoint_after_setup = True


def test_a_strategy_that_restores_late_finds_its_bank(tmp_path: Path) -> None:
    """FSDP and DeepSpeed load a checkpoint after on_fit_start; a bank that waits for it only there is lost."""
    for steps, checkpoint in ((3, None), (4, tmp_path / "three.ckpt")):
        callback = MemoryBankCallback(size=100, encoder="net")
        settings = {key: value for key, value in QUIET.items() if key != "accelerator"}
        trainer = Trainer(max_steps=steps, limit_val_batches=0, callbacks=[callback], strategy=Late("cpu"), **settings)
        module = Foreign()
        trainer.fit(module, TinyData(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "three.ckpt")
    assert len(bank_of(module)) == 32


def test_a_validated_checkpoint_keeps_its_bank_when_it_is_saved_again(tmp_path: Path) -> None:
    """Who converts a checkpoint by loading and saving it must not get one without the memory."""
    first = MemoryBankCallback(size=30)
    trainer = Trainer(max_steps=3, limit_val_batches=0, callbacks=[first], **QUIET)
    trainer.fit(tiny_module(), TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Trainer(limit_val_batches=1, callbacks=[MemoryBankCallback(size=30)], **QUIET)
    other.validate(tiny_module(), TinyData(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    other.save_checkpoint(tmp_path / "b.ckpt")
    state = torch.load(tmp_path / "b.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert torch.equal(state["bank"]["embeddings"], bank_of_callback(first).embeddings)


def fill_unevenly(rank: int, ranks: int) -> tuple[list[int], Tensor]:
    """A training whose ranks have batches of different sizes when the bank is filled."""
    data = TinyData()
    data.setup("fit")
    assert data.train_set is not None
    sizes = ((8, 8), (8, 3))[rank]
    loader = DataLoader(data.train_set, batch_sampler=[list(range(size)) for size in sizes])
    callback = MemoryBankCallback(size=40, encoder="net", start_step=1, initial_fill=True)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(ranks), GROUP_RANK="0", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="fill")
    trainer = Trainer(max_epochs=1, limit_val_batches=0, callbacks=[callback], devices=2, strategy="ddp", **QUIET)
    trainer.fit(Foreign(), loader)
    return bank_of_callback(callback).indices.tolist(), bank_of_callback(callback).embeddings


@pytest.mark.slow
def test_ranks_with_uneven_batches_fill_one_bank() -> None:
    """The fill is shared among the ranks; different ideas of its batches end in a mismatch of collectives."""
    (indices, embeddings), (others, same) = run_ranks(2, fill_unevenly)
    assert indices == others and torch.equal(embeddings, same)
    assert len(indices) == 40
