"""The engine beside the losses: tiles, learnable parameters, statistics of rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, PairWeightingLoss, engine
from lightning_dml.losses.weighting import Weighting
from tests.losses.cases import LOSSES
from tests.losses.oracle import gradients
from tests.tolerances import largest, rounding

# The longest chain of operations in a loss of `data`: the six products of a similarity, whose rounding the steepest
# exponential of LOSSES multiplies by its rate of 10, then the sums over an anchor's 50 references and over 21 anchors.
CHAIN = 10 * 6 + 50 + 21


def bound(name: str, right: Tensor) -> float:
    """The distance at which two orders of the same sums may lie.

    The sum over an anchor's triplets, up to 400 of similarities up to 1, is a difference of sums at most four times
    as large as itself.
    """
    return rounding(CHAIN, largest(right) * (4 if "triplet" in name else 1), right.dtype)


def data(anchors: int = 21, references: int = 50) -> dict[str, Any]:
    """A batch against references that hold some of its samples."""
    return {
        "embeddings": F.normalize(torch.randn(anchors, 6, dtype=torch.float64), dim=1),
        "labels": torch.arange(anchors) % 4,
        "ref_emb": F.normalize(torch.randn(references, 6, dtype=torch.float64), dim=1),
        "ref_labels": torch.arange(references) % 5,
        "indices": torch.arange(anchors),
        "ref_indices": torch.arange(references) + 9,
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("in_batch", [False, True])
def test_any_block_gives_the_same(name: str, in_batch: bool) -> None:
    """A block size is a matter of memory; it must never be one of results."""
    batch, loss = data(), LOSSES[name]
    if in_batch:
        batch = {key: value for key, value in batch.items() if not key.startswith("ref_")}
    results = []
    for block in (1, 8, 100, 1000, 2**24):
        loss.block_bytes = block
        results.append(gradients(loss, batch))
    loss.block_bytes = 2**24
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=bound(name, first))


class Bounded(Weighting):
    """Contrastive on negatives, with a margin that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Textbook formula."""
        return ((similarity - self.margin).relu() * negative).square().sum(dim=1)


def test_parameters_of_a_weighting_are_trained() -> None:
    """A margin's beta that gets no gradient would silently stay where it started."""
    batch, loss = data(), PairWeightingLoss(Bounded(), block_bytes=500)
    loss(**batch).backward()
    similarity = batch["embeddings"] @ batch["ref_emb"].T
    margin = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    negative = batch["labels"][:, None] != batch["ref_labels"]
    negative &= batch["indices"][:, None] != batch["ref_indices"]
    (((similarity - margin).relu() * negative).square().sum() / 21).backward()
    weighting = loss.weighting
    assert isinstance(weighting, Bounded)
    torch.testing.assert_close(weighting.margin.grad, margin.grad)
    assert weighting.unused.grad is not None and torch.equal(weighting.unused.grad, torch.zeros(3, dtype=torch.float64))


class Coupled(Weighting):
    """Pulls positives harder where both have many similar negatives: rows need each other's statistics."""

    def row_statistics(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Sum of the similarities of the negatives."""
        return (similarity * negative).sum(dim=1)

    def forward(
        self, similarity: Tensor, positive: Tensor, negative: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The statistics of both ends as the row loss."""
        assert statistics is not None
        own, others = statistics
        return ((own[:, None] + others) * positive).sum(dim=1), torch.zeros_like(similarity)


def test_rows_get_the_statistics_of_all_rows() -> None:
    """The original lifted structure loss couples the two ends of a positive pair."""
    batch = {name: value for name, value in data().items() if name in ("embeddings", "labels")}
    same = batch["labels"][:, None] == batch["labels"]
    own = ((batch["embeddings"] @ batch["embeddings"].T) * ~same).sum(dim=1)
    expected = ((own[:, None] + own) * same.fill_diagonal_(False)).sum() / 21
    for block in (1, 400, 2**20):
        torch.testing.assert_close(PairWeightingLoss(Coupled(), block_bytes=block)(**batch), expected)


def test_coupled_rows_refuse_references() -> None:
    """A memory's rows are no anchors, so their statistics are not known."""
    with pytest.raises(InputError, match=r"Coupled.*in-batch only"):
        PairWeightingLoss(Coupled())(**data())


def unit(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(rows, 4, dtype=torch.float64), dim=1).to(dtype)


def test_rows_that_are_not_unit_are_refused() -> None:
    """Similarities beyond [-1, 1] make every margin meaningless, and the training only looks bad."""
    labels = torch.arange(6) % 2
    with pytest.raises(InputError, match=r"embeddings must have rows of unit length, but 6 of 6.*validate"):
        ContrastiveLoss()(3 * unit(6), labels)
    with pytest.raises(InputError, match=r"ref_emb must have rows of unit length"):
        ContrastiveLoss()(unit(6), labels, 3 * unit(6), labels)
    assert torch.isfinite(ContrastiveLoss(validate=False)(3 * unit(6), labels))


def test_half_precision_rows_count_as_unit() -> None:
    """A bank in bfloat16 holds rows whose length is off by a hundredth."""
    labels = torch.arange(64) % 2
    assert torch.isfinite(ContrastiveLoss()(unit(64, torch.bfloat16), labels, unit(64, torch.float16), labels))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    """A NaN loss tells nobody where it came from."""
    rows, labels = unit(900), torch.arange(900) % 2
    rows[7, 2] = value
    with pytest.raises(InputError, match=r"embeddings has NaN or infinite values in 1 of 900 rows, the first is row 7"):
        ContrastiveLoss()(rows, labels)
    with pytest.raises(InputError, match=r"ref_emb has NaN or infinite values in 1 of 900"):
        MultiSimilarityLoss()(unit(900), labels, rows, labels)  # row 7 is not in the sample; the loss shows it


def test_empty_slots_of_a_bank_are_no_error() -> None:
    """A refused row leaves a slot of zeros with label -1, which takes part in nothing."""
    labels, references = torch.arange(6) % 2, unit(6)
    expected = ContrastiveLoss(0.1)(unit_rows := unit(6), labels, references[:5], labels[:5])
    references[5] = 0
    assert torch.equal(ContrastiveLoss(0.1)(unit_rows, labels, references, torch.tensor([0, 1, 0, 1, 0, -1])), expected)


def test_half_precision_gradients_are_scaled_before_they_are_rounded() -> None:
    """The sum over 100,000 pairs is beyond float16; its mean is not."""
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float16, requires_grad=True)
    references = torch.tensor([[0.8, 0.6]]).expand(100_000, 2)
    loss = ContrastiveLoss(0.5, reduction="pairs")
    loss(anchor, torch.tensor([0]), references, torch.ones(100_000, dtype=torch.int64)).backward()
    torch.testing.assert_close(anchor.grad, torch.tensor([[0.8, 0.6]], dtype=torch.float16))


def test_another_librarys_tuple_of_indices_is_named() -> None:
    """Its third argument is a tuple of pairs; a message on missing labels would mislead."""
    with pytest.raises(InputError, match=r"ref_emb must be a torch.Tensor, got tuple.*miner"):
        ContrastiveLoss()(unit(4), torch.arange(4), (torch.arange(4),))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_bank_is_converted_part_by_part(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who halves the memory of a bank must not get a float32 copy of it in every step, nor other numbers."""
    monkeypatch.setattr(engine, "_CACHE_BYTES", 6 * 4 * 7)  # parts of seven references
    batch = {key: value.float() if value.is_floating_point() else value for key, value in data().items()}
    narrow = batch.pop("ref_emb").to(dtype)
    loss = copy.deepcopy(LOSSES[name]).float()
    loss.validate = False
    results = []
    for references in (narrow, narrow.float()):
        anchors = batch["embeddings"].clone().requires_grad_()
        value = loss(**{**batch, "embeddings": anchors, "ref_emb": references})
        results.append((value.detach(), *torch.autograd.grad(value, anchors)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=bound(name, right))
