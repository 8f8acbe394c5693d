"""`MemoryBankCallback`: feeds a memory bank from any LightningModule, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank, MomentumEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MemoryBankCallback(Callback):
    """Keeps a cross-batch `MemoryBank` in `pl_module.memory_bank`.

    Works with `MetricLearningModule` and with any LightningModule that reads `self.memory_bank` and whose
    `training_step` returns a dict with `loss` and detached `embeddings` (N, D), `labels` (N,) and `indices` (N,).

    With `momentum`, the keys come from a momentum encoder, a slowly following copy of the module's attribute `encoder`,
    applied to `batch["image"]` before the training step, so that the bank holds the current batch when the loss is
    computed. Without (`momentum=None`), the keys are the embeddings that the training step returned, enqueued after
    it. The bank starts to fill at `start_step`, where the momentum encoder is copied from the embedder anew.

    Rows of all ranks are gathered in rank order before they are enqueued, so the bank is the same on every rank, saving
    it needs no collective, and a run may resume on another number of ranks. Bank and encoder are part of
    the checkpoint; a run resumed from it continues as if it had not stopped.

    Args:
        size: entries of the bank, or, as a float in (0, 1], the share of the training set that it holds (the memory
            ratio of XBM).
        start_step: optimizer step at which the bank starts; XBM's SOP recipe has 1,000.
        momentum: coefficient of the momentum encoder in [0, 1]; None for online keys.
        encoder: name of the attribute of the LightningModule that maps images to embeddings.
        dtype: floating dtype of the stored embeddings.

    Attributes:
        bank: the `MemoryBank`; None before its first rows come in.
        momentum_encoder: the `MomentumEncoder`; None for online keys and before `start_step`.

    Raises:
        InputError: for a size, step, momentum or dtype out of range; when training starts, for a module without
            the attribute `encoder`; on the first batch, for a batch or a step output without what is read from it.
    """

    def __init__(
        self,
        size: int | float = 8192,
        start_step: int = 0,
        momentum: float | None = 0.99,
        encoder: str = "embedder",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        if size <= 0 or (isinstance(size, float) and size > 1):
            raise InputError(f"memory size must be positive or a ratio in (0, 1], got {size}")
        if start_step < 0:
            raise InputError(f"start_step must not be negative, got {start_step}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise InputError(f"momentum must lie in [0, 1], such as 0.99, or be None for online keys, got {momentum}")
        if dtype not in DTYPES:
            raise InputError(f"memory dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.size = size
        self.start_step = start_step
        self.momentum = momentum
        self.encoder = encoder
        self.dtype = DTYPES[dtype]
        self.bank: MemoryBank | None = None
        self.momentum_encoder: MomentumEncoder | None = None
        self._entries = 0
        self._last_step = 0
        self._fitting = False
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes sure that the module has a `memory_bank` to read."""
        self._fitting, self._restored = stage == "fit", None
        if not hasattr(pl_module, "memory_bank"):
            _hand_over(pl_module, None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with an empty bank, or with the checkpoint's."""
        embedder = self._embedder(pl_module) if self.momentum is not None else None
        restored, self._restored = self._restored, None
        if restored is not None:
            self._restore(restored, pl_module, embedder)
        elif trainer.global_step == 0:  # a second fit of the same trainer goes on with the bank
            self.bank = self.momentum_encoder = None
        _hand_over(pl_module, self.bank)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns the step that it starts from, and the size of the training set where the bank is a share of it."""
        self._last_step = trainer.global_step  # in on_fit_start a resumed run's steps are not restored yet
        self._entries = int(self.size)
        if isinstance(self.size, float):
            loader: Any = trainer.train_dataloader
            try:
                samples = len(loader.dataset)
            except (AttributeError, TypeError) as error:
                raise InputError(
                    f"memory size {self.size} is a ratio of the training set, whose length the training dataloader "
                    "does not tell; give the number of entries instead"
                ) from error
            self._entries = max(1, round(self.size * samples))
        if self.bank is not None and self.bank.size != self._entries:
            resized = MemoryBank(self._entries, self.bank.dim, self.bank.dtype, self.bank.device)
            resized.load_state_dict(self.bank.state_dict())
            self.bank = resized
            _hand_over(pl_module, resized)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enqueues the momentum encoder's keys of the batch."""
        if self.momentum is None or trainer.global_step < self.start_step:
            return
        embedder = self._embedder(pl_module)
        if self.momentum_encoder is None:
            self.momentum_encoder = MomentumEncoder(embedder, self.momentum).to(pl_module.device)
        if not (isinstance(batch, Mapping) and {"image", "label", "index"} <= set(batch)):
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(
                "momentum keys are made from a batch that is a dict with 'image', 'label' and 'index', "
                f"got {found}; return such a dict from the dataset, or set momentum=None for online keys"
            )
        self.momentum_encoder.match_mode(embedder)
        with trainer.precision_plugin.forward_context():
            keys = self.momentum_encoder(batch["image"])
        self._enqueue(keys, batch["label"], batch["index"], trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the momentum encoder after an optimizer step; enqueues online keys."""
        step = trainer.global_step
        if self.momentum_encoder is not None and step > self._last_step:
            self.momentum_encoder.update(self._embedder(pl_module))
        previous, self._last_step = self._last_step, step
        if self.momentum is not None or previous < self.start_step:
            return
        missing = {"embeddings", "labels", "indices"} - set(outputs if isinstance(outputs, Mapping) else ())
        if missing:
            raise InputError(
                f"training_step must return a dict with 'loss', 'embeddings', 'labels' and 'indices' for the memory "
                f"bank to read; {', '.join(sorted(missing))} missing"
            )
        self._enqueue(outputs["embeddings"], outputs["labels"], outputs["indices"], previous, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if embeddings were not finite."""
        if self.bank is not None and (refused := int(self.bank.refused)):
            rank_zero_warn(
                f"{refused} embeddings were NaN or infinite and did not enter the memory bank: the training is "
                "unstable; lower the learning rate, or train in bf16 or float32"
            )
            self.bank.refused.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Bank and encoder as tensors and numbers; needs no collective, so a signal handler may call it."""
        return {
            "bank": None if self.bank is None else self.bank.state_dict(),
            "encoder": None if self.momentum_encoder is None else self.momentum_encoder.encoder.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the fit starts; validation and test have no use for it."""
        self._restored = state_dict if self._fitting else None

    def _restore(self, state: dict[str, Any], pl_module: LightningModule, embedder: nn.Module | None) -> None:
        self.bank = self.momentum_encoder = None
        if state["bank"] is not None:
            self.bank = MemoryBank(state["bank"]["size"], state["bank"]["dim"], self.dtype, pl_module.device)
            self.bank.load_state_dict(state["bank"])
        if state["encoder"] is not None and embedder is not None:
            assert self.momentum is not None
            self.momentum_encoder = MomentumEncoder(embedder, self.momentum).to(pl_module.device)
            self.momentum_encoder.encoder.load_state_dict(state["encoder"])

    def _enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor, step: int, pl_module: LightningModule
    ) -> None:
        counts = distributed.row_counts(len(embeddings), embeddings.device)
        embeddings = distributed.gather_rows(embeddings.to(self.dtype), counts)
        identity = distributed.gather_rows(torch.stack((labels, indices), dim=1), counts)
        if self.bank is None:
            self.bank = MemoryBank(self._entries, embeddings.shape[1], self.dtype, embeddings.device)
            _hand_over(pl_module, self.bank)
        self.bank.enqueue(embeddings, identity[:, 0], identity[:, 1], step)

    def _embedder(self, pl_module: LightningModule) -> nn.Module:
        embedder = getattr(pl_module, self.encoder, None)
        if not isinstance(embedder, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.encoder!r} for the momentum encoder to copy; set "
                "encoder to the attribute that maps images to embeddings, or momentum=None for online keys"
            )
        return embedder


def _hand_over(pl_module: Any, bank: MemoryBank | None) -> None:
    # Any LightningModule has the attribute by contract, not by type.
    pl_module.memory_bank = bank
