"""Contents of a memory bank: entries drawn by age, its figures, and the pairs that a batch makes with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.labels import UNLABELLED
from lightning_dml.losses.labels import PairLabels
from lightning_dml.memory.bank import MemoryBank

QUARTERS = 4
COLUMNS = 8192  # rows of the bank at a time, so that the similarities of a batch stay small


class BankContents:
    """The slots of a bank, also of one that is spread over ranks, in their order and the same on every rank.

    Reading embeddings is a collective where the bank is spread over ranks.

    Args:
        bank: is not changed.

    Attributes:
        labels: (n,) int64 on the CPU, one for each slot in use on any rank.
        indices: (n,) int64 on the CPU.
        steps: (n,) int64 on the CPU.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank
        self.ranks = bank.share[1]
        self.labels, self.indices, self.steps = (column.cpu() for column in bank.store.columns)

    def draw(self, entries: int, generator: torch.Generator) -> list[Tensor]:
        """Random slots whose sample and age are known, about `entries` in four tensors, a quarter of the ages each.

        The quarter of the youngest entries comes first.
        """
        known = ((self.labels != UNLABELLED) & (self.indices >= 0) & (self.steps >= 0)).nonzero()[:, 0]
        by_age = known[self.steps[known].argsort(descending=True, stable=True)]
        counts = [entries // QUARTERS + (number < entries % QUARTERS) for number in range(QUARTERS)]
        return [
            quarter[torch.randperm(len(quarter), generator=generator)[:count]]
            for quarter, count in zip(by_age.tensor_split(QUARTERS), counts, strict=True)
        ]

    def embeddings_of(self, rows: Tensor) -> Tensor:
        """Stored embeddings of some slots, (len(rows), D) in float32 at least, on the CPU, the same on every rank."""
        if self.ranks == 1:
            return precise(self.bank.embeddings[rows.to(self.bank.device)]).cpu()
        owners = rows % self.ranks  # slot s is row s // ranks on rank s % ranks
        mine = rows[owners == distributed.rank()] // self.ranks
        counts = owners.bincount(minlength=self.ranks).tolist()
        gathered = distributed.gather_rows(self.bank.embeddings[mine.to(self.bank.device)], counts)
        return precise(gathered).cpu()[owners.argsort(stable=True).argsort()]


def bank_figures(bank: MemoryBank, step: int) -> dict[str, float]:
    """Figures of a bank: `fill`, the share of slots in use, `age_mean` and `age_max` in steps, and `classes`.

    The ages are there where the step of some entry is known.
    """
    summary = bank.summary(step)
    names = {"fill": "filled", "age_mean": "age_mean", "age_max": "age_max", "classes": "classes"}
    return {name: summary[its_name] for name, its_name in names.items() if its_name in summary}


def pair_figures(
    bank: MemoryBank, embeddings: Tensor, labels: Tensor, indices: Tensor, hard_above: float
) -> dict[str, float]:
    """Shares of hard negatives and of rows with a positive, of the batches of all ranks in the bank; a collective.

    A sample makes no pair with itself, and none with an empty slot.

    Args:
        bank: M entries, over all ranks.
        embeddings: (n, D) float of this rank's batch.
        labels: (n,) integers.
        indices: (n,) integer sample indices.
        hard_above: similarity above which a negative is hard.

    Returns:
        `hard_negatives`, the share of the negative pairs that are hard, and `positives`, the share of the labelled rows
        that have a positive; 0 where there are none.
    """
    sharded = bank.share[1] > 1
    if sharded:  # every rank compares all batches with its share of the bank
        counts = distributed.row_counts(len(labels), labels.device)
        batch = (embeddings, labels, indices)
        embeddings, labels, indices = (distributed.gather_rows(column, counts) for column in batch)
    embeddings = precise(embeddings)
    pairs = PairLabels(labels, bank.labels, indices, bank.indices)
    counts_of_pairs = torch.zeros(2, dtype=torch.int64, device=labels.device)  # hard negatives, negatives
    has_positive = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    for start in range(0, len(bank), COLUMNS):
        columns = slice(start, min(start + COLUMNS, len(bank)))
        positive, negative = pairs.masks(slice(0, len(labels)), columns)
        similarity = embeddings @ bank.embeddings[columns].to(embeddings).T
        counts_of_pairs += torch.stack(((negative & (similarity > hard_above)).sum(), negative.sum()))
        has_positive |= positive.any(dim=1)
    if sharded:
        has_positive = distributed.all_reduce_sum(has_positive).clamp_max(1)
    anchors = torch.stack((has_positive.sum(), (labels != UNLABELLED).sum()))
    if not sharded:
        anchors = distributed.all_reduce_sum(anchors)
    hard, negatives = distributed.all_reduce_sum(counts_of_pairs).tolist()
    with_positive, labelled = anchors.tolist()
    return {"hard_negatives": hard / max(1, negatives), "positives": with_positive / max(1, labelled)}


def precise(embeddings: Tensor) -> Tensor:
    """The same embeddings in float32 at least."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
