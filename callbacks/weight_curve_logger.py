"""`WeightCurveLogger`: the pairs' similarities, and the forces on them, over a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from lightning_dml import distributed
from lightning_dml.checks import check_count
from lightning_dml.errors import InputError
from lightning_dml.losses import ObservedWeights
from lightning_dml.memory import MemoryBank
from lightning_dml.modules.training_batches import batch_of, warn_of_missed_steps
from lightning_dml.report import save_training, training_figure
from lightning_dml.report.figure_logging import log_figure
from lightning_dml.report.pair_figure import pair_figure
from lightning_dml.report.pair_observation import (
    FIGURES,
    drawn_from,
    factor_of,
    gather_batch,
    loss_of,
    observed_figures,
)
from lightning_dml.seeds import mixed_seed

_PARTS = ("batch", "memory")
_FOLDER = "weight_curves"
_LOGGED = frozenset(name for name in FIGURES if "_q" not in name) | {
    "positive_similarity_q05",
    "negative_similarity_q95",
}
_SKIPPED, _UNFIT = -1, -2  # in place of a number of rows


class WeightCurveLogger(Callback):
    r"""Logs the similarities of the pairs in training and the weights that the loss gives them.

    Every `every_n_steps` optimizer steps it asks the module's loss for the weights of all pairs of the batch that was
    just trained (see `observed_weights`), in up to two parts P: `batch`, the pairs within the batches of all ranks,
    and `memory`, those with the entries of the bank, once the module has a filled one. Pairs of a sample with itself
    are left out. With `pl_module.log`, equal on all ranks:

    - `pairs/P/positive_force`, `pairs/P/negative_force`: the sum over all pairs of their weight, :math:`-dL/dS` of
      positives and :math:`dL/dS` of negatives. It is the force of the training: the loss's reduction is in it, and the
      module's factors, as far as it has them: its `batch_weight`, or its `memory_weight` times the bank's `weight`.
    - `pairs/P/positive_similarity`, `pairs/P/negative_similarity`: the mean over all pairs; and the hard ends,
      `positive_similarity_q05` and `negative_similarity_q95`, the quantiles at 5 % and 95 %.

    `history` has the quantiles at 5, 50 and 95 % of both. A side without pairs has a force of 0 and no similarity.

    Of a bank with more than `references` entries, an even draw of that many is looked at, by seed and step. All figures
    of that part are then those of the drawn entries: a force summed over pairs is that of as many references, not
    scaled up, and a loss whose weights depend on an anchor's other pairs, such as multi-similarity or a softmax, is
    asked as if there were no others. Embeddings are those of the forward pass; the bank, parameters of the loss and the
    stream of a miner that draws are as the step has left them, so that a draw is a new one. Rank zero computes, in
    float64, with N x M numbers a few times over. Another library's loss takes some 25 M (D + M) bytes on top, nearly
    2 GB at 8192 references, and is asked as `MetricLearningModule` calls it, on the batches of all ranks together.

    Every `figure_every_n_steps` the weights are drawn over the similarities (`curve_figure`), without the module's
    factors and beside the loss's curve where a pair's weight follows from its own similarity and the reduction is over
    anchors; at the end of the training, all measurements over the steps (`training_figure`). Figures go to every logger
    that takes them: those of TensorBoard, Weights & Biases, MLflow, Comet and Neptune, and all with `log_image` or
    `experiment.add_figure`. As PNG and SVG, with their numbers as CSV, they go to the folder `weight_curves` in the
    trainer's log folder.

    Works with `MetricLearningModule` and with any LightningModule whose `training_step` returns a dict with `loss`,
    and detached `embeddings` (N, D) with unit rows, `labels` (N,) and `indices` (N,). The training is the same bit for
    bit with and without it, and never ends for it: what it cannot measure, draw or write, it says once. Names begin
    with `{loss}/`, `{memory_loss}/` and `{attribute}/` where these are others than the defaults.

    Args:
        every_n_steps: optimizer steps between measurements.
        figure_every_n_steps: optimizer steps between figures of weights over similarities, a multiple of
            `every_n_steps`; None is 10 times that.
        loss: name of the module's attribute that holds the loss.
        memory_loss: name of the attribute that holds the loss against the bank; without one, or where it is None, it
            is `loss`.
        attribute: name of the attribute that holds the bank.
        references: most entries of the bank to look at.
        points: most pairs of each side to show in a figure, drawn evenly.
        seed: of the draws.
        figures: whether to draw figures.
        files: whether to write them, and their numbers, to files.

    Attributes:
        history: a dict of `step` and all figures for each measurement.

    Raises:
        InputError: for a setting out of range; when training starts, for a module without a loss where `loss` says,
            or another thing than a loss where `memory_loss` says.

    Examples:
        >>> logger = WeightCurveLogger(every_n_steps=50, figures=False)
        >>> logger.history
        []
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        figure_every_n_steps: int | None = None,
        loss: str = "loss",
        memory_loss: str = "memory_loss",
        attribute: str = "memory_bank",
        references: int = 8192,
        points: int = 2000,
        seed: int = 0,
        figures: bool = True,
        files: bool = True,
    ) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps, hint="to measure nothing, leave the callback out")
        if figure_every_n_steps is None:
            figure_every_n_steps = 10 * every_n_steps
        if figure_every_n_steps < 1 or figure_every_n_steps % every_n_steps:
            raise InputError(
                f"figure_every_n_steps must be a multiple of every_n_steps={every_n_steps}, as figures are of "
                f"measurements, got {figure_every_n_steps}; figures=False draws none"
            )
        check_count("references", references)
        check_count("points", points)
        check_count("seed", seed, least=0)
        for name, value in (("loss", loss), ("memory_loss", memory_loss), ("attribute", attribute)):
            if not value.isidentifier():
                raise InputError(f"{name} must be the name of an attribute of the LightningModule, got {value!r}")
        self.every_n_steps = every_n_steps
        self.figure_every_n_steps = figure_every_n_steps
        self.loss = loss
        self.memory_loss = memory_loss
        self.attribute = attribute
        self.references = references
        self.points = points
        self.seed = seed
        self.figures = figures
        self.files = files
        self.history: list[dict[str, float]] = []
        self._stopped: set[str] = set()
        self._warnings: set[str] = set()
        self._folder = Path()
        self._last_step = 0
        self._fitting = False
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of loggers of several losses and banks apart in a checkpoint."""
        return self._generate_state_key(loss=self.loss, memory_loss=self.memory_loss, attribute=self.attribute)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes whether this is a fit, the only stage in which a checkpoint's state is of use."""
        self._fitting, self._restored = stage == "fit", None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there are losses to ask."""
        self._loss(pl_module, "batch")
        self._loss(pl_module, "memory")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over a checkpoint's history, and finds the folder for the figures."""
        state, self._restored = self._restored, None
        if state is not None:
            self.history = [dict(figures) for figures in state["history"]]
        elif trainer.global_step == 0:  # a second fit of the same trainer goes on
            self.history = []
        self._stopped, self._warnings, self._last_step = set(), set(), trainer.global_step
        # Asking the trainer for its folder is a collective, so every rank asks.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir, _FOLDER, self._prefix)
        warn_of_missed_steps(trainer, "WeightCurveLogger", self.every_n_steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, logs and draws where it is time."""
        step, previous = trainer.global_step, self._last_step
        self._last_step = step
        if step // self.every_n_steps == previous // self.every_n_steps or self._stopped.issuperset(_PARTS):
            return
        draws = self.figures and step // self.figure_every_n_steps != previous // self.figure_every_n_steps
        # Another library's loss may draw from the global generators.
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"), torch.no_grad():
            figures = self._measure(trainer, pl_module, outputs, step, draws)
        for name, value in figures.items():
            if name.rpartition("/")[2] in _LOGGED:
                pl_module.log(name, value, on_step=True, on_epoch=False)
        if figures:
            self.history.append({"step": step, **figures})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the whole training."""
        if self.figures and self.history and trainer.is_global_zero:
            self._attempt("draw the training over time", lambda: self._draw_history(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The history, the same on every rank; needs no collective."""
        return {"history": [dict(figures) for figures in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the training starts."""
        self._restored = state_dict if self._fitting else None

    @property
    def _prefix(self) -> str:
        names = ((self.loss, "loss"), (self.memory_loss, "memory_loss"), (self.attribute, "memory_bank"))
        return "".join(f"{name}/" for name, default in names if name != default)

    def _loss(self, pl_module: LightningModule, part: str) -> nn.Module:
        other = part == "memory" and getattr(pl_module, self.memory_loss, None) is not None
        return loss_of(pl_module, self.memory_loss if other else self.loss)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, step: int, draws: bool
    ) -> dict[str, float]:
        """The figures of both parts by their names, the same on every rank; collectives."""
        batch, problem = batch_of(outputs, pl_module.automatic_optimization)
        own = len(batch.labels) if batch is not None else _UNFIT if problem else _SKIPPED
        counts = distributed.row_counts(own, distributed.collective_device())
        if _UNFIT in counts:
            self._say("measure the pairs of a step", problem or f"rank {counts.index(_UNFIT)} returned other outputs")
        if batch is None or min(counts) < 0:
            return {}
        batch = gather_batch(batch, counts)
        figures: dict[str, float] = {}
        for part, factor in self._factors(pl_module).items():
            try:
                loss, references = self._loss(pl_module, part), None
                if part == "memory":
                    bank: MemoryBank = getattr(pl_module, self.attribute)
                    references = drawn_from(bank, self.references, self.seed, step, batch.labels.device)
                values, observed = observed_figures(loss, batch, references, counts, factor)
            except Exception as error:
                self._stopped.add(part)
                self._say(f"measure the pairs of the {part} under {self._name_of_loss(pl_module, part)}", error)
                continue
            values = {name: value for name, value in values.items() if not math.isnan(value)}
            figures |= {f"{self._prefix}pairs/{part}/{name}": value for name, value in values.items()}
            if draws and observed is not None:
                against = "each other" if references is None else f"{len(references.labels)} entries of the memory"
                caption = f"optimizer step {step}: {len(batch.labels)} anchors against {against}"
                draw = partial(self._draw_weights, trainer, part, step, loss, observed, caption)
                self._attempt(f"draw the pairs of the {part}", draw)
        return figures

    def _factors(self, pl_module: LightningModule) -> dict[str, float]:
        """The parts that take part in the training now, each with the factor of its loss."""
        factors = {"batch": factor_of(pl_module, "batch_weight")}
        bank = getattr(pl_module, self.attribute, None)
        if isinstance(bank, MemoryBank) and int(bank.store.labelled):
            factors["memory"] = factor_of(pl_module, "memory_weight") * bank.weight
        return {part: factor for part, factor in factors.items() if factor > 0 and part not in self._stopped}

    def _draw_weights(
        self, trainer: Trainer, part: str, step: int, loss: nn.Module, observed: ObservedWeights, caption: str
    ) -> None:
        drawn = pair_figure(loss, observed, points=self.points, seed=mixed_seed(self.seed, step), caption=caption)
        if self.files:
            self._attempt("write figures", lambda: drawn.save(self._folder / f"step_{step:06d}_{part}"))
        self._hand_over(trainer, f"{self._prefix}pairs/{part}/weights", drawn.figure, step)

    def _draw_history(self, trainer: Trainer) -> None:
        figure = training_figure(self.history, prefix=f"{self._prefix}pairs/")
        if self.files:
            self._attempt("write figures", lambda: save_training(figure, self.history, self._folder / "over_time"))
        self._hand_over(trainer, f"{self._prefix}pairs/over_time", figure, trainer.global_step)

    def _hand_over(self, trainer: Trainer, name: str, figure: Figure, step: int) -> None:
        for logger in trainer.loggers:
            hand = partial(log_figure, logger, name, figure, step)
            self._attempt(f"hand figures to {type(logger).__name__}", hand)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Runs an action on rank zero; its failure is told once and does not end the training."""
        try:
            action()
        except Exception as error:
            self._say(what, error)

    def _say(self, what: str, problem: object) -> None:
        if what not in self._warnings:
            self._warnings.add(what)
            rank_zero_warn(f"WeightCurveLogger could not {what}, and the training goes on without: {problem}")

    def _name_of_loss(self, pl_module: LightningModule, part: str) -> str:
        other = getattr(pl_module, self.memory_loss, None) if part == "memory" else None
        return type(getattr(pl_module, self.loss, None) if other is None else other).__name__
