"""The drift monitor against drift that is known in advance, and the training without it."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dml import MemoryBank, distributed
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.callbacks.drift_monitor import DriftMonitor
from lightning_dml.errors import InputError
from tests.helpers import run_ranks
from tests.memory.contents_oracle import pairs_by_loop
from tests.tiny import QUIET, TinyData, TinyEmbedder, bank_of, tiny_module

LR = 0.125


class Scale(nn.Module):
    """Six pixels times a factor: what it says after a change of the factor is known."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Rows of no unit length, on purpose simple."""
        return images.flatten(1)[:, :6] * self.factor


class Scripted(LightningModule):
    """Its factor grows by the learning rate at each step; its batches enter a bank before the loss."""

    def __init__(
        self, lr: float = LR, size: int = 20, sharded: bool = False, embedder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embedder = embedder or Scale()
        self.lr = lr
        self.size = size
        self.sharded = sharded
        self.memory_bank: MemoryBank | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Enqueues the rows of all ranks under the step that made them."""
        embeddings, labels, indices = self.embedder(batch["image"]), batch["label"], batch["index"]
        if self.size:
            if self.memory_bank is None:
                share = (distributed.rank(), distributed.world_size()) if self.sharded else (0, 1)
                self.memory_bank = MemoryBank(self.size, embeddings.shape[1], share=share)
            keys, its_labels, its_indices = map(distributed.gather_rows, (embeddings, labels, indices))
            self.memory_bank.enqueue(keys, its_labels, its_indices, step=self.global_step)
        first = next(self.embedder.parameters())
        loss = -first if first.ndim == 0 else embeddings.square().mean() + embeddings.sum()
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def configure_optimizers(self) -> Any:
        """Plain steps."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Witness(Callback):
    """Notes, after the monitor, the bank and the logged figures of each step."""

    def __init__(self) -> None:
        self.banks: dict[int, dict[str, Any]] = {}
        self.outputs: dict[int, Any] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copies, as the next step changes it."""
        step = trainer.global_step
        self.banks[step] = {} if pl_module.memory_bank is None else pl_module.memory_bank.state_dict()
        self.outputs[step] = outputs
        self.logged[step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(monitor: DriftMonitor, module: Any = None, data: Any = None, steps: int = 8, **settings: Any) -> Witness:
    """A short training with the monitor."""
    witness = Witness()
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[monitor, witness],
        **{**QUIET, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module or Scripted(), data or TinyData())
    return witness


def pixels(data: TinyData) -> Tensor:
    """The output (60, 6) of `Scale` for each training image with the factor 1."""
    assert data.train_set is not None
    return torch.stack([data.train_set[position]["image"].flatten()[:6] for position in range(60)])


def norms(rows: Tensor) -> Tensor:
    """Squared lengths."""
    return rows.double().square().sum(dim=1)


def test_probe_drift_is_the_squared_change_of_the_embeddings() -> None:
    """After n steps each row has grown by n LR of itself; a wrong lag or a sum for a mean would show."""
    data, monitor = TinyData(), DriftMonitor(every_n_steps=2, probes=1000, entries=0)
    fit(monitor, Scripted(size=0), data, steps=25)
    length = float(norms(pixels(data)).mean())
    assert [figures["step"] for figures in monitor.history] == list(range(2, 25, 2))
    for number, figures in enumerate(monitor.history, 1):
        lagged = {"drift/probe_lag10"} if number >= 10 else set()
        assert set(figures) == {"step", "drift/probe"} | lagged  # without a bank there is no more
        assert figures["drift/probe"] == pytest.approx((2 * LR) ** 2 * length, rel=1e-4)
        if lagged:
            assert figures["drift/probe_lag10"] == pytest.approx((20 * LR) ** 2 * length, rel=1e-4)


def test_probes_are_the_same_images_at_every_measurement() -> None:
    """Augmentation drawn anew would look like drift where the weights stand still."""
    monitor = DriftMonitor(every_n_steps=2, probes=5, entries=0)
    fit(monitor, Scripted(lr=0.0, size=0), TinyData(augment=True))
    assert [figures["drift/probe"] for figures in monitor.history] == [0.0] * 4
    drifts = []
    for seed in (0, 0, 1):
        monitor = DriftMonitor(every_n_steps=2, probes=5, entries=0, seed=seed)
        fit(monitor, Scripted(size=0), steps=2)
        drifts.append(monitor.history[0]["drift/probe"])
    assert drifts[0] == drifts[1] != drifts[2]


def test_probes_are_embedded_in_evaluation_mode() -> None:
    """Dropout and the company in batch norm change a row from what the embedder will say in use."""
    embedder, data = nn.Sequential(Scale(), nn.Dropout(0.5)), TinyData()
    monitor = DriftMonitor(every_n_steps=2, probes=60, entries=0)
    fit(monitor, Scripted(size=0, embedder=embedder), data)
    length = float(norms(pixels(data)).mean())
    drifts = [figures["drift/probe"] for figures in monitor.history]
    assert drifts == pytest.approx([(2 * LR) ** 2 * length] * 4, rel=1e-4)
    assert embedder.training and embedder[1].training


@pytest.mark.parametrize("steps", [2, 8])  # a bank not yet full, and one that wrapped
def test_bank_drift_is_that_of_its_entries_by_age(steps: int) -> None:
    """An entry made a steps ago lies a LR of its image away: by hand, for all and for each quarter by age."""
    data, monitor = TinyData(), DriftMonitor(every_n_steps=2, probes=0, entries=100)
    witness = fit(monitor, data=data, steps=steps)
    lengths = norms(pixels(data))
    for figures in monitor.history:
        bank = witness.banks[int(figures["step"])]
        ages = figures["step"] - bank["steps"]
        drifts = (ages * LR) ** 2 * lengths[bank["indices"]]
        assert figures["drift/bank"] == pytest.approx(float(drifts.mean()), rel=1e-4)
        assert figures["drift/floor"] == 0
        by_age = drifts[ages.argsort(stable=True)].tensor_split(4)
        for number, quarter in enumerate(by_age, 1):
            assert figures[f"drift/bank_age_q{number}"] == pytest.approx(float(quarter.mean()), rel=1e-4)
        assert figures["memory/age_mean"] == pytest.approx(float(ages.double().mean()))
        assert figures["memory/age_max"] == float(ages.max())
        assert figures["memory/fill"] == min(1.0, figures["step"] * 8 / 20)
        assert figures["memory/classes"] == len(set(bank["labels"].tolist()))
    assert monitor.history[-1]["drift/bank_age_q4"] > monitor.history[-1]["drift/bank_age_q1"]


def test_momentum_keys_are_measured_by_their_own_encoder() -> None:
    """A slow encoder lags far behind the embedder while its keys are fresh: that is no staleness; it is shown apart."""
    frozen, monitor = MemoryBankCallback(size=60, momentum=1.0), DriftMonitor(every_n_steps=4, probes=0)
    module = tiny_module()
    trainer = Trainer(max_steps=8, limit_val_batches=0, callbacks=[frozen, monitor], **QUIET)
    untrained = copy.deepcopy(module.embedder)
    trainer.fit(module, TinyData())
    figures = monitor.history[-1]
    assert figures["drift/bank"] < 1e-10
    data = TinyData()
    data.setup("fit")
    assert data.train_set is not None
    images = torch.stack([data.train_set[int(index)]["image"] for index in bank_of(module).indices])
    moved = (module.embedder(images) - untrained(images)).square().sum(dim=1).mean()
    assert figures["drift/online"] == pytest.approx(float(moved.detach()), rel=1e-4)


def test_augmentation_is_in_the_floor() -> None:
    """Without drift, what augmentation does to the figure is all of it, and the floor says how much."""
    monitor = DriftMonitor(every_n_steps=2, probes=0, entries=60)
    fit(monitor, Scripted(lr=0.0, size=60), TinyData(augment=True), steps=12)
    drift = float(np.mean([figures["drift/bank"] for figures in monitor.history[2:]]))
    floor = float(np.mean([figures["drift/floor"] for figures in monitor.history[2:]]))
    assert floor > 0.01
    assert drift == pytest.approx(floor, rel=0.3)


def test_company_in_batch_norm_is_in_the_floor() -> None:
    """The keys were made in training mode; in evaluation mode even a bank without drift would look stale."""
    embedder = nn.Sequential(Scale(), nn.BatchNorm1d(6))
    monitor = DriftMonitor(every_n_steps=4, probes=0, entries=60)
    fit(monitor, Scripted(lr=0.0, size=60, embedder=embedder))
    assert monitor.history[-1]["drift/floor"] > 0.01


def test_figures_of_the_batch_are_logged() -> None:
    """The log and `history` have the same figures, of the batch of that very step."""
    monitor = DriftMonitor(every_n_steps=3, probes=4, entries=8, hard_above=1.5)
    witness = fit(monitor)
    for figures in monitor.history:
        step = int(figures["step"])
        outputs, bank = witness.outputs[step], witness.banks[step]
        expected = pairs_by_loop(bank, outputs["embeddings"], outputs["labels"], outputs["indices"], 1.5)
        assert (figures["memory/hard_negatives"], figures["memory/positives"]) == pytest.approx(expected)
        assert {name: value for name, value in figures.items() if name != "step"} == pytest.approx(witness.logged[step])


class Noisy(Dataset[Any]):
    """Draws its augmentation from all global generators, as other people's data sets do."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.rand(1, 8, 8) + np.random.random() + random.random()
        return {"image": noise, "label": index % 3, "index": index}


def moving(embedder: nn.Module | None = None) -> Scripted:
    """A module with dropout and batch norm that trains."""
    return Scripted(0.1, embedder=embedder or nn.Sequential(TinyEmbedder(), nn.BatchNorm1d(6), nn.Dropout(0.3)))


def test_the_training_is_the_same_with_and_without_it() -> None:
    """Whoever measures must get the very model that they would have got without; every generator is drawn from."""
    weights: list[dict[str, Tensor]] = []
    draws = []
    for watched in (False, True):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        module = moving()
        monitor = DriftMonitor(every_n_steps=2, probes=10, entries=10)
        trainer = Trainer(max_steps=7, callbacks=[monitor] if watched else [], **QUIET)
        trainer.fit(module, DataLoader(Noisy(), 6, shuffle=True))
        assert len(monitor.history) == 3 * watched
        weights.append(module.state_dict())
        draws.append((torch.rand(3).tolist(), np.random.random(), random.random()))
    assert draws[0] == draws[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def resumable(folder: Path, checkpoint: Path | None = None) -> tuple[Scripted, DriftMonitor]:
    """Trains on from `checkpoint`, or from the start, with checkpoints amid epochs and between measurements."""
    module, monitor = moving(TinyEmbedder()), DriftMonitor(every_n_steps=3, probes=10, entries=0)
    module.size = 0
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = Trainer(max_steps=14, limit_val_batches=0, callbacks=[monitor, saver], **settings)
    trainer.fit(module, TinyData(augment=True, batches_per_epoch=6), ckpt_path=checkpoint, weights_only=True)
    return module, monitor


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Without the past embeddings, the first figure after a resume would be of fewer steps than the others."""
    module, monitor = resumable(tmp_path / "whole")
    assert [figures["step"] for figures in monitor.history] == [3, 6, 9, 12]
    for step in (4, 6, 10):
        its_module, its_monitor = resumable(tmp_path / str(step), tmp_path / f"whole/step={step}.ckpt")
        assert its_monitor.history == monitor.history
        for name, tensor in module.state_dict().items():
            assert torch.equal(its_module.state_dict()[name], tensor), (step, name)


def test_other_probes_than_the_checkpoints_start_anew(tmp_path: Path) -> None:
    """Compared with the embeddings of other images, everything would have drifted."""
    resumable(tmp_path)
    monitor, data = DriftMonitor(every_n_steps=3, probes=11, entries=0), TinyData(batches_per_epoch=6)
    module = moving(TinyEmbedder())
    module.size = 0
    trainer = Trainer(max_steps=6, limit_val_batches=0, callbacks=[monitor], **QUIET)
    trainer.fit(module, data, ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    before = TinyEmbedder()
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    before.load_state_dict({name.removeprefix("embedder."): tensor for name, tensor in saved.items()})
    assert data.train_set is not None
    positions = monitor.state_dict()["positions"].tolist()
    images = torch.stack([data.train_set[position]["image"] for position in positions])
    with torch.no_grad():
        expected = float(norms(module.embedder(images) - before(images)).mean())
    assert [figures["step"] for figures in monitor.history] == [3, 6]
    assert monitor.history[-1]["drift/probe"] == pytest.approx(expected, rel=1e-4)


def test_a_second_training_starts_anew() -> None:
    """The history of another model would be taken for this one's."""
    monitor = DriftMonitor(every_n_steps=2, probes=5)
    fit(monitor)
    fit(monitor, steps=4)
    assert [figures["step"] for figures in monitor.history] == [2, 4]


def test_a_stale_bank_is_reported_once() -> None:
    """The user learns of it with the figure and what to do, and is not told again at each measurement."""
    data, monitor = TinyData(), DriftMonitor(every_n_steps=2, probes=0, entries=100, stale_above=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(monitor, data=data)
    messages = [str(warning.message) for warning in caught if "memory bank is stale" in str(warning.message)]
    assert len(messages) == 1
    figures = next(measured for measured in monitor.history if measured["drift/bank"] > 0.05)
    assert f"at step {figures['step']}" in messages[0] and f"{figures['drift/bank']:.2f}" in messages[0]
    for way_out in ("momentum keys", "start_step", "learning rate", "smaller bank", "lower weight"):
        assert way_out in messages[0]


def test_augmentation_alone_is_not_called_stale() -> None:
    """A warning that strong augmentation sets off would be turned off, and missed when it counts."""
    monitor = DriftMonitor(every_n_steps=2, probes=0, entries=100, stale_above=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stale")
        fit(monitor, Scripted(lr=0.0, size=60), TinyData(augment=True))
    assert max(figures["drift/bank"] for figures in monitor.history) > 0.2


def test_steps_are_those_of_the_optimizer() -> None:
    """With accumulated gradients a step takes several batches, and is measured once."""
    monitor = DriftMonitor(every_n_steps=2, probes=4, entries=0)
    fit(monitor, Scripted(size=0), steps=4, accumulate_grad_batches=2)
    assert [figures["step"] for figures in monitor.history] == [2, 4]


def test_names_tell_banks_apart() -> None:
    """Two monitors of two banks in one training must not write over each other's figures."""
    module = Scripted()
    module.other_bank = None  # type: ignore[assignment]
    monitor = DriftMonitor(every_n_steps=2, probes=4, attribute="other_bank")
    fit(monitor, module)
    assert all(set(figures) == {"step", "other_bank/drift/probe"} for figures in monitor.history)
    assert monitor.state_key != DriftMonitor().state_key


def test_a_logger_that_would_miss_figures_is_mentioned(tmp_path: Path) -> None:
    """Lightning drops what is logged between its own steps without a word."""
    with pytest.warns(UserWarning, match=r"every_n_steps=3.*log_every_n_steps=2"):
        fit(DriftMonitor(every_n_steps=3, probes=4), logger=CSVLogger(tmp_path / "a"), log_every_n_steps=2)
    logger = CSVLogger(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every_n_steps")
        fit(DriftMonitor(every_n_steps=2, probes=4), logger=logger, log_every_n_steps=2)
    written = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert "drift/probe" in written[0] and len(written) == 5


class LossOnly(Scripted):
    """The most common foreign module: its training_step returns the loss alone."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Leaves out what the monitor reads."""
        return super().training_step(batch, batch_idx)["loss"]


class Renumbered(TinyData):
    """Its `index` is a number of the user's own."""

    def train_dataloader(self) -> Any:
        """Counts backwards."""
        samples = [{"image": torch.rand(1, 8, 8), "label": 0, "index": 59 - index} for index in range(60)]
        dataset: Any = samples
        return DataLoader(dataset, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DriftMonitor(every_n_steps=0), "every_n_steps.*0"),
        (lambda: DriftMonitor(probes=-1), "probes.*-1"),
        (lambda: DriftMonitor(entries=-2), "entries.*-2"),
        (lambda: DriftMonitor(stale_above=0), "stale_above.*0"),
        (lambda: DriftMonitor(stale_above=float("nan")), "stale_above.*nan"),
        (lambda: DriftMonitor(seed=-1), "seed.*-1"),
        (lambda: fit(DriftMonitor(encoder="net")), "Scripted has no submodule 'net'"),
        (lambda: fit(DriftMonitor(1, probes=0), LossOnly()), "embeddings, indices, labels missing"),
        (lambda: fit(DriftMonitor(1, probes=0), data=Renumbered()), "position in the training set.*entries=0"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """A wrong setting or module stops with its name and value, not with a traceback from deep inside."""
    with pytest.raises(InputError, match=words):
        call()


def test_what_is_turned_off_is_not_needed() -> None:
    """Who only watches the bank's contents needs no encoder and no data set of samples."""
    monitor = DriftMonitor(every_n_steps=4, probes=0, entries=0, encoder="none")
    fit(monitor)
    assert all("memory/fill" in figures and "drift/bank" not in figures for figures in monitor.history)


def monitored(rank: int, ranks: int) -> list[list[dict[str, float]]]:
    """The figures of a training on these ranks, with a whole bank and with one that is spread over them."""
    histories = []
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    for sharded in (False, True):
        monitor = DriftMonitor(every_n_steps=2, probes=9, entries=10, hard_above=1.5)
        options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
        data = TinyData(classes_per_batch=6 // ranks, augment=True)
        fit(monitor, Scripted(size=21, sharded=sharded), data, steps=5, **options)
        histories.append(monitor.history)
    return histories


@pytest.mark.slow
def test_two_ranks_see_what_one_process_sees() -> None:
    """A figure that differs between ranks stops trainings that watch it; one that differs from one GPU's misleads."""
    alone = monitored(0, 1)
    first, second = run_ranks(2, monitored)
    assert first == second
    for ours, right in zip(first, alone, strict=True):
        assert len(ours) == len(right) == 2
        for figures, expected in zip(ours, right, strict=True):
            assert figures == pytest.approx(expected, rel=1e-5)
            assert expected["memory/hard_negatives"] > 0 and expected["memory/positives"] > 0
