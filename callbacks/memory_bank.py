"""`MemoryBankCallback`: a memory bank fed by any LightningModule, the same on every rank."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.callbacks.step_end_signals import StepEndSignals
from lightning_dml.checks import check_choice
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.memory import MemoryBank, MomentumEncoder
from lightning_dml.memory.encoder_watch import EncoderWatch
from lightning_dml.memory.feed import BankFeed, BankSchedule
from lightning_dml.memory.momentum import check_precision
from lightning_dml.modules.sample_encoding import encode_samples
from lightning_dml.modules.training_batches import bank_entries, identity_of, mask_of, outputs_of, training_samples


class MemoryBankCallback(Callback):
    """Keeps a cross-batch `MemoryBank` in an attribute of the LightningModule, `memory_bank` by default.

    Works with `MetricLearningModule` and with any LightningModule that reads `self.memory_bank`, under automatic and
    manual optimization. Batches are dicts with `image`, `label` (N,) and `index` (N,).

    The keys, what enters the bank, come from one of two encoders. With `momentum`, from a momentum encoder: a slowly
    following copy of the module's attribute `encoder`, applied to `batch["image"]` before the training step. Without
    (`momentum=None`), they are the embeddings that the attribute `encoder` itself returns in the training step.
    With `enqueue="before"`, XBM's order, the bank holds the batch's keys when its loss is computed; with `"after"` they
    enter at the end of the step, and online keys are then what `training_step` returns: a dict with `loss`, and
    detached `embeddings` (N, D), `labels` (N,) and `indices` (N,).

    Either way the keys may enter a queue or a slot of their sample's own (`policy`), where a moving average over a
    sample's keys may be kept (`average`), and the stored embeddings may be kept at the mean and variance of the
    batch's keys (`adaptation`). A batch may hold `enqueue` (N,) bool, and so may, with `enqueue="after"`, the dict that
    `training_step` returns: rows where it is False stay out of the bank. A batch that `training_step`
    skips by returning None leaves no online keys.

    The bank starts to fill at `start_step`, where the momentum encoder is copied from the embedder anew. Rows of all
    ranks are gathered in rank order, so the bank is the same on every rank, saving it needs no collective, and a run
    may resume on another number of ranks. Bank, encoder and adaptation are part of the checkpoint; a run resumed from
    it continues as if it had not stopped. With another `size` or `policy` than the checkpoint's, the newest rows that
    fit are taken over.

    With `sharded`, each rank keeps only its share of the embeddings, losses of this library gather the anchors instead,
    and saving is a collective: call `trainer.save_checkpoint` on all ranks at the same step, as ModelCheckpoint does.
    When an exception ends the training, a checkpoint is written without the bank, since the other ranks may be gone.

    Args:
        size: entries of the bank, or, as a float in (0, 1], the share of the training set that it holds (the memory
            ratio of XBM).
        start_step: optimizer step at which the bank starts, by `trainer.global_step`, which counts the steps of all
            optimizers; XBM's SOP recipe has 1,000.
        momentum: coefficient of the momentum encoder in [0, 1]; None for online keys.
        encoder: name of the attribute of the LightningModule that maps images to embeddings.
        dtype: floating dtype of the stored embeddings.
        weight: factor of the loss against the bank, which the module reads as `memory_bank.weight`.
        warmup_steps: over how many optimizer steps from `start_step` the weight rises to `weight`, linearly from 0.
        enqueue: whether a batch's keys enter `before` or `after` its loss.
        initial_fill: fill the bank at `start_step` with the keys of random training samples (as the XBM paper
            describes), rather than with the batches that come.
        policy: `queue`, first in, first out; or `samples`, one slot for each sample of the training set by its index,
            for which `size` is to be 1.0.
        average: coefficient of a sample's moving average in its slot, with `policy="samples"`; 0 replaces.
        adaptation: `moments` or `kalman`, see `MomentAdaptation`; None leaves stored embeddings as they are.
        momentum_end: the momentum rises to this value at the last step by a half cosine, as in BYOL (arXiv
            2006.07733); None keeps it. With several optimizers it gets there early, as each step of one counts.
        sharded: keep on each rank only its share of the bank.
        attribute: name of the LightningModule's attribute for the bank; several callbacks take different ones.
        output: name of the online keys in the dict that `training_step` returns, for `enqueue="after"`.
        bank_file: start with the bank in this file, as `MemoryBank.save` and `lightning-dml bank` write it.

    Attributes:
        momentum_encoder: the `MomentumEncoder`; None for online keys and before `start_step`.

    Raises:
        InputError: for a setting out of range or settings that exclude each other; when training starts, for a module
            without the attribute `encoder` or a bank file that cannot be read; on the first batch, for a batch or a
            step output without what is read from it.
    """

    def __init__(
        self,
        size: int | float = 8192,
        *,
        start_step: int = 0,
        momentum: float | None = 0.99,
        encoder: str = "embedder",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        weight: float = 1.0,
        warmup_steps: int = 0,
        enqueue: Literal["before", "after"] = "before",
        initial_fill: bool = False,
        policy: Literal["queue", "samples"] = "queue",
        average: float = 0.0,
        adaptation: Literal["moments", "kalman"] | None = None,
        momentum_end: float | None = None,
        sharded: bool = False,
        attribute: str = "memory_bank",
        output: str = "embeddings",
        bank_file: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(size, bool) or not size > 0 or (isinstance(size, float) and size > 1):
            raise InputError(f"memory size must be positive or a ratio in (0, 1], got {size}")
        if isinstance(size, int) and size == 1:
            raise InputError("memory size 1 is a bank of a single entry; for the whole training set give the ratio 1.0")
        if policy == "samples" and isinstance(size, float) and size < 1:
            raise InputError(f"policy='samples' has a slot for every training sample: set size to 1.0, got {size}")
        check_choice("enqueue", enqueue, ("before", "after"))
        self.schedule = BankSchedule(start_step, weight, warmup_steps, momentum, momentum_end)
        self.feed = BankFeed(dtype, policy, average, adaptation, sharded)
        self.size = size
        self.momentum = momentum
        self.encoder = encoder
        self.enqueue = enqueue
        self.initial_fill = initial_fill
        self.attribute = attribute
        self.output = output
        self.bank_file = bank_file
        self.momentum_encoder: MomentumEncoder | None = None
        self._last_step = 0
        self._final_step = math.inf
        self._fitting = False
        self._failed = False
        self._restored: dict[str, Any] | None = None
        self._unused: dict[str, Any] | None = None
        self._watch: EncoderWatch | None = None
        self._keys: tuple[Tensor, Tensor, Tensor] | None = None  # those that enter after the loss, with their identity

    @property
    def bank(self) -> MemoryBank | None:
        """The bank, None before its first rows come in."""
        return self.feed.bank

    @property
    def state_key(self) -> str:
        """Tells the states of several banks apart in a checkpoint."""
        if self.attribute == "memory_bank":
            return super().state_key
        return self._generate_state_key(attribute=self.attribute)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes sure that the module has the attribute to read, and that signals wait for the end of the step."""
        self._fitting, self._restored, self._unused, self._failed = stage == "fit", None, None, False
        present = getattr(pl_module, self.attribute, None)
        if present is not None and not isinstance(present, MemoryBank):
            raise InputError(
                f"attribute must name a place for the bank, but {type(pl_module).__name__}.{self.attribute} is a "
                f"{type(present).__name__}; training_step is to read the bank from there, 'memory_bank' by default"
            )
        if self._fitting:
            StepEndSignals.add_to(trainer)
        if not hasattr(pl_module, self.attribute):
            setattr(pl_module, self.attribute, None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with an empty bank, the file's, or the checkpoint's."""
        if self.momentum is not None or self.enqueue == "before" or self.initial_fill:
            embedder = self._embedder(pl_module)
            if self.momentum is not None:
                check_precision(embedder)
        if self._restored is None and trainer.global_step == 0:  # a second fit of the same trainer keeps the bank
            self.feed.clear()
            self.momentum_encoder = None
            if self.bank_file is not None:
                self._take_file(self.bank_file, pl_module)
        self._restore(pl_module)
        setattr(pl_module, self.attribute, None)
        self._stop_watching()
        if self.momentum is None and self.enqueue == "before":
            self._watch = EncoderWatch(self._embedder(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns the step that it starts from, and the entries of a bank that is a share of the training set."""
        self._restore(pl_module)  # some strategies load a checkpoint only now
        self._last_step = trainer.global_step  # in on_fit_start a resumed run's steps are not restored yet
        self.feed.start(bank_entries(trainer, self.size, self.feed.policy), pl_module.device)
        if self.schedule.momentum_end is not None:
            self._final_step = trainer.estimated_stepping_batches
            if math.isinf(self._final_step):
                raise InputError("momentum_end needs to know the last step: set max_steps of the Trainer")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Weighs the bank, fills it where asked, and makes the keys that come before the loss."""
        step = trainer.global_step
        if step < self.schedule.start_step:
            return
        self._hand_over(pl_module, step)
        if self.momentum is not None and self.momentum_encoder is None:
            self.momentum_encoder = self._copy_of_embedder(pl_module, self.momentum)
        if self.initial_fill and self.bank is None:
            self._fill(trainer, pl_module, batch)
        if self.momentum_encoder is not None:
            labels, indices, mask = identity_of(batch)
            self.momentum_encoder.match_mode(self._embedder(pl_module))
            with trainer.precision_plugin.forward_context():
                keys = self.momentum_encoder(batch["image"])
            if self.enqueue == "before":
                self._write(keys, labels, indices, mask, step, pl_module)
            else:
                self._keys = keys, labels, indices
        elif self._watch is not None:
            labels, indices, mask = identity_of(batch)
            self._watch.arm(lambda keys: self._write(keys, labels, indices, mask, step, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the momentum encoder after an optimizer step; enqueues the keys that come after the loss."""
        step, previous = trainer.global_step, self._last_step
        if self.momentum_encoder is not None and step > previous:
            self.momentum_encoder.momentum = self.schedule.momentum_at(step, self._final_step)
            self.momentum_encoder.update(self._embedder(pl_module))
        self._last_step = step
        returned = outputs if isinstance(outputs, Mapping) else {}
        if returned.get("loss") is None and pl_module.automatic_optimization:  # training_step left the batch out
            self._keys = None
            if self._watch is not None:
                self._watch.disarm()
            return
        if self._watch is not None and self._watch.armed:
            self._watch.disarm()
            raise InputError(
                f"training_step did not call {type(pl_module).__name__}.{self.encoder}, whose output the memory bank "
                "is to hold before the loss; set encoder to the attribute that it calls, or enqueue='after'"
            )
        if self.enqueue == "before" or previous < self.schedule.start_step:
            return
        rows, self._keys = self._keys, None
        if self.momentum is None:
            rows = outputs_of(outputs, "the memory bank to read", self.output)
        assert rows is not None
        mask = returned.get("enqueue", mask_of(batch))
        self._write(*rows, mask, previous, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if embeddings were not finite."""
        if self.bank is not None and (refused := int(self.bank.refused)):
            rank_zero_warn(
                f"{refused} embeddings were NaN or infinite and did not enter the memory bank: the training is "
                "unstable; lower the learning rate, or train in bf16 or float32"
                + (" (or their index is not a position in the training set)" if self.feed.policy == "samples" else "")
            )
            self.bank.refused.zero_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keeps a sharded bank from waiting for ranks that are gone."""
        self._failed = True
        self._stop_watching()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the watch off the encoder."""
        self._stop_watching()

    def state_dict(self) -> dict[str, Any]:
        """Bank, encoder and adaptation as tensors and numbers.

        Needs no collective, so a signal handler may call it; unless the bank is sharded, where every rank must.
        """
        if self._unused is not None:
            return self._unused
        encoder = None if self.momentum_encoder is None else self.momentum_encoder.state_of_encoder()
        if self._failed and self.bank is not None and self.bank.share[1] > 1:
            rank_zero_warn("the sharded memory bank is not in this checkpoint: an exception ended the training")
            return {"bank": None, "adaptation": None, "encoder": encoder}
        return {**self.feed.state_dict(), "encoder": encoder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the fit starts; validation and test only hand it on when they save."""
        if self._fitting:
            self._restored = state_dict
        else:
            self._unused = state_dict

    def reset(self) -> None:
        """Empties the bank, forgets smoothed moments, and lets the momentum encoder be copied anew."""
        if self.bank is not None:
            self.bank.reset()
        if self.feed.adaptation is not None:
            self.feed.adaptation.reset()
        self.momentum_encoder = None

    def _restore(self, pl_module: LightningModule) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        self.feed.load_state_dict(state)
        self.momentum_encoder = None
        if state["encoder"] is not None and self.momentum is not None:
            self.momentum_encoder = self._copy_of_embedder(pl_module, self.momentum)
            self.momentum_encoder.load_state_of_encoder(state["encoder"])

    def _take_file(self, path: str, pl_module: LightningModule) -> None:
        state = MemoryBank.load(path).state_dict()
        dim = getattr(getattr(pl_module, self.encoder, None), "dim", None)
        if isinstance(dim, int) and dim != state["dim"]:
            raise InputError(
                f"bank_file {path!r} has embeddings of {state['dim']} columns and {self.encoder} gives {dim}: make the "
                "bank with this embedder"
            )
        self.feed.load_state_dict({"bank": state})

    def _fill(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        labels, _, _ = identity_of(batch)
        rows = max(distributed.row_counts(len(labels), labels.device))  # every rank must ask for the same
        encoder = self._embedder(pl_module) if self.momentum_encoder is None else self.momentum_encoder.encoder
        samples = training_samples(trainer, "initial_fill")
        # What seed_everything has set, the same on every rank and after a resume.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        positions = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[: self.feed.entries]
        keys, labels, indices = encode_samples(trainer, pl_module, encoder, positions, rows, seed % 2**31)
        labelled = labels != UNLABELLED
        self.feed.write(keys[labelled], labels[labelled], indices[labelled], trainer.global_step, gathered=True)
        self._hand_over(pl_module, trainer.global_step)

    def _write(
        self,
        keys: Any,
        labels: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        step: int,
        pl_module: LightningModule,
    ) -> None:
        if not isinstance(keys, Tensor) or keys.ndim != 2 or len(keys) != len(labels):
            shape = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
            raise InputError(
                f"{type(pl_module).__name__}.{self.encoder} must return embeddings ({len(labels)}, D) for a batch of "
                f"{len(labels)}, got {shape}; for other outputs set momentum=None and enqueue='after'"
            )
        self.feed.write(keys, labels, indices, step, mask)
        self._hand_over(pl_module, step)

    def _hand_over(self, pl_module: LightningModule, step: int) -> None:
        if self.bank is not None:
            self.bank.weight = self.schedule.weight_at(step)
        setattr(pl_module, self.attribute, self.bank)

    def _copy_of_embedder(self, pl_module: LightningModule, momentum: float) -> MomentumEncoder:
        return MomentumEncoder(self._embedder(pl_module), momentum).to(pl_module.device)

    def _embedder(self, pl_module: LightningModule) -> nn.Module:
        embedder = getattr(pl_module, self.encoder, None)
        if not isinstance(embedder, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.encoder!r} that gives the keys; set encoder to the "
                "attribute that maps images to embeddings, or momentum=None with enqueue='after' to take what "
                "training_step returns"
            )
        return embedder

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
