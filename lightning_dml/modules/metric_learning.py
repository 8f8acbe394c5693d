"""`MetricLearningModule`: an embedder, a pair loss and a memory in a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dml.checks import check_choice, check_counts, check_number
from lightning_dml.errors import InputError
from lightning_dml.lightning_repairs import evaluate_on_every_rank, made_from_a_config
from lightning_dml.losses.calling import Rows, call_loss
from lightning_dml.memory import MemoryBank
from lightning_dml.modules.evaluation import SetMetrics, named_loaders
from lightning_dml.retrieval import RetrievalMetrics

DEFAULT_KS = (1, 2, 4, 8)
DEFAULT_LR = 1e-4
DEFAULT_WEIGHT_DECAY = 5e-4


class MetricLearningModule(LightningModule):
    """Trains an embedder with a pair loss on the batch and, given a memory bank, against the bank.

    The total is `batch_weight * loss(batch) + memory_weight * bank.weight * memory_loss(batch, bank)`, as in XBM's
    released code. The bank, and its weight, which may warm up, are what a `MemoryBankCallback` puts into `memory_bank`;
    without one, only the batch counts.

    Evaluation computes retrieval metrics over the whole set, logged as `val/recall@1` and so on, equal on all ranks.
    Where there are several sets, a list or a dict of dataloaders, each is evaluated by itself and logged as
    `val/NAME/recall@1`, NAME being its key or its position; the first also as `val/recall@1`. A rank may be without
    batches. Values are NaN, with a warning, where no query has a match; Lightning's ModelCheckpoint takes that for the
    worst value, its EarlyStopping stops.

    Batches are dicts: `image` (B, C, H, W), `label` (B,) and `index` (B,) int64; for evaluation also, optionally,
    `is_query` and `is_gallery` (B,) bool, and `group` (B,) int64, the camera or sequence.

    Args:
        embedder: images to (B, D) embeddings with unit rows, such as `Embedder`.
        loss: called as `loss(embeddings, labels)` and, for the bank, `loss(embeddings, labels, ref_emb=...,
            ref_labels=...)`; one of ours or of pytorch-metric-learning.
        memory_loss: the loss against the bank; None is the same as `loss`.
        batch_weight: factor of the in-batch loss; 0 leaves it out.
        memory_weight: factor of the loss against the bank; 0 leaves it out.
        optimizer: makes the optimizer from parameters; None is AdamW with learning rate 1e-4 and weight decay 5e-4
            (the values of XBM's SOP recipe, which used Adam).
        lr_scheduler: makes the scheduler from the optimizer; None keeps the rate. A `ReduceLROnPlateau` of
            Lightning's (`pytorch_lightning.cli.ReduceLROnPlateau`) watches its `monitor`.
        loss_lr: learning rate of the parameters of the losses themselves, such as a margin's beta or another library's
            proxies; None is the embedder's.
        lr_interval: whether the scheduler steps per `epoch` or per `step`.
        ks: the K of the Recall@K that evaluation logs, short for `metrics=RetrievalMetrics(ks=ks)`; None is
            (1, 2, 4, 8).
        metrics: what evaluation computes; every data set of validation and test gets a copy of its own.

    Attributes:
        memory_bank: the `MemoryBank` in use, or None.

    Raises:
        InputError: for weights that are negative, not finite or both 0, a `loss_lr` that is not positive, an unknown
            `lr_interval`, both of `ks` and `metrics`, `ks` that are no list of integers of at least 1, or `metrics`
            that are no `RetrievalMetrics`.
    """

    memory_bank: MemoryBank | None

    def __init__(
        self,
        embedder: nn.Module,
        loss: nn.Module,
        *,
        memory_loss: nn.Module | None = None,
        batch_weight: float = 1.0,
        memory_weight: float = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss_lr: float | None = None,
        lr_interval: str = "epoch",
        ks: Sequence[int] | None = None,
        metrics: RetrievalMetrics | None = None,
    ) -> None:
        super().__init__()
        # From the command line the arguments are plain class paths and travel in the checkpoint, so that
        # load_from_checkpoint needs no arguments. Built in Python, the parts are objects that no checkpoint should
        # pickle: give them again when loading.
        objects = ["embedder", "loss", "memory_loss", "optimizer", "lr_scheduler", "metrics"]
        self.save_hyperparameters(ignore=[] if made_from_a_config() else objects)
        for name, weight in (("batch_weight", batch_weight), ("memory_weight", memory_weight)):
            check_number(name, weight, least=0, hint="0 leaves that part out")
        if batch_weight == 0 and memory_weight == 0:
            raise InputError("batch_weight and memory_weight are both 0, so nothing would be trained; raise one")
        check_choice("lr_interval", lr_interval, ("epoch", "step"))
        if loss_lr is not None:
            check_number("loss_lr", loss_lr, above=0, hint="None takes the embedder's rate")
        if ks is not None:
            check_counts("ks", ks, hint="give a list, such as [1, 2, 4]")
        if metrics is not None and not isinstance(metrics, RetrievalMetrics):
            value = f"the class {metrics.__name__}" if isinstance(metrics, type) else f"a {type(metrics).__name__}"
            raise InputError(
                f"metrics must be a RetrievalMetrics, got {value}: give metrics=RetrievalMetrics(ks=(1, 5), ...), or "
                "None for the default"
            )
        if ks is not None and metrics is not None:
            raise InputError(
                f"ks={tuple(ks)} and metrics={type(metrics).__name__}(...) both say what to evaluate: leave ks out "
                "(None), and give it to RetrievalMetrics(ks=...)"
            )
        self.embedder = embedder
        self.loss = loss
        self.memory_loss = memory_loss
        self.batch_weight = batch_weight
        self.memory_weight = memory_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loss_lr = loss_lr
        self.lr_interval = lr_interval
        self.memory_bank = None
        template = RetrievalMetrics(ks=DEFAULT_KS if ks is None else tuple(ks)) if metrics is None else metrics
        self.val_metrics = SetMetrics("val", template)
        self.test_metrics = SetMetrics("test", template)

    def setup(self, stage: str) -> None:
        """Makes the ranks evaluate together where some have no batches."""
        evaluate_on_every_rank(self.trainer, self)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, C, H, W)."""
        embeddings: Tensor = self.embedder(images)
        return embeddings

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss of a batch; also returns what `MemoryBankCallback` reads, detached."""
        rows = embeddings, labels, indices = Rows(self(batch["image"]), batch["label"], batch["index"])
        total = embeddings.new_zeros(())
        if self.batch_weight:
            in_batch = call_loss(self.loss, rows)
            self._log_train("train/batch_loss", in_batch, len(labels))
            total = total + self.batch_weight * in_batch
        bank = self.memory_bank
        if bank is not None and bank.store.count and self.memory_weight * bank.weight:
            loss = self.loss if self.memory_loss is None else self.memory_loss
            contents = Rows(bank.embeddings, bank.labels, bank.indices)
            against_bank = call_loss(loss, rows, contents, sharded=bank.share[1] > 1)
            self._log_train("train/memory_loss", against_bank, len(labels))
            total = total + self.memory_weight * bank.weight * against_bank
        if not total.requires_grad:  # batch_weight 0 while the bank is still empty
            total = total + 0 * embeddings.sum()
        for part in (self.loss, self.memory_loss):
            # DDP waits for a gradient of every parameter, also of a loss that is not in use yet.
            total = total + sum(0 * parameter.sum() for parameter in ([] if part is None else part.parameters()))
        self._log_train("train/loss", total, len(labels), prog_bar=True)
        return {"loss": total, "embeddings": embeddings.detach(), "labels": labels, "indices": indices}

    def on_validation_epoch_start(self) -> None:
        """Forgets the rows of an earlier evaluation, also of one that did not end."""
        self.val_metrics.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collects the embeddings of a validation batch."""
        self.val_metrics.update(dataloader_idx, self(batch["image"]), batch)

    def on_validation_epoch_end(self) -> None:
        """Computes and logs `val/...`."""
        self._log_metrics(self.val_metrics, self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """Forgets the rows of an earlier evaluation, also of one that did not end."""
        self.test_metrics.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collects the embeddings of a test batch."""
        self.test_metrics.update(dataloader_idx, self(batch["image"]), batch)

    def on_test_epoch_end(self) -> None:
        """Computes and logs `test/...`."""
        self._log_metrics(self.test_metrics, self.trainer.test_dataloaders)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings, labels and indices of a batch; `enqueue` as well where the batch has it."""
        outputs = {"embeddings": self(batch["image"]), "labels": batch["label"], "indices": batch["index"]}
        return outputs | ({"enqueue": batch["enqueue"]} if "enqueue" in batch else {})

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler over the parameters that train, those made in `configure_model` included."""
        parameters = self._parameter_groups()
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters, lr=DEFAULT_LR, weight_decay=DEFAULT_WEIGHT_DECAY
            )
        else:
            optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            if not hasattr(scheduler, "monitor") and scheduler.mode == "min":
                raise InputError(
                    "lr_scheduler watches val/recall@1, which rises, but its mode is 'min': set mode to 'max', or name "
                    "another value with pytorch_lightning.cli.ReduceLROnPlateau(monitor=...)"
                )
            settings["monitor"] = getattr(scheduler, "monitor", "val/recall@1")
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the parameters that train, those of the losses apart where they have another rate."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.loss_lr is None:
            return [{"params": trained}]
        losses = [loss for loss in (self.loss, self.memory_loss) if loss is not None]
        of_losses = {id(parameter) for loss in losses for parameter in loss.parameters()}
        with_own_rate = [parameter for parameter in trained if id(parameter) in of_losses]
        others = [parameter for parameter in trained if id(parameter) not in of_losses]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": with_own_rate, "lr": self.loss_lr}]
        return [group for group in groups if group["params"]]

    def _log_train(self, name: str, value: Tensor, batch_size: int, prog_bar: bool = False) -> None:
        self.log(name, value.detach(), on_step=True, on_epoch=False, prog_bar=prog_bar, batch_size=batch_size)

    def _log_metrics(self, metrics: SetMetrics, loaders: Any) -> None:
        values = metrics.compute(list(named_loaders(loaders)), sanity_check=self.trainer.sanity_checking)
        metrics.reset()
        in_bar = {f"{metrics.stage}/{name}" for name in ("recall@1", "map@r")}
        for name, value in values.items():
            # The ranks agree already; the maximum of equal values is that value, which a mean of three need not be.
            self.log(name, value, prog_bar=name in in_bar, sync_dist=True, reduce_fx="max")
