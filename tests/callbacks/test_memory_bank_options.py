"""What each option of the callback does to the bank, in modules of ours and in foreign ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dml import MemoryBank, MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, SupConLoss, TripletLoss
from tests.helpers import run_ranks
from tests.tiny import QUIET, TinyData, TinyEmbedder, bank_of, tiny_module

Seen = list[tuple[dict[str, Tensor], Tensor, dict[str, Any] | None, float]]


class Foreign(LightningModule):
    """Somebody else's module by the dict contract; notes batch, embeddings, bank and weight as its loss sees them."""

    memory_bank: MemoryBank | None

    def __init__(self, net: nn.Module | None = None, manual: bool = False) -> None:
        super().__init__()
        self.net = TinyEmbedder() if net is None else net
        self.loss = ContrastiveLoss(0.3)
        self.automatic_optimization = not manual
        self.seen: Seen = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Uses the bank as the README says."""
        embeddings, labels, indices = self.net(batch["image"]), batch["label"], batch["index"]
        bank = self.memory_bank
        state = None if bank is None else bank.state_dict()
        self.seen.append((batch, embeddings.detach(), state, 1.0 if bank is None else bank.weight))
        loss = self.loss(embeddings, labels, indices=indices)
        if bank is not None:
            against = self.loss(
                embeddings, labels, bank.embeddings, bank.labels, indices=indices, ref_indices=bank.indices
            )
            loss = loss + bank.weight * against
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A rate that moves the weights visibly, so that stale keys differ from fresh ones."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callbacks: Any, module: Any = None, steps: int = 6, data: Any = None, **settings: Any) -> Any:
    """Trains a few steps."""
    module = Foreign() if module is None else module
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = Trainer(max_steps=steps, limit_val_batches=0, callbacks=listed, **QUIET, **settings)
    trainer.fit(module, TinyData() if data is None else data)
    return module


def assert_bank(state: dict[str, Any] | None, expected: MemoryBank) -> None:
    """Compares rows, labels, indices and steps."""
    assert state is not None
    right = expected.state_dict()
    for part in ("embeddings", "labels", "indices", "steps"):
        torch.testing.assert_close(state[part], right[part], rtol=0, atol=0)


def test_online_keys_are_in_the_bank_before_the_loss() -> None:
    """XBM's order: the loss sees the batch in the bank, and the callback asks nothing of the module but its encoder."""
    module = fit(MemoryBankCallback(size=20, momentum=None, encoder="net"))
    expected = MemoryBank(20, 6)
    for step, (batch, embeddings, state, _) in enumerate(module.seen):
        expected.enqueue(embeddings, batch["label"], batch["index"], step)
        if step:  # at the first step the module had read an attribute that the bank was not yet in
            assert_bank(state, expected)
    assert not module.net._forward_hooks


def test_the_first_batch_finds_its_bank() -> None:
    """A module that asks for the bank after it has embedded the batch must not wait a step for it."""
    module = fit(MemoryBankCallback(size=20, momentum=None, encoder="net"), steps=1)
    assert module.seen[0][2] is not None


def test_momentum_keys_may_come_after_the_loss() -> None:
    """MoCo's order: the loss compares with earlier batches alone."""
    before = fit(MemoryBankCallback(size=100, momentum=0.0, encoder="net"))
    after = fit(MemoryBankCallback(size=100, momentum=0.0, encoder="net", enqueue="after"), copy.deepcopy(Foreign()))
    assert [0 if state is None else len(state["labels"]) for _, _, state, _ in before.seen] == [8, 16, 24, 32, 40, 48]
    assert [0 if state is None else len(state["labels"]) for _, _, state, _ in after.seen] == [0, 8, 16, 24, 32, 40]
    batch, embeddings, _, _ = after.seen[-1]
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
    saved = [states[callback.state_key]["bank"]["embeddings"] for callback in callbacks]
    for callback, embeddings in zip(callbacks, saved, strict=True):
        assert callback.bank is not None
        assert torch.equal(callback.bank.embeddings, embeddings)


class Masked(TinyData):
    """Keeps images with an odd index out of the bank."""

    def setup(self, stage: str | None = None) -> None:
        """Adds the mask to every sample."""
        super().setup(stage)
        inner: Any = self.train_set

        class WithMask(torch.utils.data.Dataset[Any]):
            labels = inner.labels

            def __len__(self) -> int:
                return len(inner)

            def __getitem__(self, position: int) -> dict[str, Any]:
                return {**inner[position], "enqueue": position % 2 == 0}

        self.train_set = WithMask()  # type: ignore[assignment]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"enqueue": "after"}, {"momentum": None, "enqueue": "after"}]
)
def test_a_mask_keeps_rows_out(options: dict[str, Any]) -> None:
    """Noisy or augmented samples may train the network without standing in the bank."""
    callback = MemoryBankCallback(size=100, encoder="net", **options)
    module = fit(callback, data=Masked())
    wanted = torch.cat([batch["index"][batch["index"] % 2 == 0] for batch, _, _, _ in module.seen])
    assert torch.equal(bank_of(module).indices, wanted)


def test_the_weight_warms_up() -> None:
    """A young bank is stale and sparse; its loss may come in slowly."""
    callback = MemoryBankCallback(size=100, encoder="net", start_step=1, weight=2.0, warmup_steps=4)
    module = fit(callback, steps=8)
    weights = [weight for _, _, state, weight in module.seen if state is not None]
    assert weights == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_weight_scales_the_loss_of_our_module() -> None:
    """A weight that is set and not used would be a setting that does nothing."""

    class Watched(MetricLearningModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            outputs = super().training_step(batch, batch_idx)
            losses.append(float(outputs["loss"].detach()))
            return outputs

    logged: dict[float, float] = {}
    for weight in (0.0, 1.0, 3.0):
        losses: list[float] = []
        module = Watched(TinyEmbedder(), ContrastiveLoss(0.3))
        fit(MemoryBankCallback(size=100, weight=weight), module, steps=1)
        logged[weight] = losses[0]
    assert logged[1.0] > logged[0.0]
    assert logged[3.0] - logged[0.0] == pytest.approx(3 * (logged[1.0] - logged[0.0]), rel=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_initial_fill_encodes_random_training_samples(momentum: float | None) -> None:
    """The XBM paper starts the memory full; every key is that of its sample under the weights of that step."""
    torch.manual_seed(0)
    callback = MemoryBankCallback(size=40, encoder="net", momentum=momentum, start_step=3, initial_fill=True)
    module = fit(callback, Foreign(), steps=4)
    _, _, state, _ = module.seen[3]
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


def test_a_slot_per_sample_holds_its_latest_key() -> None:
    """With a queue as large as the training set, a sample may stand in it twice and another not at all."""
    module = fit(MemoryBankCallback(size=1.0, encoder="net", momentum=None, policy="samples"), steps=12)
    bank = bank_of(module)
    assert bank.size == 60
    latest: dict[int, Tensor] = {}
    for batch, embeddings, _, _ in module.seen:
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
    for batch, embeddings, _, _ in module.seen:
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
    for each, near in ((module, True), (plain, False)):
        bank = bank_of(each)
        newest = bank.steps == 7
        gap = (bank.embeddings[~newest].mean(dim=0) - bank.embeddings[newest].mean(dim=0)).norm()
        assert bool(gap < 0.15) == near


def test_the_momentum_rises_to_its_end() -> None:
    """BYOL's cosine, at its ends and in the middle."""
    seen: list[float] = []

    class Noting(MemoryBankCallback):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            assert self.momentum_encoder is not None
            seen.append(self.momentum_encoder.momentum)

    fit(Noting(size=20, encoder="net", momentum=0.6, momentum_end=1.0), steps=10)
    assert seen[4] == pytest.approx(0.8)  # after step 5 of 10
    assert seen[-1] == pytest.approx(1.0)
    assert seen == sorted(seen)


def test_a_fit_starts_from_a_bank_file(tmp_path: Path) -> None:
    """A bank that took an hour to make is of use in more than one training; it is not there before its start."""
    saved = MemoryBank(12, 6)
    saved.enqueue(F.normalize(torch.randn(12, 6), dim=1), torch.arange(12), torch.arange(12))
    saved.save(tmp_path / "bank.pt")
    callback = MemoryBankCallback(size=40, encoder="net", start_step=2, bank_file=str(tmp_path / "bank.pt"))
    module = fit(callback, steps=3)
    states = [state for _, _, state, _ in module.seen]
    assert [None if state is None else len(state["labels"]) for state in states] == [None, None, 20]
    assert torch.equal(bank_of(module).embeddings[:12], saved.embeddings)
    assert bank_of(module).size == 40


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
    torch.testing.assert_close(bank_of(module).embeddings, module.seen[4][1])


class Cropping(Foreign):
    """Embeds two crops at once: two rows for each label."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Calls the encoder with other rows than the batch has."""
        self.net(torch.cat((batch["image"], batch["image"])))
        return super().training_step(batch, batch_idx)


class Idle(Foreign):
    """Never calls the submodule that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = TinyEmbedder()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryBankCallback(warmup_steps=-1), "warmup_steps.*-1"),
        (lambda: MemoryBankCallback(weight=-1.0), "weight.*-1"),
        (lambda: MemoryBankCallback(enqueue="late"), "enqueue must be one of before, after, got 'late'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(policy="stack"), "policy.*'stack'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(adaptation="mean"), "adaptation.*'mean'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(average=0.5), "average 0.5 needs policy 'samples'"),
        (lambda: MemoryBankCallback(size=1.0, policy="samples", average=1.0), "average.*1.0"),
        (lambda: MemoryBankCallback(size=0.5, policy="samples"), "size to 1.0, got 0.5"),
        (lambda: MemoryBankCallback(momentum_end=0.5), "momentum_end.*0.5 with momentum=0.99"),
        (lambda: MemoryBankCallback(momentum=None, momentum_end=0.5), "momentum_end.*momentum=None"),
        (lambda: fit(MemoryBankCallback(momentum=None, encoder="net"), Cropping()), r"\(8, D\).*\(16, 6\)"),
        (lambda: fit(MemoryBankCallback(momentum=None, encoder="idle"), Idle()), "did not call Idle.idle"),
        (lambda: fit(MemoryBankCallback(encoder="net", bank_file="none.pt")), "none.pt"),
        (
            lambda: fit(
                MemoryBankCallback(encoder="net", momentum_end=1.0), steps=-1, max_epochs=-1, max_time="00:00:00:01"
            ),
            "momentum_end needs to know the last step",
        ),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """Settings that exclude each other, or a module that does not fit them, must not train something else silently."""
    with pytest.raises(InputError, match=words):
        call()


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


def test_our_module_trains_with_everything_on() -> None:
    """The options are used together, too."""
    callback = MemoryBankCallback(
        size=1.0, policy="samples", average=0.5, adaptation="kalman", initial_fill=True, start_step=1, warmup_steps=2
    )
    module = fit(callback, tiny_module(), steps=6)
    assert int(bank_of(module).store.labelled) == 60
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


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
    batch, _, _, _ = module.seen[-1]
    assert sorted(bank_of(module).indices.tolist()) == sorted(batch["index"][-3:].tolist())


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
        last = module.seen[-1][1]
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


def test_the_initial_fill_keeps_masked_samples_out() -> None:
    """A sample that is to stay out of the bank must not come in by the back door."""
    module = fit(MemoryBankCallback(size=40, encoder="net", initial_fill=True), steps=1, data=Masked())
    assert bool((bank_of(module).indices % 2 == 0).all())
    assert len(bank_of(module)) >= 20


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


def bank_of_callback(callback: MemoryBankCallback) -> MemoryBank:
    """The bank that a callback must hold after a training."""
    assert callback.bank is not None
    return callback.bank


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
