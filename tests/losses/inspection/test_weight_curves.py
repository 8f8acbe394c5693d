"""Weight curves against closed forms, against weights of pairs in embeddings, and what a batch is seen to have."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml import losses
from lightning_dml.errors import InputError
from lightning_dml.losses import (
    Context,
    ContrastiveLoss,
    DirectWeightingLoss,
    FromLoss,
    GeneralPairWeightingLoss,
    MultiSimilarityLoss,
    context_free,
    curves,
    observed_weights,
    pair_weights,
    weight_curve,
)
from lightning_dml.losses.inspection.weight_curves import ALONE
from tests.losses.cases import OURS, THEIRS

Weight = Callable[[float], float]


def sigmoid(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x))


def distance(s: float) -> float:
    """Distance of two unit vectors at a similarity."""
    return math.sqrt(2 - 2 * s)


def general(name: Any, threshold: float = 0.2, measure: Any = "similarity") -> GeneralPairWeightingLoss:
    """One shape on both sides."""
    shape = {"threshold": threshold, "rate": 4.0, "exponent": 3.0}
    return GeneralPairWeightingLoss("none", name, name, measure=measure, positive_args=shape, negative_args=shape)


def general_on_distance(name: str, weight: Weight) -> tuple[nn.Module, Weight, Weight]:
    """A shape over violations of a distance of 0.8, and both curves: dd/dS is -1 / d."""
    return (
        general(name, 0.8, "distance"),
        lambda s: weight(distance(s) - 0.8) / distance(s),
        lambda s: weight(0.8 - distance(s)) / distance(s),
    )


SHAPES: dict[str, Weight] = {
    "constant": lambda v: 1.0,
    "linear": lambda v: max(v, 0.0),
    "power": lambda v: max(v, 0.0) ** 3,
    "exponential": lambda v: math.exp(4 * v),
    "sigmoid": lambda v: sigmoid(4 * v),
}
FREE: dict[str, tuple[nn.Module, Weight, Weight]] = {
    "contrastive": (ContrastiveLoss(0.3), lambda s: 1.0, lambda s: float(s > 0.3)),
    "contrastive, both margins": (ContrastiveLoss(0.3, 0.6), lambda s: float(s < 0.6), lambda s: float(s > 0.3)),
    "contrastive on distance": (
        ContrastiveLoss(0.9, 0.4, measure="distance"),
        lambda s: (distance(s) > 0.4) / distance(s),
        lambda s: (distance(s) < 0.9) / distance(s),
    ),
    "contrastive on squared distance": (
        ContrastiveLoss(1.1, measure="squared_distance"),
        lambda s: 1.0,
        lambda s: max(1.1 / distance(s) - 1, 0.0),
    ),
    "margin": (
        losses.MarginLoss(0.2, 1.2),
        lambda s: (distance(s) > 1.0) / distance(s),
        lambda s: (distance(s) < 1.4) / distance(s),
    ),
    "margin, learned": (
        losses.MarginLoss(0.2, 1.0, learn_beta=True).double(),
        lambda s: (distance(s) > 0.8) / distance(s),
        lambda s: (distance(s) < 1.2) / distance(s),
    ),
    "binomial": (
        losses.BinomialDevianceLoss(2.0, 10.0, 0.4),
        lambda s: 2 * sigmoid(2 * (0.4 - s)),
        lambda s: 10 * sigmoid(10 * (s - 0.4)),
    ),
    "thresholds": (
        ContrastiveLoss(-1.0, miner=losses.ThresholdMiner(0.7, 0.1)),
        lambda s: float(s < 0.7),
        lambda s: float(s > 0.1),
    ),
    "direct, constant and step": (
        DirectWeightingLoss(curves.Constant(0.7), curves.Step(0.2, 3.0)),
        lambda s: 0.7,
        lambda s: 3.0 * (s > 0.2),
    ),
    "direct, linear and power": (
        DirectWeightingLoss(curves.Linear(0.9, 2.0, above=False), curves.Power(0.1, 3.0, 2.0)),
        lambda s: 2 * max(0.9 - s, 0.0),
        lambda s: 2 * max(s - 0.1, 0.0) ** 3,
    ),
    "direct, exponential and sigmoid": (
        DirectWeightingLoss(curves.Exponential(-3.0, 0.2, 0.5), curves.Sigmoid(8.0, 0.3, 2.0)),
        lambda s: 0.5 * math.exp(-3 * (s - 0.2)),
        lambda s: 2 * sigmoid(8 * (s - 0.3)),
    ),
    "direct, points and a function": (
        DirectWeightingLoss(curves.PiecewiseLinear([(-1.0, 0.0), (1.0, 4.0)]), torch.exp),
        lambda s: 2 * (s + 1),
        math.exp,
    ),
    "direct, halves": (
        DirectWeightingLoss(FromLoss(losses.BinomialDevianceLoss(2.0, 10.0, 0.4)), FromLoss(ContrastiveLoss(0.3))),
        lambda s: 2 * sigmoid(2 * (0.4 - s)),
        lambda s: float(s > 0.3),
    ),
    "general, constant": (general("constant"), lambda s: 1.0, lambda s: 1.0),
    "general, linear": (general("linear"), lambda s: max(0.2 - s, 0), lambda s: max(s - 0.2, 0)),
    "general, power": (general("power"), lambda s: max(0.2 - s, 0) ** 3, lambda s: max(s - 0.2, 0) ** 3),
    "general, exponential": (
        general("exponential"),
        lambda s: math.exp(4 * (0.2 - s)),
        lambda s: math.exp(4 * (s - 0.2)),
    ),
    "general, sigmoid": (general("sigmoid"), lambda s: sigmoid(4 * (0.2 - s)), lambda s: sigmoid(4 * (s - 0.2))),
    **{f"general on distance, {name}": general_on_distance(name, weight) for name, weight in SHAPES.items()},
    "ranked list's pairs": (
        ContrastiveLoss(-1.0, miner=losses.RankedListMiner(margin=0.4, alpha=1.2)),
        lambda s: float(distance(s) > 0.8),
        lambda s: float(distance(s) < 1.2),
    ),
    "another library's": (
        pml.ContrastiveLoss(1.0, 0.3, distance=CosineSimilarity(), reducer=MeanReducer()),
        lambda s: 1.0,
        lambda s: float(s > 0.3),
    ),
}
similarities = st.lists(st.floats(-0.999, 0.999), min_size=1, max_size=8)


@pytest.mark.parametrize("name", FREE)
@settings(max_examples=25)
@given(points=similarities)
def test_a_context_free_curve_is_its_closed_form(name: str, points: list[float]) -> None:
    """Everything the study concludes from a curve rests on it being the loss's."""
    loss, positive, negative = FREE[name]
    thresholds = (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9, 1 - 0.9**2 / 2, 1 - 0.8**2 / 2, 1 - 1.4**2 / 2, 1 - 1.2**2 / 2)
    points = [s for s in points if all(abs(s - edge) > 1e-9 for edge in (*thresholds, 0.5, 0.92, 1 - 1.1**2 / 2))]
    pull, push = weight_curve(loss, torch.tensor(points, dtype=torch.float64), context=ALONE)
    torch.testing.assert_close(
        pull, torch.tensor([positive(s) for s in points], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        push, torch.tensor([negative(s) for s in points], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", FREE)
def test_a_context_free_loss_needs_no_context(name: str) -> None:
    """Left out, the context must not divide a curve by pairs that nobody spoke of."""
    loss = FREE[name][0]
    points = torch.linspace(-0.9, 0.95, 7)
    assert context_free(loss)
    for default, alone in zip(weight_curve(loss, points), weight_curve(loss, points, context=ALONE), strict=True):
        assert torch.equal(default, alone)


Row = Callable[[float, Sequence[float], Sequence[float]], float]


def lse(values: Sequence[float]) -> float:
    """Log-sum-exp, as written."""
    return math.log(sum(map(math.exp, values)))


# w+ of a positive s with the other positives P and the negatives N; w- of a negative s with positives P, other N.
BOUND: dict[str, tuple[losses.PairWeightingLoss, Row, Row]] = {
    "multi-similarity": (
        MultiSimilarityLoss(2.0, 10.0, 0.4),
        lambda s, P, N: math.exp(-2 * (s - 0.4)) / (1 + sum(math.exp(-2 * (p - 0.4)) for p in [s, *P])),
        lambda s, P, N: math.exp(10 * (s - 0.4)) / (1 + sum(math.exp(10 * (n - 0.4)) for n in [s, *N])),
    ),
    "triplet": (
        losses.TripletLoss(0.15),
        lambda s, P, N: sum(n > s - 0.15 for n in N),
        lambda s, P, N: sum(p < s + 0.15 for p in P),
    ),
    "triplet, soft": (
        losses.TripletLoss(scale=5.0),
        lambda s, P, N: sum(sigmoid(5 * (n - s)) for n in N),
        lambda s, P, N: sum(sigmoid(5 * (s - p)) for p in P),
    ),
    "n-pair": (
        losses.NPairLoss(4.0),
        lambda s, P, N: 4 * (1 - math.exp(4 * s - lse([4 * x for x in (s, *N)]))) / (1 + len(P)),
        lambda s, P, N: sum(4 * math.exp(4 * s - lse([4 * x for x in (p, s, *N)])) for p in P) / len(P),
    ),
    "supcon": (
        losses.SupConLoss(0.2),
        lambda s, P, N: (1 / (1 + len(P)) - math.exp(s / 0.2 - lse([x / 0.2 for x in (s, *P, *N)]))) / 0.2,
        lambda s, P, N: math.exp(s / 0.2 - lse([x / 0.2 for x in (s, *P, *N)])) / 0.2,
    ),
    "lifted": (
        losses.LiftedStructureLoss(measure="similarity", margin=3.0, alpha=2.0, beta=4.0),
        lambda s, P, N: math.exp(-2 * s - lse([-2 * p for p in (s, *P)])),
        lambda s, P, N: math.exp(4 * s - lse([4 * n for n in (s, *N)])),
    ),
    "binomial": (
        losses.BinomialDevianceLoss(2.0, 10.0, 0.4),
        lambda s, P, N: 2 * sigmoid(2 * (0.4 - s)) / (1 + len(P)),
        lambda s, P, N: 10 * sigmoid(10 * (s - 0.4)) / (1 + len(N)),
    ),
}


@pytest.mark.parametrize("name", BOUND)
@settings(max_examples=25)
@given(
    points=similarities,
    positives=st.lists(st.floats(-1, 1), min_size=1, max_size=4),
    negatives=st.lists(st.floats(-1, 1), min_size=1, max_size=6),
)
def test_a_curve_at_a_context_is_its_closed_form(
    name: str, points: list[float], positives: list[float], negatives: list[float]
) -> None:
    """The context is part of the answer; a curve that forgot a pair of it would be of another anchor."""
    loss, positive, negative = BOUND[name]
    edges = [value + margin for value in (*positives, *negatives) for margin in (-0.15, 0.15)]
    points = [s for s in points if all(abs(s - edge) > 1e-9 for edge in edges)]
    curve = weight_curve(loss, torch.tensor(points, dtype=torch.float64), context=Context(positives, negatives))
    for weights, expected in zip(curve, (positive, negative), strict=True):
        right = torch.tensor([expected(s, positives, negatives) for s in points], dtype=torch.float64)
        torch.testing.assert_close(weights, right, rtol=1e-9, atol=1e-9)


def embedded(similarity: float, positive: bool, context: Context) -> dict[str, Tensor]:
    """An anchor and references with the similarities of a row."""
    row = torch.tensor([similarity, *context.positives, *context.negatives], dtype=torch.float64)
    references = torch.cat((row[:, None], torch.diag((1 - row**2).sqrt())), dim=1)
    labels = [0 if positive else 1, *[0] * len(context.positives), *[1] * len(context.negatives)]
    anchor = torch.eye(1, references.shape[1], dtype=torch.float64)
    return {
        "embeddings": anchor,
        "labels": torch.tensor([0]),
        "ref_emb": references,
        "ref_labels": torch.tensor(labels),
    }


DRAWN = {name for name, loss in OURS.items() if any(isinstance(m, losses.mining.SampledMiner) for m in loss.modules())}


@pytest.mark.parametrize(
    "name", [*(name for name in OURS if name not in DRAWN), *(f"{name} of another library" for name in THEIRS)]
)
def test_every_curve_is_what_pair_weights_sees(name: str) -> None:
    """One weight, two ways to look at it; a figure of curve and scatter shows both."""
    other = name.removesuffix(" of another library")
    loss = THEIRS[other]() if other != name else OURS[name]
    # Numbers whose differences are no loss's margin, so that the last digit of a product decides on no pair.
    context = Context((0.551, 0.207, 0.803), (-0.302, 0.113, 0.468, 0.617))
    points = torch.tensor([-0.705, 0.053, 0.309, 0.526, 0.732, 0.941], dtype=torch.float64)
    pull, push = weight_curve(loss, points, context=context)
    if name != "nca of another library":  # which gives a single anchor no loss
        right = [
            [pair_weights(loss, **embedded(float(s), side, context))[0, 0] for s in points] for side in (True, False)
        ]
        torch.testing.assert_close(pull, -torch.stack(right[0]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(push, torch.stack(right[1]), rtol=1e-9, atol=1e-9)
    assert pull.any() or push.any()


def test_another_librarys_loss_has_the_closed_form() -> None:
    """Measuring a loss whose curve is known must give that curve."""
    points, context = torch.linspace(-0.95, 0.95, 9), Context()
    ours = weight_curve(MultiSimilarityLoss(2.0, 10.0, 0.5), points, context=context)
    theirs = weight_curve(pml.MultiSimilarityLoss(2.0, 10.0, 0.5), points, context=context)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    both = DirectWeightingLoss(FromLoss(pml.MultiSimilarityLoss(2.0, 10.0, 0.5)), curves.Step(0.2))
    pull, push = weight_curve(both, points, context=context)
    torch.testing.assert_close(pull, ours[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(push, (points > 0.2).double())


@pytest.mark.parametrize(
    "loss",
    [
        losses.TripletLoss(),
        losses.NTXentLoss(),
        losses.CircleLoss(),
        losses.FastAPLoss(),
        losses.RankedListLoss(),
        losses.NCALoss(),
        losses.LiftedStructureLoss(measure="distance"),
        ContrastiveLoss(miner=losses.MultiSimilarityMiner()),
        ContrastiveLoss(miner=losses.TopKMiner(None, 100)),
        GeneralPairWeightingLoss("none", "constant", "softmax"),
        DirectWeightingLoss(FromLoss(losses.SupConLoss()), curves.Step()),
        DirectWeightingLoss(curves.Constant(), FromLoss(pml.NTXentLoss())),
        pml.TripletMarginLoss(),
    ],
    ids=repr,
)
def test_a_loss_on_rows_is_not_context_free(loss: nn.Module) -> None:
    """A curve without its context would be shown as if there were but one."""
    assert not context_free(loss)
    points = torch.linspace(-0.9, 0.9, 5)
    for default, stated in zip(weight_curve(loss, points), weight_curve(loss, points, context=Context()), strict=True):
        assert torch.equal(default, stated)


def test_a_miner_that_draws_gives_the_mean_and_is_put_back() -> None:
    """Looking must not change what training draws, and one draw is no curve."""
    loss = ContrastiveLoss(miner=losses.SemiHardMiner(measure="distance", seed=3))
    state = copy.deepcopy(loss.state_dict())
    context = Context((0.6, 0.6, 0.6), (0.1, 0.2))
    pull, push = weight_curve(loss, torch.linspace(-0.5, 0.5, 21), context=context)
    assert loss.state_dict() == state
    torch.testing.assert_close(pull, torch.full_like(pull, 1 / 4), rtol=0, atol=0.12)  # one of four is drawn
    assert torch.equal(pull, weight_curve(loss, torch.linspace(-0.5, 0.5, 21), context=context)[0])
    assert not push[:20].any()  # contrastive above 0.5 only


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: weight_curve(ContrastiveLoss(), torch.ones(2, 2)), r"similarity must be finite floats.*\(2, 2\)"),
        (lambda: weight_curve(ContrastiveLoss(), torch.tensor([torch.nan])), "similarity must be finite"),
        (lambda: weight_curve(ContrastiveLoss(), torch.arange(2)), "similarity must be finite floats.*int64"),
        (lambda: weight_curve(pml.NTXentLoss(), torch.tensor([-1.5])), r"\[-1, 1\] for NTXentLoss.*-1.5"),
        (lambda: Context((1.2,), ()), r"positives of Context must be cosine similarities.*1\.2"),
        (lambda: Context((), (float("nan"),)), "negatives of Context must be cosine similarities"),
        (
            lambda: weight_curve(losses.LiftedStructureLoss(variant="original", measure="distance"), torch.zeros(1)),
            "LiftedStructureLoss couples the rows.*observed_weights",
        ),
        (
            lambda: weight_curve(
                DirectWeightingLoss(
                    FromLoss(losses.LiftedStructureLoss(variant="original", measure="distance")), curves.Step()
                ),
                torch.zeros(1),
            ),
            "couples the rows",
        ),
        (lambda: weight_curve(pml.ProxyAnchorLoss(4, 5), torch.zeros(1)), "ProxyAnchorLoss has no weights.*proxies"),
        (lambda: weight_curve(pml.FastAPLoss(), torch.zeros(1)), "FastAPLoss has no weights.*in-batch"),
        (lambda: observe(limit=0), "limit must be an integer of at least 1, got 0; None"),
        (lambda: observe(bins=0), "bins must be an integer of at least 1, got 0"),
    ],
)
def test_what_has_no_curve_is_refused(build: Callable[[], object], words: str) -> None:
    """A flat line in a figure would be read as a finding."""
    with pytest.raises(InputError, match=words):
        build()


def batch(bank: bool = True) -> dict[str, Any]:
    """Anchors with an unlabelled one, and a bank that holds two of them."""
    generator = torch.Generator().manual_seed(3)
    embeddings = F.normalize(torch.randn(10, 4, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, -1])
    rows = {"embeddings": embeddings, "labels": labels, "indices": torch.arange(10)}
    if bank:
        others = F.normalize(torch.randn(13, 4, generator=generator, dtype=torch.float64), dim=1)
        rows["ref_emb"] = torch.cat((embeddings[:2], others))
        rows["ref_labels"] = torch.cat((labels[:2], torch.arange(13) % 4))
        rows["ref_indices"] = torch.arange(15)
        rows["ref_indices"][2:] += 100
    return rows


def observe(**options: Any) -> losses.ObservedWeights:
    """Weights of the contrastive loss on the batch."""
    return observed_weights(ContrastiveLoss(0.1), **batch(), **options)


@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("name", [*OURS, "lifted, original", "nt-xent of another library"])
def test_the_scatter_is_what_pair_weights_sees(name: str, bank: bool) -> None:
    """The points of the figure are the pairs of the batch, each once, none with itself, sides and signs right."""
    if name == "lifted, original":
        loss: nn.Module = losses.LiftedStructureLoss(variant="original", measure="distance")
        bank = False
    else:
        loss = OURS[name] if name in OURS else pml.NTXentLoss(0.3)
    data = batch(bank)
    if not bank:
        del data["indices"]  # a row is not its own pair, numbered or not
    known = (
        data if name in OURS or name == "lifted, original" else {k: v for k, v in data.items() if "indices" not in k}
    )
    weights = pair_weights(loss, **known) if name in DRAWN else None
    fresh = copy.deepcopy(loss)
    observed = observed_weights(fresh, **data)
    weights = pair_weights(loss, **known) if weights is None else weights
    references = data.get("ref_emb", data["embeddings"])
    ref_labels, ref_indices = data.get("ref_labels", data["labels"]), data.get("ref_indices", torch.arange(10))
    expected: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for i, label in enumerate(data["labels"]):
        for j, other in enumerate(ref_labels):
            if i == ref_indices[j] or label == -1 or other == -1:
                continue
            same = bool(label == other)
            similarity = float((data["embeddings"][i] * references[j]).sum())
            expected[same].append((similarity, float(weights[i, j]) * (-1 if same else 1)))
    for side, same in ((observed.positives, True), (observed.negatives, False)):
        assert side.pairs == len(expected[same]) > 0
        ours = torch.stack((side.similarity, side.weight), dim=1)
        torch.testing.assert_close(ours, torch.tensor(expected[same], dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert side.force == pytest.approx(sum(weight for _, weight in expected[same]), abs=1e-9)
        bins = [min(int((s + 1) * 50), 99) for s, _ in expected[same]]
        assert side.counts.tolist() == [bins.count(place) for place in range(100)]
    assert len(observed.edges) == 101 and observed.anchors == 10


def test_a_scatter_lies_on_the_curve() -> None:
    """Weights times anchors are per anchor: the figure shows both on one axis."""
    loss = DirectWeightingLoss(curves.Linear(1.0, above=False), curves.Exponential(3.0))
    observed = observed_weights(loss, **batch())
    for side, place in ((observed.positives, 0), (observed.negatives, 1)):
        curve = weight_curve(loss, side.similarity)[place]
        torch.testing.assert_close(side.weight * observed.anchors, curve, rtol=1e-12, atol=1e-12)


def test_a_drawn_scatter_is_some_of_the_whole() -> None:
    """A figure of a million points is drawn by fewer; forces and counts stay those of all."""
    every, some, other = observe(), observe(limit=5, seed=1), observe(limit=5, seed=2)
    for whole, part, again in zip(sides(every), sides(some), sides(other), strict=True):
        assert len(part.similarity) == 5 < whole.pairs == part.pairs
        assert set(part.similarity.tolist()) <= set(whole.similarity.tolist())
        assert part.force == whole.force and torch.equal(part.counts, whole.counts)
        assert not torch.equal(part.similarity, again.similarity)
    same = observe(limit=5, seed=1)
    assert torch.equal(same.negatives.similarity, some.negatives.similarity)
    assert torch.equal(observe(limit=10**6).negatives.weight, every.negatives.weight)


def sides(observed: losses.ObservedWeights) -> tuple[Any, Any]:
    """Positives and negatives."""
    return observed.positives, observed.negatives
