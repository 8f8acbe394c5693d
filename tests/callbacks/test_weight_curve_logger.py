"""The logger of pair weights against weights by hand, and the training without it."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_metric_learning import losses as others
from torch import Tensor, nn

from lightning_dml import MemoryBank
from lightning_dml.callbacks import MemoryBankCallback, WeightCurveLogger
from lightning_dml.cli import main
from lightning_dml.losses import (
    ContrastiveLoss,
    MultiSimilarityLoss,
    PairWeightingLoss,
    SupConLoss,
    TripletLoss,
    pair_weights,
)
from lightning_dml.losses.mining import SemiHardMiner
from tests.callbacks.logger_cases import Foreign, fit, part_of, silent
from tests.tiny import QUIET, TinyData, tiny_module


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
        self.batches: list[Tensor] = []

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """Weights by chance."""
        self.calls += 1
        self.batches.append(embeddings.detach())
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
        assert all("pairs/memory/positive_force" in figures for figures in logger.history)
        weights.append(module.state_dict())
        calls = len(loss.batches) if isinstance(loss, Drawing) else 0
        ends.append((torch.rand(3).tolist(), np.random.random(), random.random(), calls))
    assert ends[0] == ends[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_only_so_many_references_are_looked_at() -> None:
    """A bank of a million rows times a batch would not fit into memory."""
    few, many = silent(8, references=5), silent(8)
    for logger in (few, many):
        fit(logger, bank={})
    ours, whole = (part_of(logger.history[-1], "memory") for logger in (few, many))
    # All positives and many negatives pull and push with one weight each in this loss.
    assert 0 < ours["negative_force"] < whole["negative_force"] / 2


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
        assert all(torch.equal(its_module.state_dict()[name], value) for name, value in module.state_dict().items())
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
    assert Image.open(run / "weight_curves/step_000004_memory.png").size == (1650, 1020)
    assert (run / "weight_curves/over_time.svg").exists()
