"""Every loss against a slow oracle: value and gradient in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.losses import (
    ContrastiveLoss,
    DirectWeightingLoss,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    PairWeightingLoss,
    curves,
)
from lightning_dml.losses.base import Reduction
from lightning_dml.losses.weighting import Weighting
from tests.losses import oracle
from tests.losses.oracle import batches, gradients
from tests.tolerances import rounding

Case = tuple[PairWeightingLoss, Callable[[Tensor, Tensor], Tensor], Any]

CASES: dict[str, Case] = {
    "contrastive": (ContrastiveLoss(0.3), oracle.contrastive(0.3), None),
    "contrastive, positive margin": (ContrastiveLoss(0.1, 0.8), oracle.contrastive(0.1, 0.8), None),
    "contrastive, mined": (
        ContrastiveLoss(0.3, miner=MultiSimilarityMiner(0.1)),
        oracle.contrastive(0.3),
        oracle.mine_relative(0.1),
    ),
    "multi-similarity": (MultiSimilarityLoss(), oracle.multi_similarity(2.0, 50.0, 0.5), None),
    "multi-similarity, mined": (
        MultiSimilarityLoss(2.0, 40.0, 0.4, miner=MultiSimilarityMiner(0.2)),
        oracle.multi_similarity(2.0, 40.0, 0.4),
        oracle.mine_relative(0.2),
    ),
    "direct": (
        DirectWeightingLoss(curves.Linear(0.9, above=False), curves.Exponential(5.0, 0.5)),
        oracle.direct(curves.Linear(0.9, above=False), curves.Exponential(5.0, 0.5)),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
@given(batch=batches(), block=st.sampled_from([1, 100, 2**20]))
def test_value_and_gradient_equal_the_textbook(name: str, batch: dict[str, Any], block: int) -> None:
    """The fast blocked code must be the published loss, whatever the block size."""
    loss, row_loss, mine = CASES[name]
    loss.block_bytes = block
    oracle.assert_textbook(loss, row_loss, batch, mine)


@given(batch=batches())
def test_reductions_divide_by_their_counts(batch: dict[str, Any]) -> None:
    """Another divisor acts as another learning rate and makes papers' settings unusable."""
    weights = []

    def count(sp: Tensor, sn: Tensor) -> Tensor:
        weights.append((len(sp), int((sn > 0.3).sum())))
        return oracle.contrastive(0.3)(sp, sn)

    total = torch.stack(oracle.oracle(count, **batch)).sum()
    pairs = sum(p + n for p, n in weights)
    active = sum(p + n > 0 for p, n in weights)
    divisors: dict[Reduction, int] = {"anchors": len(weights), "active_anchors": active, "pairs": pairs}
    for reduction, divisor in divisors.items():
        ours = ContrastiveLoss(0.3, reduction=reduction)(**batch)
        torch.testing.assert_close(ours, total / max(divisor, 1), rtol=1e-9, atol=1e-9)


class TextbookContrastive(Weighting):
    """Gives the row loss only, so that the engine has to differentiate the block."""

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The definition and nothing more."""
        return torch.where(positive, 1 - similarity, torch.where(negative, (similarity - 0.3).relu(), 0)).sum(dim=1)


@given(batch=batches())
def test_a_weighting_without_closed_form_is_differentiated(batch: dict[str, Any]) -> None:
    """Users may write only the loss and leave the gradient to autograd."""
    ours = gradients(PairWeightingLoss(TextbookContrastive()), batch)
    for value, expected in zip(ours, gradients(ContrastiveLoss(0.3), batch), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_step_and_constant_curves_give_the_contrastive_gradient() -> None:
    """Weight curves generalise known losses; here is one where both are known."""
    embeddings = F.normalize(torch.randn(12, 4, dtype=torch.float64), dim=1)
    batch = {"embeddings": embeddings, "labels": torch.arange(12) % 3}
    direct = gradients(DirectWeightingLoss(curves.Constant(), curves.Step(0.5)), batch)
    torch.testing.assert_close(direct[1], gradients(ContrastiveLoss(0.5), batch)[1])


def test_a_plain_function_is_a_curve() -> None:
    """A user can try a weight without writing a class for it."""
    embeddings = F.normalize(torch.randn(8, 4), dim=1)
    labels = torch.arange(8) % 2
    ours = DirectWeightingLoss(positive=torch.ones_like, negative=torch.exp)(embeddings, labels)
    expected = DirectWeightingLoss(curves.Constant(), curves.Exponential(1.0, 0.0))(embeddings, labels)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_weighted_in_float32(dtype: torch.dtype) -> None:
    """In half precision the exponentials overflow and the loss becomes infinite."""
    # e^{50 (1 - 0.5)} overflows float16.
    embeddings = torch.eye(4)[[0, 0, 0, 1]].to(dtype).requires_grad_()
    loss = MultiSimilarityLoss(base=0.0)(embeddings, torch.tensor([0, 1, 2, 3]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert embeddings.grad is not None and embeddings.grad.dtype == dtype
    assert torch.isfinite(embeddings.grad).all()
    expected = MultiSimilarityLoss(base=0.0)(embeddings.detach().double(), torch.tensor([0, 1, 2, 3]))
    # Similarities of 0 and 1 are exact; sums of few terms, exponentials and logarithms round, twelve of them at most.
    torch.testing.assert_close(loss.double(), expected, rtol=rounding(12), atol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    """Similarities rounded to bfloat16 would blur the pairs that the loss is to tell apart."""
    embeddings, labels = F.normalize(torch.randn(16, 8), dim=1), torch.arange(16) % 4
    with torch.autocast("cpu", torch.bfloat16):
        inside = MultiSimilarityLoss()(embeddings, labels)
    assert torch.equal(inside, MultiSimilarityLoss()(embeddings, labels))


def test_works_in_a_compiled_caller() -> None:
    """Users compile their training step; it must give the same gradient."""
    loss = ContrastiveLoss()

    @torch.compile(backend="eager")
    def step(x: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = loss(F.normalize(x, dim=1), labels) * 2
        return value

    x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    torch.autograd.backward(step(x, labels))
    compiled = x.grad
    x.grad = None
    (loss(F.normalize(x, dim=1), labels) * 2).backward()
    torch.testing.assert_close(compiled, x.grad)


def test_a_batch_without_pairs_has_zero_loss_and_a_gradient() -> None:
    """NaN from a division by no pairs would end the training, and no gradient would stop DDP."""
    embeddings = F.normalize(torch.randn(1, 4), dim=1).requires_grad_()
    loss = ContrastiveLoss()(embeddings, torch.tensor([0]))
    loss.backward()
    assert float(loss) == 0
    assert embeddings.grad is not None and torch.equal(embeddings.grad, torch.zeros(1, 4))


def test_no_block_outlives_its_rows() -> None:
    """Working memory follows the block, not N x M: 256 rows cost what 8 rows cost."""
    references, ref_labels = F.normalize(torch.randn(8192, 8), dim=1), torch.arange(8192) % 10
    largest = 0

    class Spy(TextbookContrastive):
        def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, similarity.numel() * similarity.element_size())
            return super().row_losses(similarity, positive, negative)

    loss = PairWeightingLoss(Spy(), block_bytes=2**18)
    loss(F.normalize(torch.randn(256, 8), dim=1), torch.arange(256) % 10, references, ref_labels)
    assert largest == 2**18


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ContrastiveLoss(margin=1.5), "margin.*1.5"),
        (lambda: ContrastiveLoss(reduction="mean"), "reduction.*anchors.*'mean'"),  # type: ignore[arg-type]
        (lambda: ContrastiveLoss(block_bytes=0), "block_bytes.*0"),
        (lambda: MultiSimilarityLoss(alpha=-1), "alpha.*-1"),
        (lambda: MultiSimilarityLoss(base=float("nan")), "base.*nan"),
        (lambda: MultiSimilarityMiner(float("inf")), "epsilon.*inf"),
        (lambda: DirectWeightingLoss(positive=1.0, negative=curves.Step()), "positive.*1.0"),  # type: ignore[arg-type]
        (lambda: ContrastiveLoss()(torch.zeros(3), torch.zeros(3).long()), r"embeddings.*\(3,\)"),
        (lambda: ContrastiveLoss()(torch.zeros(3, 2), torch.zeros(2).long()), r"labels.*\(3,\).*\(2,\)"),
        (lambda: ContrastiveLoss()(torch.zeros(3, 2), torch.zeros(3)), "labels must be integers.*float32"),
        (lambda: ContrastiveLoss()(torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(3, 2)), "ref_labels"),
        (
            lambda: ContrastiveLoss()(torch.zeros(3, 2), torch.zeros(3).long(), ref_labels=torch.zeros(3).long()),
            "ref_emb",
        ),
        (
            lambda: ContrastiveLoss()(
                torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(3, 4), torch.zeros(3).long()
            ),
            r"ref_emb must have shape \(N, 2\), got \(3, 4\)",
        ),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """Shapes that broadcast by accident give a number and a wrong training; they are refused."""
    from lightning_dml.errors import InputError

    with pytest.raises(InputError, match=words):
        call()
