"""The pairs of a training step and the weights that its loss gives them, the same on every rank."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.losses import ObservedWeights, PairWeightingLoss, observed_weights
from lightning_dml.losses.calling import Rows, references_for
from lightning_dml.losses.inspection.observed import ObservedSide
from lightning_dml.memory import MemoryBank
from lightning_dml.memory.contents import BankContents
from lightning_dml.seeds import mixed_seed

SIDES = ("positive", "negative")
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
FIGURES = tuple(
    f"{side}_{name}"
    for side in SIDES
    for name in ("force", "similarity", *(f"similarity_{quantile}" for quantile in QUANTILES))
)


def gather_batch(rows: Rows, counts: list[int]) -> Rows:
    """The rows of all ranks in rank order; a collective."""
    return Rows(*(distributed.gather_rows(column, counts) for column in rows))


def drawn_from(bank: MemoryBank, limit: int, seed: int, step: int, device: torch.device) -> Rows:
    """At most `limit` entries of a bank, drawn evenly by seed and step; a collective where the bank is in shares.

    The draw is from the slots of the whole bank, so that it is the same however the bank is spread over ranks.
    """
    contents = BankContents(bank)
    slots = (contents.labels != UNLABELLED).nonzero()[:, 0]
    if len(slots) > limit:
        generator = torch.Generator().manual_seed(mixed_seed(seed, step))
        slots = slots[torch.randperm(len(slots), generator=generator)[:limit].sort().values]
    columns = contents.embeddings_of(slots), contents.labels[slots], contents.indices[slots]
    return Rows(*(column.to(device) for column in columns))


def observed_figures(
    loss: nn.Module, batch: Rows, references: Rows | None, counts: Sequence[int], factor: float
) -> tuple[dict[str, float], ObservedWeights | None]:
    """The figures of all pairs on every rank, and the weights that they are made of on rank zero, which alone computes.

    A collective; `factor` is that of the loss in the training, the other arguments are those of `observe`.
    """
    observed: ObservedWeights | None = None

    def look(_: Callable[[], None]) -> Tensor:
        nonlocal observed
        observed = observe(loss, batch, references, counts)
        return torch.tensor(list(figures_of(observed, factor).values()), dtype=torch.float64)

    values = distributed.on_first_rank(look).tolist()
    return dict(zip(FIGURES, values, strict=True)), observed


def observe(loss: nn.Module, batch: Rows, references: Rows | None, counts: Sequence[int]) -> ObservedWeights | None:
    """The weights of all pairs of the batches of all ranks, as the training's loss gives them; no collective.

    The loss itself is left alone, its state and what it draws included: a copy is asked. A loss of ours that keeps to
    its rank sees the batch of each rank by itself; its weights are divided by the ranks, as DDP takes the mean.

    Args:
        loss: one of ours or another library's.
        batch: N rows, of all ranks in rank order.
        references: of the bank; None for in-batch.
        counts: how many rows of the batch are each rank's.

    Returns:
        None where the loss gets no rows to work on.

    Raises:
        InputError: for a loss without weights of pairs.
    """
    if references is not None:
        references = references_for(loss, references, batch.indices)
    if not len(batch.labels) or (references is not None and not len(references.labels)):
        return None
    loss = copy.deepcopy(loss)
    apart = isinstance(loss, PairWeightingLoss) and not loss.gather and len(counts) > 1
    bounds = list(itertools.accumulate(counts))[:-1]
    parts = [Rows(*columns) for columns in zip(*(column.tensor_split(bounds) for column in batch), strict=True)]
    seen = [_observed(loss, part, references) for part in (parts if apart else [batch]) if len(part.labels)]
    return _merged(seen, len(counts)) if apart else seen[0]


def figures_of(observed: ObservedWeights | None, factor: float) -> dict[str, float]:
    """The figures by the names of `FIGURES`; NaN where a side has no pairs.

    Args:
        observed: all pairs.
        factor: of the loss in the training.
    """
    figures = dict.fromkeys(FIGURES, math.nan)
    for name in SIDES if observed is not None else ():
        assert observed is not None
        side = observed.positives if name == "positive" else observed.negatives
        figures[f"{name}_force"] = factor * side.force + 0.0  # not -0.0
        if side.pairs:
            values = side.similarity.numpy()
            figures[f"{name}_similarity"] = float(values.mean())
            levels = np.quantile(values, list(QUANTILES.values()))
            figures |= {f"{name}_similarity_{q}": float(level) for q, level in zip(QUANTILES, levels, strict=True)}
    return figures


def loss_of(pl_module: nn.Module, attribute: str) -> nn.Module:
    """The loss in an attribute of the module.

    Raises:
        InputError: if there is none.
    """
    loss = getattr(pl_module, attribute, None)
    if not isinstance(loss, nn.Module):
        content = "no such attribute" if not hasattr(pl_module, attribute) else f"a {type(loss).__name__} there"
        raise InputError(
            f"WeightCurveLogger asks the loss for the weights of pairs, but {type(pl_module).__name__} has {content}: "
            f"set loss (now {attribute!r}) to the attribute that holds the loss as an nn.Module, or take the callback "
            "out"
        )
    return loss


def factor_of(pl_module: nn.Module, attribute: str) -> float:
    """The factor that the module gives a loss, 1 where it has no such number."""
    value = getattr(pl_module, attribute, 1.0)
    return float(value) if isinstance(value, int | float) else 1.0


def _observed(loss: nn.Module, batch: Rows, references: Rows | None) -> ObservedWeights:
    if references is None:
        return observed_weights(loss, batch.embeddings, batch.labels, indices=batch.indices)
    return observed_weights(
        loss,
        batch.embeddings,
        batch.labels,
        references.embeddings,
        references.labels,
        indices=batch.indices,
        ref_indices=references.indices,
    )


def _merged(parts: Sequence[ObservedWeights], ranks: int) -> ObservedWeights:
    def side(sides: Sequence[ObservedSide]) -> ObservedSide:
        return ObservedSide(
            torch.cat([part.similarity for part in sides]),
            torch.cat([part.weight for part in sides]) / ranks,
            sum(part.force for part in sides) / ranks,
            sum(part.pairs for part in sides),
            torch.stack([part.counts for part in sides]).sum(dim=0),
        )

    return ObservedWeights(
        side([part.positives for part in parts]),
        side([part.negatives for part in parts]),
        parts[0].edges,
        sum(part.anchors for part in parts),
    )
