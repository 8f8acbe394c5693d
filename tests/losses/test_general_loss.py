"""`GeneralPairWeightingLoss`: each mining with each weighting, against loops; known losses found again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, GeneralPairWeightingLoss, MultiSimilarityLoss, general_loss
from lightning_dml.losses.weighting.distance import MIN_DISTANCE
from lightning_dml.losses.weighting.general import Normalization, ShapeName
from tests.losses import oracle
from tests.losses.oracle import batches, gradients

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda v: 1.0,
    "linear": lambda v: max(v, 0.0),
    "power": lambda v: max(v, 0.0) ** 3,
    "exponential": lambda v: math.exp(4 * v),
    "sigmoid": lambda v: 1 / (1 + math.exp(-4 * v)),
    "softmax": lambda v: math.exp(4 * v),
    "softmax_with_one": lambda v: math.exp(4 * v),
}


def side(name: str, normalization: str, violations: list[float]) -> list[float]:
    """The weights of one side of one anchor."""
    weights = [SHAPES[name](v) for v in violations]
    if name.startswith("softmax"):
        total = sum(weights) + (name == "softmax_with_one")
        weights = [w / total for w in weights]
    divisor = {
        "none": 1.0,
        "mean": len(weights),
        "sum": sum(weights),
        "nonzero": sum(w != 0 for w in weights),
    }[normalization]
    return [w / divisor if divisor else w for w in weights]


def textbook(positive: str, negative: str, normalization: str, measure: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Row loss with detached weights, pair by pair."""

    def row(sp: Tensor, sn: Tensor) -> Tensor:
        def d(s: Tensor) -> Tensor:
            return (2 - 2 * s).clamp_min(MIN_DISTANCE**2).sqrt()

        total = 0 * sp.sum() + 0 * sn.sum()
        if measure == "similarity":
            pulls = side(positive, normalization, [0.8 - float(s.detach()) for s in sp])
            pushes = side(negative, normalization, [float(s.detach()) - 0.1 for s in sn])
            by_similarity: Tensor = (
                total
                + sum(w * s for w, s in zip(pushes, sn, strict=True))
                - sum(w * s for w, s in zip(pulls, sp, strict=True))
            )
            return by_similarity
        pulls = side(positive, normalization, [float(d(s.detach())) - 0.8 for s in sp])
        pushes = side(negative, normalization, [0.1 - float(d(s.detach())) for s in sn])
        return (
            total
            + sum(w * d(s) for w, s in zip(pulls, sp, strict=True))
            - sum(w * d(s) for w, s in zip(pushes, sn, strict=True))
        )

    return row


CASES = [
    *itertools.product(SHAPES, ["linear"], ["none"], ["similarity"]),
    *itertools.product(["linear"], SHAPES, ["none"], ["similarity"]),
    *itertools.product(["constant", "softmax"], ["linear", "exponential"], get_args(Normalization), ["similarity"]),
    *itertools.product(["sigmoid"], SHAPES, ["mean"], ["distance"]),
]


@pytest.mark.parametrize(("positive", "negative", "normalization", "measure"), CASES)
@given(batch=batches(duplicates=False))
def test_value_and_gradient_equal_the_textbook(
    positive: Any, negative: Any, normalization: Any, measure: Any, batch: dict[str, Any]
) -> None:
    """A weight that is a little off trains as well, and nobody would notice."""
    settings: dict[str, float] = {"rate": 4.0, "exponent": 3.0}
    loss = GeneralPairWeightingLoss(
        "none",
        positive,
        negative,
        normalization=normalization,
        measure=measure,
        positive_args={**settings, "threshold": 0.8},
        negative_args={**settings, "threshold": 0.1},
    )
    row_loss = textbook(positive, negative, normalization, measure)
    oracle.assert_textbook(loss, row_loss, batch)


def batch(count: int = 24) -> dict[str, Any]:
    """An ordinary batch."""
    embeddings = F.normalize(torch.randn(count, 6, dtype=torch.float64), dim=1)
    return {"embeddings": embeddings, "labels": torch.arange(count) % 6}


def test_known_losses_are_found_again() -> None:
    """The paper's point: named losses are points of this grid."""
    data = batch()
    step = GeneralPairWeightingLoss("threshold", "constant", "constant", mining_args={"negative_above": 0.2})
    torch.testing.assert_close(gradients(step, data)[1], gradients(ContrastiveLoss(0.2), data)[1])
    softmax = GeneralPairWeightingLoss(
        "none",
        "softmax_with_one",
        "softmax_with_one",
        positive_args={"rate": 2.0, "threshold": 0.5},
        negative_args={"rate": 50.0, "threshold": 0.5},
    )
    torch.testing.assert_close(gradients(softmax, data)[1], gradients(MultiSimilarityLoss(), data)[1])


@pytest.mark.parametrize("mining", get_args(general_loss.MiningName))
@pytest.mark.parametrize("shape", get_args(ShapeName))
def test_each_mining_goes_with_each_weighting(mining: Any, shape: Any) -> None:
    """A study sweeps the whole grid; no corner of it may fail or be dead."""
    settings = {"distance_weighted": {"dim": 6}}.get(mining)
    loss = GeneralPairWeightingLoss(mining, shape, shape, mining_args=settings)
    _, gradient = gradients(loss, batch())
    assert torch.isfinite(gradient).all()
    assert gradient.any()


def test_float32_exponentials_do_not_overflow() -> None:
    """e^(50 x 1.5) is beyond float32; a softmax of it is not."""
    embeddings = torch.eye(4)[[0, 0, 0, 1]].requires_grad_()
    for name in ("softmax", "softmax_with_one"):
        steep = {"rate": 90.0, "threshold": -0.5}
        loss = GeneralPairWeightingLoss("none", name, name, positive_args=steep, negative_args=steep)
        (gradient,) = torch.autograd.grad(loss(embeddings, torch.tensor([0, 0, 1, 1])), embeddings)
        assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mining": "hardest"}, "mining must be one of none, threshold.*'hardest'"),
        ({"positive": "cubic"}, "positive: weighting must be one of constant.*'cubic'"),
        ({"negative": "Step"}, "negative: weighting.*'Step'"),
        ({"normalization": "max"}, "normalization.*'max'"),
        ({"measure": "angle"}, "measure.*'angle'"),
        ({"negative_args": {"temperature": 1.0}}, "negative_args knows.*'temperature'"),
        ({"positive_args": {"rate": -1.0}}, "positive: rate must be .* greater than 0, got -1"),
        ({"mining_args": {"margin": 1.0}}, "mining_args do not fit MultiSimilarityMiner.*margin"),
    ],
)
def test_wrong_input_is_named(settings: dict[str, Any], words: str) -> None:
    """A misspelt name in a study's config must stop it before its first run."""
    with pytest.raises(InputError, match=words):
        GeneralPairWeightingLoss(**settings)
