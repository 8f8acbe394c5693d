"""Drift: how far embeddings of the same samples move while the embedder trains, in squared distances."""

from __future__ import annotations

import itertools

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.memory import MemoryBank
from lightning_dml.memory.contents import BankContents, precise
from lightning_dml.modules.sample_encoding import (
    BatchPlan,
    encode_images,
    encode_samples,
    load_batches,
    training_loader,
    undisturbed,
)

LAGS = (1, 10)
"""Measurements between the embeddings that are compared."""

_PROBE_BATCH = 64


class Probes:
    """Fixed training images, and their embeddings at the last measurements.

    Args:
        count: number of images, which are kept in memory.
        seed: of the choice of images and of their augmentation.

    Attributes:
        positions: (n,) int64, the places of the images in the training set.
        past: embeddings (n, D) on the CPU at the last measurements, the newest last.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.positions = torch.empty(0, dtype=torch.int64)
        self.past: list[Tensor] = []
        self._images: list[tuple[int, Tensor]] = []  # this rank's batches with their numbers
        self._plan: BatchPlan | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule, encoder: nn.Module) -> None:
        """Loads the images, and embeds them unless `past` has embeddings of the same ones."""
        dataset = training_loader(trainer).dataset
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.randperm(len(dataset), generator=generator)[: self.count]  # type: ignore[arg-type]
        if not torch.equal(positions, self.positions):  # a checkpoint of other probes or data
            self.past = []
        self.positions, self._plan = positions, BatchPlan(len(positions), _PROBE_BATCH)
        with undisturbed(encoder, pl_module.device):
            batches = load_batches(trainer, pl_module, positions, self._plan, self.seed)
            self._images = [(number, batch["image"].cpu()) for number, batch in batches]
        if not self.past:
            self.past = [self._embeddings(trainer, pl_module, encoder)]

    def drift(self, trainer: Trainer, pl_module: LightningModule, encoder: nn.Module) -> dict[str, float]:
        """Embeds the images anew in evaluation mode, and compares with the embeddings before.

        Returns:
            `drift/probe` since the last measurement, and `drift/probe_lag10` where there have been ten: means over the
            images, the same on every rank.
        """
        now = self._embeddings(trainer, pl_module, encoder)
        figures = {
            "drift/probe" if lag == 1 else f"drift/probe_lag{lag}": float(_distances(now, self.past[-lag]).mean())
            for lag in LAGS
            if lag <= len(self.past)
        }
        self.past = [*self.past, now][-max(LAGS) :]
        return figures

    def _embeddings(self, trainer: Trainer, pl_module: LightningModule, encoder: nn.Module) -> Tensor:
        assert self._plan is not None
        with undisturbed(encoder, pl_module.device) as inner:
            inner.eval()
            parts = [
                encode_images(trainer, inner, images.to(pl_module.device), self.seed, number)
                for number, images in self._images
            ]
        return precise(self._plan.gather(parts)).cpu()


def bank_drift(
    trainer: Trainer,
    pl_module: LightningModule,
    bank: MemoryBank,
    keys: nn.Module,
    encoder: nn.Module,
    *,
    entries: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Drift of drawn entries of a bank: their samples are loaded anew and encoded in training mode.

    Args:
        trainer: in a fit.
        pl_module: the module in training.
        bank: the bank.
        keys: the encoder that made the entries.
        encoder: the embedder; the same as `keys` without a momentum encoder.
        entries: number of entries to draw.
        batch_size: rows on a rank of the training's own forward passes.
        seed: of the draw and of the order of the entries.

    Returns:
        Mean squared distances: `drift/bank` between the entries and their encodings by `keys`, also by quarters of
        their age as `drift/bank_age_q1` to `_q4`; `drift/floor` between two such encodings; with another `encoder` than
        `keys`, `drift/online` between the entries and its encodings. Nothing where fewer than two entries are known.

    Raises:
        InputError: if the batches' `index` is not the position in the training set; see also `encode_samples`.
    """
    generator = torch.Generator().manual_seed(seed)
    contents = BankContents(bank)
    slots_by_age = contents.draw(entries, generator)
    rows = torch.cat(slots_by_age)
    if len(rows) < 2:  # batch norm can do nothing with one
        return {}
    samples = contents.indices[rows]
    encodings = []
    for network in (keys, keys) if keys is encoder else (keys, keys, encoder):
        # In a new order each time, for batch norm sees the company in a batch.
        order = torch.randperm(len(rows), generator=generator)
        number = int(torch.randint(2**31, (), generator=generator))
        embeddings, _, indices = encode_samples(trainer, pl_module, network, samples[order], batch_size, number)
        if not torch.equal(indices.cpu(), samples[order]):
            raise InputError(
                "batch['index'] must be the position in the training set for entries of the memory bank to be encoded "
                "anew, but the sample at one position has another index; let the data set return the position that it "
                "is asked for, or set entries=0"
            )
        encodings.append(precise(embeddings).cpu()[order.argsort()])
    now, again = encodings[:2]
    stored_rows = contents.embeddings_of(rows)
    distances = _distances(now, stored_rows)
    bounds = list(itertools.accumulate(len(slots) for slots in slots_by_age))
    quarters = distances.tensor_split(bounds[:-1])
    figures = {
        "drift/bank": float(distances.mean()),
        **{f"drift/bank_age_q{number}": float(q.mean()) for number, q in enumerate(quarters, 1) if len(q)},
        "drift/floor": float(_distances(now, again).mean()),
    }
    if len(encodings) > 2:
        figures["drift/online"] = float(_distances(encodings[2], stored_rows).mean())
    return figures


def _distances(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).square().sum(dim=1)
