"""The logger of pair weights against weights by hand, the training without it, ranks, and loggers of every kind."""

from __future__ import annotations

import csv
import importlib
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_metric_learning import losses as others
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback, WeightCurveLogger, weight_curve_logger
from lightning_dml.cli import main
from lightning_dml.errors import InputError
from lightning_dml.losses import (
    ContrastiveLoss,
    GeneralPairWeightingLoss,
    MultiSimilarityLoss,
    ObservedWeights,
    PairWeightingLoss,
    SupConLoss,
    TripletLoss,
    pair_weights,
)
from lightning_dml.losses.calling import Rows
from lightning_dml.losses.inspection.observed import ObservedSide, thinned
from lightning_dml.losses.mining import SemiHardMiner, TopKMiner
from lightning_dml.report.pair_observation import drawn_from, exact_curve, figures_of, observe
from tests.helpers import run_ranks
from tests.scripts.fit_uneven import UnevenBatches
from tests.tiny import QUIET, TinyData, TinyEmbedder, tiny_module


class Witness(Callback):
    """Notes, after the logger, what each step was about and what was logged."""

    def __init__(self) -> None:
        self.outputs: dict[int, Any] = {}
        self.banks: dict[int, dict[str, Any]] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copies, as the next step changes it."""
        step, bank = trainer.global_step, getattr(pl_module, "memory_bank", None)
        self.outputs[step] = outputs
        self.banks[step] = {} if bank is None else bank.state_dict()
        self.logged[step] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("pairs/")
        }


def fit(
    logger: WeightCurveLogger,
    /,
    module: LightningModule | None = None,
    steps: int = 8,
    bank: dict[str, Any] | None = None,
    data: Any = None,
    **settings: Any,
) -> Witness:
    """A short training with the logger, and with a bank where its settings are given."""
    witness = Witness()
    memory = [] if bank is None else [MemoryBankCallback(**{"size": 20, "momentum": None, **bank})]
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[*memory, logger, witness],
        **{**QUIET, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module or tiny_module(), data or TinyData())
    return witness


def silent(every_n_steps: int = 2, **options: Any) -> WeightCurveLogger:
    """A logger that draws nothing, which takes longer than a test should."""
    return WeightCurveLogger(every_n_steps, **{"figures": False, **options})


def by_hand(loss: nn.Module, batch: Any, bank: dict[str, Any] | None, factor: float) -> dict[str, float]:
    """Forces and similarities, one pair at a time, over the weights that `pair_weights` gives."""
    embeddings, labels, indices = batch["embeddings"].double(), batch["labels"], batch["indices"]
    ours = isinstance(loss, PairWeightingLoss)
    if bank is None:
        references, ref_labels, ref_indices = embeddings, labels, indices
        weights = pair_weights(loss, embeddings, labels, **({"indices": indices} if ours else {}))
    else:
        kept = torch.tensor([ours or index not in indices.tolist() for index in bank["indices"].tolist()])
        references, ref_labels = bank["embeddings"][kept].double(), bank["labels"][kept]
        ref_indices = bank["indices"][kept]
        numbers = {"indices": indices, "ref_indices": ref_indices} if ours else {}
        weights = pair_weights(loss, embeddings, labels, references, ref_labels, **numbers)
    forces = {True: 0.0, False: 0.0}
    similarities: dict[bool, list[float]] = {True: [], False: []}
    for row, label in enumerate(labels.tolist()):
        for column, other in enumerate(ref_labels.tolist()):
            if int(indices[row]) == int(ref_indices[column]):
                continue
            forces[label == other] += float(weights[row, column]) * (-1 if label == other else 1)
            similarities[label == other].append(float(embeddings[row] @ references[column]))
    figures = {}
    for positive, name in ((True, "positive"), (False, "negative")):
        figures[f"{name}_force"] = factor * forces[positive]
        if similarities[positive]:
            figures[f"{name}_similarity"] = float(np.mean(similarities[positive]))
            for percent in (5, 50, 95):
                level = float(np.percentile(similarities[positive], percent))
                figures[f"{name}_similarity_q{percent:02d}"] = level
    return figures


def part_of(figures: dict[str, float], part: str) -> dict[str, float]:
    """The figures of one part by their own names."""
    start = f"pairs/{part}/"
    return {name.removeprefix(start): value for name, value in figures.items() if name.startswith(start)}


@pytest.mark.parametrize(
    "loss",
    [ContrastiveLoss(0.3), MultiSimilarityLoss(), ContrastiveLoss(0.3, reduction="pairs")],
    ids=["contrastive", "multi-similarity", "mean over pairs"],
)
def test_figures_are_those_of_the_pairs_by_hand(loss: nn.Module) -> None:
    """A force that leaves out the reduction or a factor, or that counts a sample's own copy, would mislead."""
    logger, module = silent(), tiny_module(loss=loss, batch_weight=0.5, memory_weight=2.0)
    witness = fit(logger, module, bank={"weight": 0.7, "start_step": 3})
    assert [figures["step"] for figures in logger.history] == [2, 4, 6, 8]
    for figures in logger.history:
        step = int(figures["step"])
        expected = by_hand(loss, witness.outputs[step], None, 0.5)
        assert part_of(figures, "batch") == pytest.approx(expected, rel=1e-5)
        assert expected["positive_force"] > 0 and expected["negative_force"] > 0
        if step < 4:  # the bank has not started
            assert not part_of(figures, "memory")
            continue
        expected = by_hand(loss, witness.outputs[step], witness.banks[step], 2.0 * 0.7)
        assert part_of(figures, "memory") == pytest.approx(expected, rel=1e-5)
        assert expected["positive_force"] > 0 and expected["negative_force"] > 0


def test_what_is_logged_is_what_history_has() -> None:
    """Curves in a dashboard and figures in a script must not tell different stories."""
    logger = silent()
    witness = fit(logger, bank={})
    names = [
        f"pairs/{part}/{name}"
        for part in ("batch", "memory")
        for name in (
            *("positive_force", "negative_force", "positive_similarity", "negative_similarity"),
            *("positive_similarity_q05", "negative_similarity_q95"),
        )
    ]
    assert all(set(witness.logged[int(figures["step"])]) == set(names) for figures in logger.history)
    for figures in logger.history:
        assert witness.logged[int(figures["step"])] == pytest.approx({name: figures[name] for name in names})
        assert "pairs/batch/positive_similarity_q50" in figures


def test_the_loss_against_the_bank_is_the_module_s() -> None:
    """Whoever trains with two losses would otherwise see the weights of the wrong one."""
    logger, against = silent(4), SupConLoss()
    witness = fit(logger, tiny_module(memory_loss=against), bank={})
    figures = logger.history[-1]
    expected = by_hand(against, witness.outputs[8], witness.banks[8], 1.0)
    assert part_of(figures, "memory") == pytest.approx(expected, rel=1e-5)
    assert part_of(figures, "batch") == pytest.approx(by_hand(ContrastiveLoss(0.3), witness.outputs[8], None, 1.0))


@pytest.mark.parametrize(
    ("module", "bank", "parts"),
    [
        ({"batch_weight": 0.0}, {}, {"memory"}),
        ({"memory_weight": 0.0}, {}, {"batch"}),
        ({}, {"warmup_steps": 8, "start_step": 8}, {"batch"}),
    ],
)
def test_a_loss_that_does_not_count_is_not_measured(
    module: dict[str, Any], bank: dict[str, Any], parts: set[str]
) -> None:
    """A force that no weight is moved by is none of the training."""
    logger = silent(8)
    fit(logger, tiny_module(**module), bank=bank)
    assert {name.split("/")[1] for name in logger.history[-1] if "/" in name} == parts


def test_a_side_without_pairs_has_no_similarity() -> None:
    """A mean of nothing is no number, and a NaN in a log stops those who watch it."""
    logger = silent(2)
    fit(logger, data=TinyData(classes_per_batch=1, samples_per_class=4))
    figures = part_of(logger.history[0], "batch")
    assert figures["negative_force"] == 0 and figures["positive_force"] > 0
    assert not any(name.startswith("negative_similarity") for name in figures)


class Drawing(nn.Module):
    """Another library's loss, which draws from the global generators, counts its calls and fills a memory."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """Weights by chance."""
        self.calls += 1
        self.seen.append(embeddings.detach())
        references = embeddings if ref_emb is None else ref_emb
        factor = torch.rand(()) + np.random.random() + random.random() + self.calls
        return ((embeddings @ references.T).square() * factor).mean()


@pytest.mark.parametrize("kind", ["drawing", "mined"])
def test_the_training_is_the_same_with_and_without_it(kind: str, tmp_path: Path) -> None:
    """Whoever looks at the weights must get the very model that they would have got without."""
    weights: list[dict[str, Tensor]] = []
    ends = []
    for watched in (False, True):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        loss = Drawing() if kind == "drawing" else TripletLoss(miner=SemiHardMiner(measure="distance"))
        module, logger = tiny_module(loss=loss), WeightCurveLogger(2, figure_every_n_steps=6, figures=kind == "drawing")
        settings = {**QUIET, "default_root_dir": tmp_path}
        memory = MemoryBankCallback(size=20, momentum=None)
        callbacks: list[Callback] = [memory, logger] if watched else [memory]
        trainer = Trainer(max_steps=7, limit_val_batches=0, callbacks=callbacks, **settings)
        trainer.fit(module, TinyData(augment=True))
        assert len(logger.history) == 3 * watched
        assert all("pairs/memory/positive_force" in each for each in logger.history)
        weights.append(module.state_dict())
        calls = len(loss.seen) if isinstance(loss, Drawing) else 0
        ends.append((torch.rand(3).tolist(), np.random.random(), random.random(), calls))
    assert ends[0] == ends[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def a_bank(rows: int = 40, share: tuple[int, int] = (0, 1)) -> MemoryBank:
    """Rows whose index is their slot; every fifth is empty."""
    bank = MemoryBank(rows, 3, share=share)
    embeddings = nn.functional.normalize(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(rows) % 4
    labels[::5] = -1
    bank.enqueue(embeddings, labels, torch.arange(rows))
    return bank


def test_entries_of_a_large_bank_are_drawn_evenly() -> None:
    """The newest rows alone would show fresh negatives; an empty slot is nobody's negative."""
    bank, device = a_bank(), torch.device("cpu")
    every = drawn_from(bank, 100, 0, 7, device)
    assert every.indices.tolist() == [slot for slot in range(40) if slot % 5]
    times = torch.zeros(40)
    for step in range(400):
        drawn = drawn_from(bank, 8, 0, step, device)
        assert len(set(drawn.indices.tolist())) == 8
        assert torch.equal(drawn.embeddings, bank.embeddings[drawn.indices])
        assert torch.equal(drawn.labels, bank.labels[drawn.indices])
        times[drawn.indices] += 1
    assert bool((times[::5] == 0).all())
    rest = times[torch.arange(40) % 5 != 0]
    assert float(rest.min()) > 60 and float(rest.max()) < 140  # 100 each, with a deviation of about 9
    again = [
        drawn_from(bank, 8, seed, step, device).indices.tolist() for seed, step in ((1, 2), (1, 2), (2, 2), (1, 3))
    ]
    assert again[0] == again[1] and again[0] != again[2] and again[0] != again[3]


def test_the_points_of_a_figure_are_drawn_evenly() -> None:
    """Pairs stand in the order of their anchors: the first of them would show a few anchors and pass for all."""

    def side(pairs: int) -> ObservedSide:
        numbers = torch.arange(pairs, dtype=torch.float64)
        return ObservedSide(numbers, numbers + 0.5, 7.0 * pairs, pairs, torch.tensor([pairs]))

    observed = ObservedWeights(side(40), side(60), torch.tensor([-1.0, 1.0]), 10)
    for name, pairs in (("positives", 40), ("negatives", 60)):
        times, every = torch.zeros(pairs), getattr(observed, name)
        for seed in range(400):
            drawn = getattr(thinned(observed, pairs // 5, seed), name)
            assert len(set(drawn.similarity.tolist())) == len(drawn.similarity) == pairs // 5
            assert torch.equal(drawn.weight, drawn.similarity + 0.5)
            assert (drawn.force, drawn.pairs, drawn.counts.tolist()) == (every.force, pairs, [pairs])
            times[drawn.similarity.long()] += 1
        assert float(times.min()) > 48 and float(times.max()) < 112  # 80 each, with a deviation of 8
        few, again, other = (getattr(thinned(observed, 8, seed), name).similarity.tolist() for seed in (1, 1, 2))
        assert few == again and few != other
        assert torch.equal(getattr(thinned(observed, pairs, 0), name).similarity, every.similarity)


def test_only_so_many_references_are_looked_at() -> None:
    """A bank of a million rows times a batch would not fit into memory."""
    few, many = silent(8, references=5), silent(8)
    for logger in (few, many):
        fit(logger, bank={})
    ours, whole = (part_of(logger.history[-1], "memory") for logger in (few, many))
    # All positives and many negatives pull and push with one weight each in this loss.
    assert 0 < ours["negative_force"] < whole["negative_force"] / 2


def test_a_loss_that_keeps_to_its_rank_is_asked_rank_by_rank() -> None:
    """Its training knows no pairs across ranks, and DDP takes the mean of what the ranks have."""
    generator = torch.Generator().manual_seed(1)
    embeddings = nn.functional.normalize(torch.randn(8, 3, generator=generator), dim=1)
    batch = Rows(embeddings, torch.arange(8) % 2, torch.arange(8))
    loss = MultiSimilarityLoss(gather=False)
    found = observe(loss, batch, None, [3, 0, 5])
    assert found is not None
    expected = [observe(loss, Rows(*(column[rows] for column in batch)), None, [0]) for rows in (slice(3), slice(3, 8))]
    for name in ("positives", "negatives"):
        ours, parts = getattr(found, name), [getattr(each, name) for each in expected]
        assert ours.force == pytest.approx(sum(part.force for part in parts) / 3)
        assert ours.force == pytest.approx(float(ours.weight.sum()))
        assert torch.equal(ours.similarity, torch.cat([part.similarity for part in parts]))
        assert ours.pairs == int(ours.counts.sum()) == sum(part.pairs for part in parts)
    together = observe(MultiSimilarityLoss(), batch, None, [3, 0, 5])
    assert together is not None and together.negatives.pairs > found.negatives.pairs


def test_another_library_s_loss_works() -> None:
    """The method is for any loss; one that knows no indices would take a sample's own copy for a positive."""
    logger = silent(4)
    loss = others.ContrastiveLoss(pos_margin=1, neg_margin=0.3, distance=cosine())
    witness = fit(logger, tiny_module(loss=loss), bank={})
    for figures in logger.history:
        step = int(figures["step"])
        for part, bank in (("batch", None), ("memory", witness.banks[step])):
            expected = by_hand(loss, witness.outputs[step], bank, 1.0)
            assert part_of(figures, part) == pytest.approx(expected, rel=1e-5)
            assert expected["positive_force"] > 0


def cosine() -> Any:
    """The other library's similarity, so that its weights are constant."""
    from pytorch_metric_learning.distances import CosineSimilarity

    return CosineSimilarity()


class Foreign(LightningModule):
    """Somebody else's module: other names, no factors, and a bank of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyEmbedder()
        self.criterion = MultiSimilarityLoss()
        self.against = SupConLoss()
        self.queue: MemoryBank | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Leaves out every third batch."""
        if batch_idx % 3 == 2:
            return None
        embeddings, labels, indices = self.net(batch["image"]), batch["label"], batch["index"]
        loss = self.criterion(embeddings, labels, indices=indices)
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def configure_optimizers(self) -> Any:
        """Plain steps."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_any_module_s_names_will_do() -> None:
    """The method is for anybody's training, and two losses in one training must not share names."""
    module = Foreign()
    module.queue = MemoryBank(20, 6)
    module.queue.enqueue(
        nn.functional.normalize(torch.randn(20, 6), dim=1), torch.arange(20) % 12, torch.arange(100, 120)
    )
    logger = silent(2, loss="criterion", memory_loss="against", attribute="queue")
    witness = fit(logger, module)
    prefix = "criterion/against/queue/"
    assert all(name.startswith(prefix) for figures in logger.history for name in figures if name != "step")
    figures = {name.removeprefix(prefix): value for name, value in logger.history[0].items()}
    expected = by_hand(SupConLoss(), witness.outputs[2], module.queue.state_dict(), 1.0)
    assert part_of(figures, "memory") == pytest.approx(expected, rel=1e-5)
    expected = by_hand(MultiSimilarityLoss(), witness.outputs[2], None, 1.0)
    assert part_of(figures, "batch") == pytest.approx(expected, rel=1e-5)
    assert logger.state_key != WeightCurveLogger().state_key


def test_a_batch_that_was_left_out_is_passed_over() -> None:
    """There is nothing to see, and the next batch is measured as before."""
    logger = silent(1, loss="criterion")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="WeightCurveLogger")
        fit(logger, Foreign(), steps=6, data=TinyData(batches_per_epoch=6))
    assert [figures["step"] for figures in logger.history] == [1, 2, 4, 5]


def told(call: Callable[[], object]) -> list[str]:
    """The warnings of the logger during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "WeightCurveLogger" in str(each.message)]


def test_a_loss_without_weights_of_pairs_is_reported_once() -> None:
    """A loss of proxies has none; a training of hours must not die of what only looks at it."""
    proxies = others.ProxyAnchorLoss(num_classes=12, embedding_size=6)
    logger, module = silent(2), tiny_module(loss=proxies, memory_loss=ContrastiveLoss(0.3))
    messages = told(lambda: fit(logger, module, bank={}))
    assert len(messages) == 1
    assert "ProxyAnchorLoss" in messages[0] and "the pairs of the batch" in messages[0]
    assert [figures["step"] for figures in logger.history] == [2, 4, 6, 8]
    assert all(part_of(each, "memory") and not part_of(each, "batch") for each in logger.history)


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
    (message,) = told(lambda: fit(logger, module()))
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


def resumable(folder: Path, checkpoint: Path | None = None) -> tuple[LightningModule, WeightCurveLogger]:
    """Trains on from `checkpoint`, or from the start, with checkpoints amid epochs and between measurements."""
    module, logger = tiny_module(), WeightCurveLogger(3, figure_every_n_steps=300)
    memory = MemoryBankCallback(size=20, momentum=None)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings = {**QUIET, "enable_checkpointing": True, "default_root_dir": folder}
    trainer = Trainer(max_steps=14, limit_val_batches=0, callbacks=[memory, logger, saver], **settings)
    trainer.fit(module, TinyData(augment=True, batches_per_epoch=6), ckpt_path=checkpoint, weights_only=True)
    return module, logger


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """The figure over time must show the whole training, not what came after the last crash."""
    module, logger = resumable(tmp_path / "whole")
    assert [figures["step"] for figures in logger.history] == [3, 6, 9, 12]
    for step in (4, 10):
        its_module, its_logger = resumable(tmp_path / str(step), tmp_path / f"whole/step={step}.ckpt")
        assert its_logger.history == logger.history
        assert all(torch.equal(its_module.state_dict()[name], each) for name, each in module.state_dict().items())
        with (tmp_path / f"{step}/weight_curves/over_time.csv").open() as file:
            assert [float(row["step"]) for row in csv.DictReader(file)] == [3, 6, 9, 12]


def test_a_second_training_starts_anew() -> None:
    """The history of another model would be taken for this one's."""
    logger = silent(2)
    fit(logger)
    fit(logger, steps=4)
    assert [figures["step"] for figures in logger.history] == [2, 4]


def test_steps_are_those_of_the_optimizer() -> None:
    """With accumulated gradients a step takes several batches, and is measured once."""
    logger = silent(2)
    fit(logger, steps=4, accumulate_grad_batches=2)
    assert [figures["step"] for figures in logger.history] == [2, 4]


def test_a_logger_that_would_miss_figures_is_mentioned(tmp_path: Path) -> None:
    """Lightning drops what is logged between its own steps without a word."""
    with pytest.warns(UserWarning, match=r"every_n_steps=3.*log_every_n_steps=2"):
        fit(silent(3), logger=CSVLogger(tmp_path / "a"), log_every_n_steps=2)
    assert not told(lambda: fit(silent(2), logger=CSVLogger(tmp_path / "b"), log_every_n_steps=2))


def test_figures_come_as_files_and_into_tensorboard(tmp_path: Path) -> None:
    """What the issue asks for: somebody opens TensorBoard, or the folder, and sees the pairs of step 4."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    before = pyplot.get_fignums()
    logger = WeightCurveLogger(2, figure_every_n_steps=4, points=50)
    loggers: list[Logger] = [TensorBoardLogger(tmp_path, name="run"), CSVLogger(tmp_path, name="csv")]
    fit(logger, steps=6, bank={}, logger=loggers)
    written = tmp_path / "run/version_0/weight_curves"
    stems = ["over_time", "step_000004_batch", "step_000004_memory"]
    assert sorted(path.name for path in written.iterdir()) == sorted(
        f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "png", "svg")
    )
    with (written / "step_000004_memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    # A curve too, as contrastive weights follow from the similarity alone.
    assert {row["kind"] for row in rows} == {"curve", "pair", "density"}
    assert sum(row["kind"] == "pair" and row["side"] == "negative" for row in rows) == 50
    for row in rows:
        if row["kind"] == "pair":  # points lie on the curve: 1 for positives and for negatives above the margin
            above = row["side"] == "positive" or float(row["similarity"]) > 0.3
            assert float(row["weight"]) == pytest.approx(float(above))
    with (written / "over_time.csv").open() as file:
        table = list(csv.DictReader(file))
    forces = [float(row["pairs/memory/negative_force"]) for row in table]
    assert forces == [figures["pairs/memory/negative_force"] for figures in logger.history]

    events = reader.EventAccumulator(str(tmp_path / "run/version_0"), {"images": 0}).Reload()
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"pairs/batch/weights": [4], "pairs/memory/weights": [4], "pairs/over_time": [6]}
    assert pyplot.get_fignums() == before  # a thousand open figures would fill the memory of a long training
    picture = events.Images("pairs/memory/weights")[0]
    assert (picture.width, picture.height) == (1100, 560)
    assert "pairs/batch/positive_force" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("loss", "has_one"),
    [
        (ContrastiveLoss(0.3), True),
        (TripletLoss(), False),
        (MultiSimilarityLoss(), False),
        (ContrastiveLoss(0.3, miner=TopKMiner()), False),
        (ContrastiveLoss(0.3, reduction="pairs"), False),
        (nn.Identity(), False),
    ],
)
def test_no_curve_is_drawn_that_the_points_do_not_lie_on(loss: nn.Module, has_one: bool) -> None:
    """A curve at some other context, or of another scale, beside the points would look like a mistake of the loss."""
    curve = exact_curve(loss)
    assert (curve is not None) == has_one
    if curve is not None:
        assert torch.equal(curve.negative, (curve.similarity > 0.3).double())


@pytest.mark.parametrize("options", [{"figures": False}, {"files": False}])
def test_figures_and_files_can_be_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    """A sweep of thousands of trainings needs numbers, not pictures."""
    taker = Taker()
    fit(WeightCurveLogger(2, figure_every_n_steps=4, **options), logger=taker, default_root_dir=tmp_path)
    assert not list(tmp_path.rglob("weight_curves"))
    assert bool(taker.experiment.given) == ("files" in options)


class Plain(Logger):
    """The least that Lightning takes for a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, Any, int | str]] = []

    @property
    def name(self) -> str:
        """Its name."""
        return "plain"

    @property
    def version(self) -> int:
        """Its version."""
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Takes none."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Keeps none."""


class Writer:
    """What TensorBoard's writer does of interest here."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Any, int | str]] = []

    def add_figure(
        self, tag: str, figure: Any, global_step: int | None = None, close: bool = True, walltime: float | None = None
    ) -> None:
        """`torch.utils.tensorboard.SummaryWriter.add_figure`."""
        assert global_step is not None and not close
        self.given.append((tag, figure, global_step))


class Taker(Plain):
    """Any logger whose experiment takes figures."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Writer()


class WandbLogger(Plain):
    """`log_image` as Lightning's logger of Weights & Biases has it."""

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Takes a list of pictures."""
        assert isinstance(images, list) and not kwargs and step is not None
        self.given.append((key, images[0], step))


class MLFlowLogger(Plain):
    """Its experiment is an `MlflowClient`."""

    run_id = "run 7"

    @property
    def experiment(self) -> Any:
        """The client."""
        return self

    def log_figure(
        self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: dict[str, Any] | None = None
    ) -> None:
        """`MlflowClient.log_figure`."""
        assert run_id == self.run_id
        name, _, file = artifact_file.rpartition("/")
        self.given.append((name, figure, file))


class CometLogger(Plain):
    """Its experiment is a `comet_ml.Experiment`."""

    @property
    def experiment(self) -> Any:
        """The experiment."""
        return self

    def log_figure(
        self, figure_name: str | None = None, figure: Any = None, overwrite: bool = False, step: int | None = None
    ) -> None:
        """`comet_ml.Experiment.log_figure`."""
        assert figure_name is not None and step is not None
        self.given.append((figure_name, figure, step))


class NeptuneLogger(Plain):
    """Its experiment is a `neptune.Run`, which gives fields by their paths."""

    @property
    def experiment(self) -> Any:
        """The run."""
        return self

    def __getitem__(self, path: str) -> Any:
        """A field, whose `append` is that of `neptune.handler.Handler`."""

        class Field:
            def append(field, value: Any, *, step: float | None = None, wait: bool = False, **_: Any) -> None:
                assert step is not None
                self.given.append((path, value, int(step)))

        return Field()


class Renamed(MLFlowLogger):
    """Somebody's own on top of one of these."""


class Broken(Plain):
    """Its server is away."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Fails."""
        raise ConnectionError("the server is away")


def test_every_logger_that_takes_figures_gets_them() -> None:
    """Each library has its own call; a wrong keyword shows only when a training of hours reaches it."""
    loggers: list[Plain] = [Taker(), WandbLogger(), MLFlowLogger(), CometLogger(), NeptuneLogger(), Renamed(), Plain()]
    fit(WeightCurveLogger(2, figure_every_n_steps=2, files=False), steps=2, logger=loggers)
    for logger in loggers:
        given = logger.experiment.given if isinstance(logger, Taker) else logger.given
        if type(logger) is Plain:
            assert given == []
            continue
        assert [name for name, _, _ in given] == ["pairs/batch/weights", "pairs/over_time"]
        for _, figure, step in given:
            assert step == ("step_000002.png" if isinstance(logger, MLFlowLogger) else 2)
            if isinstance(logger, WandbLogger):
                assert figure.dtype == np.uint8 and figure.shape[2] == 3 and figure.shape[1] in (1100, 720)
                assert figure.std() > 10  # not a blank page
            else:
                assert isinstance(figure, Figure)


def test_a_logger_that_fails_is_reported_once_and_the_others_get_theirs() -> None:
    """An outage of a server must not end a training, nor take away what others would have got."""
    taker = Taker()
    logger = WeightCurveLogger(2, figure_every_n_steps=2, files=False)
    (message,) = told(lambda: fit(logger, steps=4, logger=[Broken(), taker]))
    assert "Broken" in message and "the server is away" in message
    assert [step for _, _, step in taker.experiment.given] == [2, 4, 4]


def test_a_full_disk_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is worth more than its pictures."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(weight_curve_logger, "save_curves", fail)
    monkeypatch.setattr(weight_curve_logger, "save_training", fail)
    taker = Taker()
    logger = WeightCurveLogger(2, figure_every_n_steps=4)
    (message,) = told(lambda: fit(logger, logger=taker, default_root_dir=tmp_path))
    assert "no space left" in message
    assert len(taker.experiment.given) == 3 and len(logger.history) == 4


CONFIG = """
model:
  class_path: lightning_dml.MetricLearningModule
  init_args:
    embedder: {class_path: tests.tiny.TinyEmbedder}
    loss: {class_path: lightning_dml.losses.MultiSimilarityLoss}
data: {class_path: tests.tiny.TinyData}
trainer:
  accelerator: cpu
  max_steps: 4
  limit_val_batches: 0
  log_every_n_steps: 2
  enable_checkpointing: false
  enable_progress_bar: false
  logger: {class_path: pytorch_lightning.loggers.CSVLogger, init_args: {save_dir: runs, name: tiny}}
  callbacks:
    - class_path: MemoryBankCallback
      init_args: {size: 40, momentum: null}
    - class_path: WeightCurveLogger
      init_args: {every_n_steps: 2, figure_every_n_steps: 4, references: 30, points: 100, seed: 3}
"""


def test_it_works_from_a_config(folder: Path) -> None:
    """A study turns it on with a few lines of YAML, by name."""
    Path("curves.yaml").write_text(CONFIG)
    main(["fit", "--config", "curves.yaml"])
    run = folder / "runs/tiny/version_0"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["pairs/memory/negative_force"]]) == 2
    assert Image.open(run / "weight_curves/step_000004_memory.png").size == (1650, 840)
    assert (run / "weight_curves/over_time.svg").exists()


def on_ranks(rank: int, ranks: int, root: str) -> list[list[dict[str, float]]]:
    """The figures of a training on batches of uneven size, with a whole bank and with one in shares."""
    histories = []
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    data = TinyData()
    data.setup("fit")
    assert data.train_set is not None
    losses = [MultiSimilarityLoss(), ContrastiveLoss(0.3, reduction="pairs"), others.NTXentLoss()]
    for loss, sharded, figures in zip(losses, (True, False, False), (True, False, False), strict=True):
        logger = WeightCurveLogger(3, figure_every_n_steps=6, references=17, figures=figures)
        loader = DataLoader(data.train_set, batch_sampler=UnevenBatches(7, 2, None if ranks == 1 else rank))
        slow = tiny_module(loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5))
        fit(
            logger,
            slow,
            7,
            {"size": 31, "sharded": sharded},
            loader,
            precision="64-true",
            default_root_dir=root,
            **options,
        )
        histories.append(logger.history)
    return histories


@pytest.mark.slow
def test_two_ranks_see_what_one_process_sees(tmp_path: Path) -> None:
    """A figure that differs between ranks stops trainings that watch it; one that differs from one GPU's misleads."""
    alone = on_ranks(0, 1, str(tmp_path / "one"))
    first, second = run_ranks(2, on_ranks, str(tmp_path / "two"))
    assert first == second
    for ours, right in zip(first, alone, strict=True):
        assert [figures["step"] for figures in ours] == [figures["step"] for figures in right] == [3, 6]
        for figures, expected in zip(ours, right, strict=True):
            assert figures == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert expected["pairs/memory/negative_force"] > 0
        assert right[0]["pairs/batch/negative_force"] + right[1]["pairs/batch/negative_force"] > 0
    for name in ("one", "two"):
        stems = sorted(path.stem for path in (tmp_path / name).glob("weight_curves/*.png"))
        assert stems == ["over_time", "step_000006_batch", "step_000006_memory"]
    assert not list((tmp_path / "two").rglob("*.part"))


def test_forces_carry_the_factor_and_no_minus_zero() -> None:
    """`-0.0` in a table reads like a mistake."""
    batch = Rows(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    figures = figures_of(observe(GeneralPairWeightingLoss(), batch, None, [2]), 3.0)
    assert str(figures["positive_force"]) == "0.0"
    assert figures["negative_similarity"] == 0
