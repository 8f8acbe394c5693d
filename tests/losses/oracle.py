"""Slow, obvious pair losses in plain loops, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

RowLoss = Callable[[Tensor, Tensor], Tensor]


def pairs_of(
    i: int, labels: Tensor, ref_labels: Tensor, indices: Tensor | None, ref_indices: Tensor | None, in_batch: bool
) -> tuple[list[int], list[int]]:
    """Columns of the positives and of the negatives of anchor i."""
    positives: list[int] = []
    negatives: list[int] = []
    for j in range(len(ref_labels)):
        if in_batch and i == j:
            continue
        if indices is not None and ref_indices is not None and indices[i] >= 0 and indices[i] == ref_indices[j]:
            continue
        if labels[i] == -1 or ref_labels[j] == -1:
            continue
        (positives if labels[i] == ref_labels[j] else negatives).append(j)
    return positives, negatives


def oracle(
    row_loss: Callable[[Tensor, Tensor], Tensor],
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices: Tensor | None = None,
    ref_indices: Tensor | None = None,
    mine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """The loss of each anchor: `row_loss(similarities of positives, of negatives)`."""
    in_batch = ref_emb is None
    references = embeddings if ref_emb is None else ref_emb
    ref_labels = labels if ref_labels is None else ref_labels
    ref_indices = indices if in_batch else ref_indices
    rows = []
    for i in range(len(embeddings)):
        positives, negatives = pairs_of(i, labels, ref_labels, indices, ref_indices, in_batch)
        similarity = torch.stack([(embeddings[i] * reference).sum() for reference in references])
        sp, sn = similarity[positives], similarity[negatives]
        if mine is not None:
            sp, sn = mine(sp, sn)
        rows.append(row_loss(sp, sn))
    return rows


def nothing(sp: Tensor, sn: Tensor) -> Tensor:
    """No loss, with a graph."""
    return sp.sum() * 0 + sn.sum() * 0


def contrastive(margin: float, pos_margin: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The contrastive loss of one anchor, pair by pair."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        total = sp.sum() * 0 + sn.sum() * 0
        for s in sp:
            total = total + (1 - s if pos_margin is None else torch.clamp(pos_margin - s, min=0))
        for s in sn:
            total = total + torch.clamp(s - margin, min=0)
        return total

    return row


def multi_similarity(alpha: float, beta: float, base: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The multi-similarity loss of one anchor, as its paper writes it and without tricks for overflow."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        pull = torch.log(1 + torch.exp(-alpha * (sp - base)).sum()) / alpha
        push = torch.log(1 + torch.exp(beta * (sn - base)).sum()) / beta
        return pull + push

    return row


def direct(
    positive: Callable[[Tensor], Tensor], negative: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss whose gradient is the two weight functions, since the weights are held constant."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        return (negative(sn.detach()) * sn).sum() - (positive(sp.detach()) * sp).sum()

    return row


def mine_relative(epsilon: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The multi-similarity mining of one anchor: pairs harder than the hardest of the other kind less epsilon."""

    def mine(sp: Tensor, sn: Tensor) -> tuple[Tensor, Tensor]:
        if len(sp) == 0 or len(sn) == 0:
            return sp[:0], sn[:0]
        kept_n = sn[sn.detach() > sp.detach().min() - epsilon]
        kept_p = sp[sp.detach() < sn.detach().max() + epsilon]
        if len(kept_p) == 0 or len(kept_n) == 0:
            return sp[:0], sn[:0]
        return kept_p, kept_n

    return mine


@st.composite
def batches(draw: st.DrawFn, duplicates: bool = True) -> dict[str, Tensor | None]:
    """Anchors and, maybe, references; classes of one sample, copies of a sample, unlabelled rows, duplicates."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, m, dim = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(2, 5))
    classes = draw(st.integers(1, 4))

    def rows(count: int) -> tuple[Tensor, Tensor]:
        embeddings = F.normalize(torch.randn(count, dim, dtype=torch.float64, generator=generator), dim=1)
        return embeddings, torch.randint(-1, classes, (count,), generator=generator)

    embeddings, labels = rows(n)
    if duplicates and n > 1 and draw(st.booleans()):
        embeddings[1] = embeddings[0]
    batch: dict[str, Tensor | None] = {"embeddings": embeddings, "labels": labels}
    if draw(st.booleans()):
        batch["indices"] = torch.randint(-1, 6, (n,), generator=generator)
    if draw(st.booleans()):
        batch["ref_emb"], batch["ref_labels"] = rows(m)
        if "indices" in batch:
            batch["ref_indices"] = torch.randint(-1, 6, (m,), generator=generator)
    return batch


def gradients(function: Callable[..., Tensor], batch: dict[str, Any]) -> list[Tensor]:
    """Value, gradient of the anchors and, where there are any, of the references."""
    batch = {
        key: value.clone() if key.endswith("emb") or key == "embeddings" else value for key, value in batch.items()
    }
    leaves = [batch[key].requires_grad_() for key in ("embeddings", "ref_emb") if key in batch]
    value = function(**batch)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_textbook(
    loss: Callable[..., Tensor],
    row_loss: Callable[[Tensor, Tensor], Tensor],
    batch: dict[str, Any],
    mine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Value and gradients of `loss` are those of the mean of `row_loss` over the anchors."""

    def textbook(**kwargs: Any) -> Tensor:
        rows = oracle(row_loss, **kwargs, mine=mine)
        nothing = 0 * kwargs.get("ref_emb", torch.zeros(())).sum()
        value: Tensor = torch.stack(rows).sum() / len(rows) + nothing
        return value

    for ours, expected in zip(gradients(loss, batch), gradients(textbook, batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
