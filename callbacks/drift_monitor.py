"""`DriftMonitor`: the speed at which embeddings move, and how stale that makes the memory bank."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from lightning_dml import distributed
from lightning_dml.callbacks.memory_bank import MemoryBankCallback
from lightning_dml.checks import check_count
from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank
from lightning_dml.memory.contents import bank_figures, pair_figures
from lightning_dml.modules.drift import Probes, bank_drift
from lightning_dml.modules.training_batches import outputs_of, warn_of_missed_steps
from lightning_dml.seeds import mixed_seed


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
        *,
        probes: int = 256,
        entries: int = 256,
        attribute: str = "memory_bank",
        encoder: str = "embedder",
        stale_above: float = 0.5,
        hard_above: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps, hint="to measure nothing, leave the callback out")
        for name, count in (("probes", probes), ("entries", entries)):
            check_count(name, count, least=0, hint="0 leaves that part out")
        if not stale_above > 0:
            raise InputError(f"stale_above must be positive, got {stale_above}; float('inf') never warns")
        check_count("seed", seed, least=0)
        self.every_n_steps = every_n_steps
        self.probes = probes
        self.entries = entries
        self.attribute = attribute
        self.encoder = encoder
        self.stale_above = stale_above
        self.hard_above = hard_above
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self._probes = Probes(probes, seed)
        self._warned = False
        self._last_step = 0
        self._fitting = False
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of monitors of several banks apart in a checkpoint."""
        return self._generate_state_key(attribute=self.attribute)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes whether this is a fit, the only stage in which a checkpoint's state is of use."""
        self._fitting, self._restored = stage == "fit", None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there is an encoder."""
        if self.probes or self.entries:
            self._encoder(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the probes, and their first embeddings unless a checkpoint brought those."""
        state, self._restored = self._restored, None
        if state is not None:
            self.history = [dict(figures) for figures in state["history"]]
            self._probes.past, self._probes.positions = list(state["past"]), state["positions"]
            self._warned = state["warned"]
        elif trainer.global_step == 0:  # a second fit of the same trainer goes on
            self.history, self._probes.past, self._warned = [], [], False
        self._last_step = trainer.global_step
        warn_of_missed_steps(trainer, "DriftMonitor", self.every_n_steps)
        if self.probes:
            self._probes.start(trainer, pl_module, self._encoder(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, logs and warns where it is time."""
        step, previous = trainer.global_step, self._last_step
        self._last_step = step
        if step // self.every_n_steps == previous // self.every_n_steps:
            return
        figures = self._probes.drift(trainer, pl_module, self._encoder(pl_module)) if self.probes else {}
        bank: MemoryBank | None = getattr(pl_module, self.attribute, None)
        if bank is not None and int(bank.store.labelled):
            purpose = "DriftMonitor to compare the batch with the memory bank"
            embeddings, labels, indices = outputs_of(outputs, purpose)
            if self.entries:
                figures |= bank_drift(
                    trainer,
                    pl_module,
                    bank,
                    self._key_encoder(trainer, pl_module),
                    self._encoder(pl_module),
                    entries=self.entries,
                    batch_size=max(distributed.row_counts(len(labels), labels.device)),
                    seed=mixed_seed(self.seed, step),
                )
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
            "history": [dict(figures) for figures in self.history],
            "past": list(self._probes.past),
            "positions": self._probes.positions,
            "warned": self._warned,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the training starts."""
        self._restored = state_dict if self._fitting else None

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
        """The maker of the bank's keys: the momentum encoder of the callback that owns the bank, or the embedder."""
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        for owner in callbacks:
            if isinstance(owner, MemoryBankCallback) and owner.attribute == self.attribute and owner.momentum_encoder:
                return owner.momentum_encoder.encoder
        return self._encoder(pl_module)

    def _encoder(self, pl_module: LightningModule) -> nn.Module:
        encoder = getattr(pl_module, self.encoder, None)
        if not isinstance(encoder, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.encoder!r} whose drift could be measured; set "
                "encoder to the attribute that maps images to embeddings, or probes=0 and entries=0"
            )
        return encoder
