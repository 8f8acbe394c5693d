"""The module: what it trains on, its optimizers, other libraries' losses, evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import nn

from lightning_dml import MemoryBank, MetricLearningModule, RetrievalMetrics
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, MarginLoss, MultiSimilarityLoss
from tests.tiny import QUIET, TinyData, TinyEmbedder, tiny_module


def batch_and_bank() -> tuple[dict[str, torch.Tensor], MemoryBank]:
    """A batch and a bank that share some samples, so that leaving out self shows."""
    batch = {"image": torch.randn(8, 1, 8, 8), "label": torch.arange(8) % 3, "index": torch.arange(8)}
    bank = MemoryBank(20, 6)
    rows = nn.functional.normalize(torch.randn(20, 6), dim=1)
    bank.enqueue(rows, torch.arange(20) % 4, torch.arange(20) + 4)
    return batch, bank


@pytest.mark.parametrize(("batch_weight", "memory_weight"), [(1.0, 1.0), (0.0, 2.0), (0.5, 0.0)])
def test_the_total_is_the_weighted_sum(batch_weight: float, memory_weight: float) -> None:
    """A weight of 0 has to switch its part off, and the returned keys must carry no graph."""
    batch, bank = batch_and_bank()
    memory_loss = MultiSimilarityLoss()
    module = tiny_module(batch_weight=batch_weight, memory_weight=memory_weight, memory_loss=memory_loss)
    module.memory_bank = bank
    outputs = module.training_step(batch, 0)
    embeddings = module(batch["image"])
    in_batch = ContrastiveLoss(0.3)(embeddings, batch["label"])
    against = memory_loss(
        embeddings,
        batch["label"],
        bank.embeddings,
        bank.labels,
        indices=batch["index"],
        ref_indices=bank.indices,
    )
    torch.testing.assert_close(outputs["loss"], batch_weight * in_batch + memory_weight * against)
    assert not outputs["embeddings"].requires_grad
    torch.testing.assert_close(outputs["embeddings"], embeddings.detach())


def test_with_memory_alone_the_first_step_trains_nothing_but_runs() -> None:
    """The bank is empty at first; a loss without a graph would crash the first backward."""
    module = tiny_module(batch_weight=0.0)
    batch, _ = batch_and_bank()
    loss = module.training_step(batch, 0)["loss"]
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("loss", [pml.ContrastiveLoss(), pml.MultiSimilarityLoss(), pml.TripletMarginLoss()])
def test_losses_of_pytorch_metric_learning_drop_in(loss: nn.Module) -> None:
    """Users bring losses of that library along; with memory they must mean what they mean there."""
    batch, bank = batch_and_bank()
    module = tiny_module(loss=loss, memory_weight=0.5)
    module.memory_bank = bank
    embeddings = module(batch["image"])
    others = bank.indices >= 8  # less the samples of the batch
    expected = loss(embeddings, batch["label"]) + 0.5 * loss(
        embeddings, batch["label"], ref_emb=bank.embeddings[others], ref_labels=bank.labels[others]
    )
    torch.testing.assert_close(module.training_step(batch, 0)["loss"], expected)
    Trainer(max_steps=3, limit_val_batches=0, callbacks=[MemoryBankCallback(size=30)], **QUIET).fit(module, TinyData())
    assert len(module.memory_bank) == 24


def test_optimizer_defaults_and_choices() -> None:
    """The documented defaults, and a scheduler that is told what to watch."""
    default = tiny_module(optimizer=None).configure_optimizers()
    assert isinstance(default, torch.optim.AdamW)
    assert (default.defaults["lr"], default.defaults["weight_decay"]) == (1e-4, 5e-4)

    plateau = partial(ReduceLROnPlateau, monitor="val/map@r", mode="max")
    settings = tiny_module(lr_scheduler=plateau).configure_optimizers()
    assert isinstance(settings["optimizer"], torch.optim.SGD)
    assert settings["optimizer"].defaults["weight_decay"] == 0
    assert settings["lr_scheduler"]["monitor"] == "val/map@r"

    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=7)
    settings = tiny_module(lr_scheduler=cosine, lr_interval="step").configure_optimizers()
    assert settings["lr_scheduler"]["interval"] == "step" and "monitor" not in settings["lr_scheduler"]


def test_the_scheduler_steps_as_told() -> None:
    """Stepped per epoch instead of per step, a cosine would hardly lower the rate."""
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)
    module = tiny_module(lr_scheduler=cosine, lr_interval="step")
    trainer = Trainer(max_steps=6, limit_val_batches=0, **QUIET)
    trainer.fit(module, TinyData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    """Weight decay would otherwise still move frozen weights in some optimizers."""
    module = tiny_module()
    module.embedder.get_submodule("net.1").requires_grad_(False)
    chosen = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert chosen == {id(p) for p in module.parameters() if p.requires_grad}


def test_parameters_made_in_configure_model_are_trained() -> None:
    """Sharded strategies create layers late; forgotten by the optimizer, they would stay random."""

    class Late(MetricLearningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(6, 6)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.extra(self.embedder(images)), dim=1)

    module = Late(TinyEmbedder(), ContrastiveLoss())
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, TinyData())
    chosen = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.extra.parameters()} <= chosen


def test_evaluation_logs_and_the_numbers_are_those_of_the_metric() -> None:
    """Per-batch averages of recall are a common mistake; the log must hold the whole set's value."""
    module, data = tiny_module(ks=(1, 3)), TinyData()
    trainer = Trainer(**QUIET)
    values = trainer.validate(module, data, verbose=False)[0]
    metrics = RetrievalMetrics(ks=(1, 3))
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            metrics.update(module(batch["image"]), batch["label"], batch["index"])
    expected = metrics.compute()
    assert values == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=1e-6)
    assert {"val/recall@1", "val/recall@3", "val/map@r", "val/r_precision"} <= set(values)
    tested = trainer.test(module, data, verbose=False)[0]
    assert tested["test/recall@1"] == values["val/recall@1"]


def test_predict_returns_every_image_once() -> None:
    """Who exports embeddings joins them by index; a lost or repeated row breaks that."""
    predictions: Any = Trainer(**QUIET).predict(tiny_module(), TinyData())
    indices = torch.cat([batch["indices"] for batch in predictions])
    assert indices.tolist() == list(range(60))
    assert torch.cat([batch["embeddings"] for batch in predictions]).shape == (60, 6)


def test_a_checkpoint_loads_with_the_parts_given_again(tmp_path: Path) -> None:
    """Objects are not pickled into checkpoints, so loading must take them again and restore the rest."""
    module = tiny_module(batch_weight=0.25)
    trainer = Trainer(max_steps=2, limit_val_batches=0, **QUIET)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = MetricLearningModule.load_from_checkpoint(
        tmp_path / "a.ckpt", embedder=TinyEmbedder(seed=5), loss=ContrastiveLoss()
    )
    assert loaded.batch_weight == 0.25
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_evaluators_are_in_no_checkpoint(tmp_path: Path) -> None:
    """Checkpoints are shared: one from before the choice of an evaluator loads, and with another evaluator too."""
    module = tiny_module(metrics=RetrievalMetrics(ks=(5,)))
    trainer = Trainer(max_steps=2, num_sanity_val_steps=1, **QUIET)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"embedder.net.{n}.{part}" for n in (1, 3) for part in ("weight", "bias")}
    assert "metrics" not in saved["hyper_parameters"]
    saved["hyper_parameters"]["ks"] = (1, 2, 4, 8)  # as it was saved when that was the default
    torch.save(saved, tmp_path / "before.ckpt")
    parts: dict[str, Any] = {"embedder": TinyEmbedder(seed=5), "loss": ContrastiveLoss()}
    loaded = MetricLearningModule.load_from_checkpoint(tmp_path / "before.ckpt", **parts)
    assert loaded.val_metrics[0].options.ks == (1, 2, 4, 8)
    other = MetricLearningModule.load_from_checkpoint(
        tmp_path / "before.ckpt", **parts, ks=None, metrics=RetrievalMetrics(ks=(3,))
    )
    assert other.val_metrics[0].options.ks == other.test_metrics[1].options.ks == (3,)


def test_the_default_ks_are_those_of_the_field() -> None:
    """Recall@1, 2, 4 and 8 is what papers print."""
    assert tiny_module().val_metrics[0].options.ks == (1, 2, 4, 8)
    assert tiny_module(ks=[2]).val_metrics[0].options.ks == (2,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_weight": -1.0}, "batch_weight.*-1"),
        ({"batch_weight": 0.0, "memory_weight": 0.0}, "both 0"),
        ({"loss_lr": 0.0}, "loss_lr.*0"),
        ({"lr_interval": "batch"}, "lr_interval.*'batch'"),
        ({"ks": (0,)}, "ks.*0"),
        ({"ks": [1], "metrics": RetrievalMetrics()}, r"ks=\(1,\) and metrics=.*leave ks out"),
        ({"ks": 5}, "ks must be one or more integers .*got 5"),
        ({"ks": "15"}, "ks must be one or more integers .*got '15'"),
        ({"ks": 5, "metrics": RetrievalMetrics()}, "ks must be one or more integers .*got 5"),
        ({"metrics": {"ks": [1]}}, r"metrics must be a RetrievalMetrics, got a dict: give metrics=RetrievalMetrics\("),
        ({"metrics": ["recall@1"]}, "metrics must be a RetrievalMetrics, got a list"),
        ({"metrics": RetrievalMetrics}, "metrics must be a RetrievalMetrics, got the class RetrievalMetrics"),
    ],
)
def test_wrong_input_is_named(options: dict[str, Any], words: str) -> None:
    """Weights that train nothing and unknown intervals are refused when the module is made."""
    with pytest.raises(InputError, match=words):
        tiny_module(**options)


def test_parameters_of_losses_have_their_own_rate_and_are_trained(tmp_path: Path) -> None:
    """A learned boundary needs another rate than a backbone, and must be in the checkpoint."""
    module = tiny_module(loss=MarginLoss(learn_beta=True), memory_loss=pml.ProxyAnchorLoss(12, 6), loss_lr=0.5)
    module.memory_weight = 0.0
    trainer = Trainer(max_steps=3, limit_val_batches=0, **QUIET)
    trainer.fit(module, TinyData())
    groups = trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.05, 0.5]
    assert len(groups[1]["params"]) == 2
    assert module.state_dict()["loss.weighting.beta"] != 1.2
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    weights = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(weights["loss.weighting.beta"], module.state_dict()["loss.weighting.beta"])
    assert "memory_loss.proxies" in weights


def test_proxies_of_another_library_are_trained() -> None:
    """Proxy losses are what many come with; they need no memory."""
    loss = pml.ProxyAnchorLoss(12, 6)
    before = loss.proxies.detach().clone()
    Trainer(max_steps=2, limit_val_batches=0, **QUIET).fit(tiny_module(loss=loss, loss_lr=0.1), TinyData())
    assert not torch.equal(loss.proxies, before)


def test_refused_rows_stay_out_of_other_losses() -> None:
    """They know nothing of empty slots: a row of zeros would be a negative of everything."""
    batch, bank = batch_and_bank()
    module = tiny_module(loss=pml.ContrastiveLoss(), batch_weight=0.0)
    module.memory_bank = bank
    expected = module.training_step(batch, 0)["loss"]
    bigger = MemoryBank(21, 6)
    bigger.enqueue(bank.embeddings, bank.labels, bank.indices)
    bigger.enqueue(torch.full((1, 6), torch.nan), torch.tensor([0]), torch.tensor([99]))
    module.memory_bank = bigger
    torch.testing.assert_close(module.training_step(batch, 0)["loss"], expected)


@pytest.mark.parametrize("loss", [pml.ContrastiveLoss(), pml.NCALoss(), pml.NTXentLoss()])
def test_own_copies_in_the_bank_stay_out_of_other_losses(loss: nn.Module) -> None:
    """Online keys stand in the bank when the loss is computed: a perfect positive for each anchor, if nobody looks."""
    batch, bank = batch_and_bank()
    module = tiny_module(loss=loss, batch_weight=0.0)
    others = torch.tensor([index not in batch["index"].tolist() for index in bank.indices.tolist()])
    without = MemoryBank(20, 6)
    without.enqueue(bank.embeddings, bank.labels, bank.indices, mask=others)
    module.memory_bank = without
    expected = module.training_step(batch, 0)["loss"]
    copies = MemoryBank(60, 6)
    copies.enqueue(bank.embeddings, bank.labels, bank.indices, mask=others)
    copies.enqueue(module(batch["image"]).detach(), batch["label"], batch["index"])
    module.memory_bank = copies
    torch.testing.assert_close(module.training_step(batch, 0)["loss"], expected)
    alone = MemoryBank(60, 6)
    alone.enqueue(module(batch["image"]).detach(), batch["label"], batch["index"])
    module.memory_bank = alone
    assert float(module.training_step(batch, 0)["loss"].detach()) == 0


def test_a_plateau_that_waits_for_recall_to_fall_is_refused() -> None:
    """The mode of torch is min: each gain in recall would count as none and lower the rate."""
    with pytest.raises(InputError, match=r"mode is 'min'.*'max'"):
        tiny_module(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau).configure_optimizers()
    rising = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max")
    assert tiny_module(lr_scheduler=rising).configure_optimizers()["lr_scheduler"]["monitor"] == "val/recall@1"


def test_a_loss_that_waits_for_the_bank_has_a_gradient_all_the_same() -> None:
    """DDP stops at a parameter without one, and the bank is empty at the first step."""
    module = tiny_module(memory_loss=MarginLoss(learn_beta=True))
    torch.autograd.backward(module.training_step(batch_and_bank()[0], 0)["loss"])
    assert all(parameter.grad is not None for parameter in module.parameters())
