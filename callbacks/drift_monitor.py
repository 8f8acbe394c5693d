"""`DriftMonitor`: how fast embeddings move, and how stale that makes the memory bank."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.callbacks.memory_bank import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank
from lightning_dml.memory.contents import BankContents, bank_figures, pair_figures, precise
from lightning_dml.modules.sample_encoding import (
    BatchPlan,
    encode_images,
    encode_samples,
    load_batches,
    training_loader,
    undisturbed,
)
from lightning_dml.modules.training_batches import outputs_of, warn_of_missed_steps
from lightning_dml.seeds import mixed_seed

_LAGS = (1, 10)
_PROBE_BATCH = 64


class DriftMonitor(Callback):
    r"""Measures the drift of embeddings and what the memory bank holds; warns once when the bank is stale.

    XBM rests on slow drift (arXiv 1912.06798): what the embedder said of a sample some steps ago is near what it says
    now. This callback measures it, every `every_n_steps` optimizer steps, in squared distances of embeddings, of which
    0 is equal and, of unit rows, 2 is orthogonal. The average over samples is our form of the paper's measure:

    .. math:: D = \frac{1}{n} \sum_i \lVert f(x_i; \theta_t) - f(x_i; \theta_{t - \Delta t}) \rVert^2

    It needs batches with `image`, `label` and `index`, where `index` is the position in a map-style training set.
    Measuring leaves no trace in the training: its weights are the same bit for bit without this callback. All figures
    are logged with `pl_module.log`, equal on every rank:

    - `drift/probe`: D of fixed training images since the previous measurement (the first: since training started), by
      the embedder in evaluation mode; `drift/probe_lag10`: since ten measurements ago.
    - `drift/bank`: mean squared distance between entries of the bank and what the encoder that made them, the momentum
      encoder where there is one, says of their samples now, loaded anew, in training mode; `drift/bank_age_q1`
      (youngest) to `_q4` (oldest): the same by quarters of the entries ordered by age.
    - `drift/floor`: mean squared distance between two encodings of these samples under the same weights, which is what
      augmentation, dropout and the company in batch norm contribute to `drift/bank`; the rest of it is staleness.
    - `drift/online`, with a momentum encoder: mean squared distance between the entries and what the embedder itself
      says now, of which the lag of the momentum encoder is a part.
    - `memory/fill`: share of the slots in use; `memory/age_mean`, `memory/age_max`: optimizer steps since the entries
      were made; `memory/classes`: different labels.
    - `memory/hard_negatives`: share of the pairs of a batch row and an entry of another label whose similarity is above
      `hard_above`; `memory/positives`: share of the batch rows that have a positive in the bank other than their own
      sample. Both read the dict that `training_step` returns.

    The names begin with `{attribute}/` where the attribute is another one than `memory_bank`. Without a bank only the
    probes are measured. A logger gets steps at which `Trainer(log_every_n_steps=...)` writes; `history` gets all.

    Args:
        every_n_steps: optimizer steps between measurements.
        probes: number of fixed training images, kept in memory; 0 leaves this part out.
        entries: number of entries that are encoded anew (twice) at a measurement; 0 leaves this part out.
        attribute: name of the LightningModule's attribute that holds the bank.
        encoder: name of the LightningModule's attribute that maps images to embeddings.
        stale_above: warn when `drift/bank` exceeds `drift/floor` by more than this.
        hard_above: similarity above which a negative counts as hard.
        seed: of the probes and of the entries that are drawn.

    Attributes:
        history: a dict of `step` and all figures for each measurement.

    Raises:
        InputError: for a setting out of range; when training starts, for a module without the attribute `encoder` or a
            training set that is not map-style; at a measurement, for a step output or a batch without what is read
            from it, or an `index` that is not the position in the training set.

    Examples:
        >>> monitor = DriftMonitor(every_n_steps=50, entries=0)
        >>> monitor.history
        []
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        probes: int = 256,
        entries: int = 256,
        attribute: str = "memory_bank",
        encoder: str = "embedder",
        stale_above: float = 0.5,
        hard_above: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"every_n_steps must be at least 1, got {every_n_steps}; leave the callback out instead")
        for name, count in (("probes", probes), ("entries", entries)):
            if count < 0:
                raise InputError(f"{name} must not be negative, got {count}; 0 leaves that part out")
        if not stale_above > 0:
            raise InputError(f"stale_above must be positive, got {stale_above}; float('inf') never warns")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        self.every_n_steps = every_n_steps
        self.probes = probes
        self.entries = entries
        self.attribute = attribute
        self.encoder = encoder
        self.stale_above = stale_above
        self.hard_above = hard_above
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self._past: list[Tensor] = []  # embeddings of the probes, the newest last
        self._positions = torch.empty(0, dtype=torch.int64)
        self._images: list[tuple[int, Tensor]] = []  # this rank's batches of the probes
        self._plan: BatchPlan | None = None
        self._warned = False
        self._last_step = 0
        self._fitting = False
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of monitors of several banks apart in a checkpoint."""
        return self._generate_state_key(attribute=self.attribute)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns whether a checkpoint's state will be of use."""
        self._fitting, self._restored = stage == "fit", None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there is an encoder."""
        if self.probes or self.entries:
            self._encoder(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the probes, and their first embeddings unless a checkpoint brought those."""
        state, self._restored = self._restored, None
        if state is not None:
            self.history, self._past = [dict(each) for each in state["history"]], list(state["past"])
            self._positions, self._warned = state["positions"], state["warned"]
        elif trainer.global_step == 0:  # a second fit of the same trainer goes on
            self.history, self._past, self._warned = [], [], False
        self._last_step = trainer.global_step
        warn_of_missed_steps(trainer, "DriftMonitor", self.every_n_steps)
        if self.probes:
            self._take_probes(trainer, pl_module)
            if not self._past:
                self._past = [self._encode_probes(trainer, pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, logs and warns where it is time."""
        step, previous = trainer.global_step, self._last_step
        self._last_step = step
        if step // self.every_n_steps == previous // self.every_n_steps:
            return
        figures = self._probe_drift(trainer, pl_module) if self.probes else {}
        bank: MemoryBank | None = getattr(pl_module, self.attribute, None)
        if bank is not None and int(bank.store.labelled):
            purpose = "DriftMonitor to compare the batch with the memory bank"
            embeddings, labels, indices = outputs_of(outputs, purpose)
            if self.entries:
                rows = max(distributed.row_counts(len(labels), labels.device))
                figures |= self._bank_drift(trainer, pl_module, bank, step, rows)
            figures |= {f"memory/{name}": value for name, value in bank_figures(bank, step).items()}
            pairs = pair_figures(bank, embeddings.detach(), labels, indices, self.hard_above)
            figures |= {f"memory/{name}": value for name, value in pairs.items()}
        prefix = "" if self.attribute == "memory_bank" else f"{self.attribute}/"
        figures = {f"{prefix}{name}": value for name, value in figures.items()}
        for name, value in figures.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)
        self.history.append({"step": step, **figures})
        self._warn_if_stale(figures.get(f"{prefix}drift/bank"), figures.get(f"{prefix}drift/floor"), step)

    def state_dict(self) -> dict[str, Any]:
        """History and the probes' past embeddings, the same on every rank; needs no collective."""
        return {
            "history": [dict(each) for each in self.history],
            "past": list(self._past),
            "positions": self._positions,
            "warned": self._warned,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the training starts."""
        self._restored = state_dict if self._fitting else None

    def _take_probes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dataset: Any = training_loader(trainer).dataset
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.randperm(len(dataset), generator=generator)[: self.probes]
        if not torch.equal(positions, self._positions):  # a checkpoint of other probes or data
            self._past = []
        self._positions, self._plan = positions, BatchPlan(len(positions), _PROBE_BATCH)
        with undisturbed(self._encoder(pl_module), pl_module.device):
            batches = load_batches(trainer, pl_module, positions, self._plan, self.seed)
            self._images = [(number, batch["image"].cpu()) for number, batch in batches]

    def _encode_probes(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        assert self._plan is not None
        with undisturbed(self._encoder(pl_module), pl_module.device) as encoder:
            encoder.eval()
            parts = [
                encode_images(trainer, encoder, images.to(pl_module.device), self.seed, number)
                for number, images in self._images
            ]
        return precise(self._plan.gather(parts)).cpu()

    def _probe_drift(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        now = self._encode_probes(trainer, pl_module)
        figures = {
            "drift/probe" if lag == 1 else f"drift/probe_lag{lag}": float(_distances(now, self._past[-lag]).mean())
            for lag in _LAGS
            if lag <= len(self._past)
        }
        self._past = [*self._past, now][-max(_LAGS) :]
        return figures

    def _bank_drift(
        self, trainer: Trainer, pl_module: LightningModule, bank: MemoryBank, step: int, batch_size: int
    ) -> dict[str, float]:
        """The drift of drawn entries; `batch_size` is what the training's own forward passes have on a rank."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, step))
        contents = BankContents(bank)
        drawn = contents.draw(self.entries, generator)
        rows = torch.cat(drawn)
        if len(rows) < 2:  # batch norm can do nothing with one
            return {}
        samples = contents.indices[rows]
        encoder, keys = self._encoder(pl_module), self._key_encoder(trainer, pl_module)
        encoded = []
        for each in (keys, keys) if keys is encoder else (keys, keys, encoder):
            # In a new order each time, for batch norm sees the company in a batch.
            order = torch.randperm(len(rows), generator=generator)
            seed = int(torch.randint(2**31, (), generator=generator))
            embeddings, _, found = encode_samples(trainer, pl_module, each, samples[order], batch_size, seed)
            if not torch.equal(found.cpu(), samples[order]):
                raise InputError(
                    "batch['index'] must be the position in the training set for entries of the memory bank to be "
                    "encoded anew, but the sample at one position has another index; let the data set return the "
                    "position that it is asked for, or set entries=0"
                )
            encoded.append(precise(embeddings).cpu()[order.argsort()])
        now, again = encoded[:2]
        stored = contents.embeddings_of(rows)
        distances = _distances(now, stored)
        bounds = list(itertools.accumulate(len(each) for each in drawn))
        quarters = distances.tensor_split(bounds[:-1])
        figures = {
            "drift/bank": float(distances.mean()),
            **{f"drift/bank_age_q{number}": float(q.mean()) for number, q in enumerate(quarters, 1) if len(q)},
            "drift/floor": float(_distances(now, again).mean()),
        }
        if len(encoded) > 2:
            figures["drift/online"] = float(_distances(encoded[2], stored).mean())
        return figures

    def _warn_if_stale(self, bank: float | None, floor: float | None, step: int) -> None:
        if self._warned or bank is None or floor is None or bank - floor <= self.stale_above:
            return
        self._warned = True
        rank_zero_warn(
            f"the memory bank is stale: at step {step} its entries lie {bank - floor:.2f} (mean squared distance, "
            f"{bank:.2f} less {floor:.2f} by augmentation) from what their encoder says of their samples now, more "
            f"than stale_above={self.stale_above}, and a loss against it may do harm. Take momentum keys "
            "(momentum=0.99), a later start_step, a lower learning rate, a smaller bank, or a lower weight of the loss "
            "against it"
        )

    def _key_encoder(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """What makes the bank's keys: the momentum encoder of the callback that owns the bank, or the embedder."""
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        for each in callbacks:
            if isinstance(each, MemoryBankCallback) and each.attribute == self.attribute and each.momentum_encoder:
                return each.momentum_encoder.encoder
        return self._encoder(pl_module)

    def _encoder(self, pl_module: LightningModule) -> nn.Module:
        encoder = getattr(pl_module, self.encoder, None)
        if not isinstance(encoder, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.encoder!r} whose drift could be measured; set "
                "encoder to the attribute that maps images to embeddings, or probes=0 and entries=0"
            )
        return encoder


def _distances(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).square().sum(dim=1)
