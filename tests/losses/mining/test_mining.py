"""Every miner against a slow loop, and the streams of those that draw."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn import functional as F

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, DirectWeightingLoss, MultiSimilarityLoss, curves
from lightning_dml.losses.mining import (
    AllPairs,
    BatchHardMiner,
    DistanceWeightedMiner,
    Miner,
    MultiSimilarityMiner,
    RankedListMiner,
    SampledMiner,
    SemiHardMiner,
    ThresholdMiner,
    TopKMiner,
    TripletViolationMiner,
)

Row = Callable[[list[float], list[int], list[int]], tuple[set[int], set[int]]]
"""Oracle of one anchor: similarities, columns of positives and of negatives -> columns kept."""
Drawn = Callable[[list[float], list[int], list[int], list[float]], tuple[set[int], set[int]]]
"""The same with the anchor's random numbers."""


def distance(similarity: float) -> float:
    """Distance between unit vectors."""
    return math.sqrt(max(0.0, 2 - 2 * similarity))


def threshold(positive_below: float | None, negative_above: float | None) -> Row:
    """Rule on each pair by itself."""

    def row(s: list[float], p: list[int], n: list[int]) -> tuple[set[int], set[int]]:
        return (
            {j for j in p if positive_below is None or s[j] < positive_below},
            {k for k in n if negative_above is None or s[k] > negative_above},
        )

    return row


def ranked_list(margin: float, alpha: float) -> Row:
    """Rule on each pair by its distance."""

    def row(s: list[float], p: list[int], n: list[int]) -> tuple[set[int], set[int]]:
        return {j for j in p if distance(s[j]) > alpha - margin}, {k for k in n if distance(s[k]) < alpha}

    return row


def violated(margin: float) -> Row:
    """Every triplet, one by one."""

    def row(s: list[float], p: list[int], n: list[int]) -> tuple[set[int], set[int]]:
        triplets = [(j, k) for j in p for k in n if s[k] > s[j] - margin]
        return {j for j, _ in triplets}, {k for _, k in triplets}

    return row


def batch_hard(s: list[float], p: list[int], n: list[int]) -> tuple[set[int], set[int]]:
    """The first of a sorted list."""
    return set(sorted(p, key=lambda j: (s[j], j))[:1]), set(sorted(n, key=lambda k: (-s[k], k))[:1])


def top_k(positives: int | None, negatives: int | None) -> Row:
    """A pair is kept if fewer than k are harder."""

    def row(s: list[float], p: list[int], n: list[int]) -> tuple[set[int], set[int]]:
        return (
            {j for j in p if positives is None or sum(s[other] < s[j] for other in p) < positives},
            {k for k in n if negatives is None or sum(s[other] > s[k] for other in n) < negatives},
        )

    return row


def semi_hard(margin: float, measure: str) -> Drawn:
    """Lists of candidates and an index into each."""
    apart: dict[str, Callable[[float], float]] = {
        "similarity": lambda s: -min(s, 1.0),
        "distance": distance,
        "squared_distance": lambda s: distance(s) ** 2,
    }
    far = apart[measure]

    def row(s: list[float], p: list[int], n: list[int], chance: list[float]) -> tuple[set[int], set[int]]:
        if not p or not n:
            return set(), set()
        j = p[int(chance[0] * len(p))]
        band = [k for k in n if far(s[j]) < far(s[k]) < far(s[j]) + margin] or n
        return {j}, {band[int(chance[1] * len(band))]}

    return row


def inverse_density(s: float, dim: int, low: float, high: float | None) -> float:
    """1 / q(d) as it is printed, without logarithms."""
    if high is not None and distance(s) >= high:
        return 0.0
    d = max(distance(s), low)
    return float(d ** (2 - dim) * max(1 - d**2 / 4, torch.finfo(torch.float32).eps) ** (-(dim - 3) / 2))


def distance_weighted(dim: int, low: float, high: float | None, negatives: int | None) -> Drawn:
    """A walk along the cumulative distribution for every point of the comb."""

    def row(s: list[float], p: list[int], n: list[int], chance: list[float]) -> tuple[set[int], set[int]]:
        weights = {k: inverse_density(s[k], dim, low, high) for k in n}
        weights = {k: weight for k, weight in weights.items() if weight > 0}
        count, columns_kept = len(p) if negatives is None else negatives, set()
        for slot in range(count if weights else 0):
            point = (chance[0] + slot) / count * sum(weights.values())
            ends = itertools.accumulate(weights.values())
            columns_kept.add(next(k for k, end in zip(weights, ends, strict=True) if end > point))
        return set(p), columns_kept

    return row


CASES: dict[str, tuple[Miner, Row]] = {
    "all": (AllPairs(), threshold(None, None)),
    "threshold": (ThresholdMiner(), threshold(None, 0.5)),
    "threshold, both": (ThresholdMiner(0.5, -0.2), threshold(0.5, -0.2)),
    "threshold, positives": (ThresholdMiner(0.3, None), threshold(0.3, None)),
    "multi-similarity": (MultiSimilarityMiner(), violated(0.1)),
    "multi-similarity, no slack": (MultiSimilarityMiner(0.0), violated(0.0)),
    "triplet violation": (TripletViolationMiner(0.3), violated(0.3)),
    "triplet violation, deep": (TripletViolationMiner(-0.2), violated(-0.2)),
    "batch-hard": (BatchHardMiner(), batch_hard),
    "top-k": (TopKMiner(), top_k(None, 10)),
    "top-k, both": (TopKMiner(1, 2), top_k(1, 2)),
    "top-k, positives": (TopKMiner(2, None), top_k(2, None)),
    "ranked list": (RankedListMiner(), ranked_list(0.4, 1.2)),
    "ranked list, to a point": (RankedListMiner(margin=0.7, alpha=0.7), ranked_list(0.7, 0.7)),
    "ranked list, all positives": (RankedListMiner(margin=0.8, alpha=0.5), ranked_list(0.8, 0.5)),
}
SAMPLED: dict[str, tuple[SampledMiner, Drawn]] = {
    "semi-hard": (SemiHardMiner(measure="distance"), semi_hard(0.2, "distance")),
    "semi-hard, similarity": (SemiHardMiner(0.3, seed=1), semi_hard(0.3, "similarity")),
    "semi-hard, squared": (SemiHardMiner(0.5, measure="squared_distance"), semi_hard(0.5, "squared_distance")),
    "distance-weighted": (DistanceWeightedMiner(8), distance_weighted(8, 0.5, 1.4, None)),
    "distance-weighted, plane": (DistanceWeightedMiner(2, negatives=1), distance_weighted(2, 0.5, 1.4, 1)),
    "distance-weighted, no limit": (
        DistanceWeightedMiner(3, 0.1, None, negatives=3),
        distance_weighted(3, 0.1, None, 3),
    ),
    "distance-weighted, far": (DistanceWeightedMiner(6, 0.9, 2.0), distance_weighted(6, 0.9, 2.0, None)),
}
MINERS: dict[str, Miner] = {name: case[0] for name, case in (CASES | SAMPLED).items()}
Block = tuple[Tensor, Tensor, Tensor]


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Similarities with equal values, the ends and rounding beyond them; masks with empty and with full rows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, m = draw(st.integers(0, 6)), draw(st.integers(0, 12))
    values = torch.rand(draw(st.integers(1, 20)), dtype=torch.float64, generator=generator) * 2 - 1
    values = torch.cat([values, torch.tensor(draw(st.sampled_from([[], [1.0, 1 + 1e-7, -1 - 1e-7, 0.5]]))).double()])
    similarity = values[torch.randint(len(values), (n, m), generator=generator)]
    kind = torch.randint(3, (n, m), generator=generator)  # 0 is no pair
    for i in range(n):
        only = draw(st.sampled_from([None, None, 0, 1, 2]))
        if only is not None:
            kind[i] = only
    return similarity, kind == 1, kind == 2


def columns(mask: Tensor) -> list[int]:
    """Columns of a row's mask."""
    return [int(column) for column in mask.nonzero()[:, 0]]


def columns_of_masks(masks: tuple[Tensor, Tensor]) -> list[tuple[set[int], set[int]]]:
    """Columns of both masks, row by row."""
    return [(set(columns(p)), set(columns(n))) for p, n in zip(*masks, strict=True)]


@pytest.mark.parametrize("name", CASES)
@given(block=blocks())
def test_keeps_what_a_loop_over_the_rule_keeps(name: str, block: Block) -> None:
    """The rule of each miner is what its documentation says."""
    miner, row = CASES[name]
    expected = [row(s.tolist(), columns(p), columns(n)) for s, p, n in zip(*block, strict=True)]
    assert columns_of_masks(miner(*block)) == expected


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(0.1), TripletViolationMiner(0.1)])
def test_rounding_does_not_keep_half_an_anchor(miner: Miner) -> None:
    """0.25 > 0.35 - 0.1 but not 0.35 < 0.25 + 0.1 in floating point; a side without the other has no triplet."""
    similarity, positive = torch.tensor([[0.35, 0.25]], dtype=torch.float64), torch.tensor([[True, False]])
    assert columns_of_masks(miner(similarity, positive, ~positive)) == [(set(), set())]


@pytest.mark.parametrize("name", SAMPLED)
@given(block=blocks())
def test_draws_what_a_loop_over_the_rule_draws(name: str, block: Block) -> None:
    """The same random numbers lead a loop over candidates to the same pairs."""
    miner, row = SAMPLED[name]
    chances = copy.deepcopy(miner).draw(2 if isinstance(miner, SemiHardMiner) else 1, block[0]).tolist()
    rows = zip(*block, chances, strict=True)
    expected = [row(s.tolist(), columns(p), columns(n), chance) for s, p, n, chance in rows]
    assert columns_of_masks(miner(*block)) == expected


@pytest.mark.parametrize("name", MINERS)
@given(block=blocks(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_keeps_a_subset_and_leaves_its_input_alone(name: str, block: Block, dtype: torch.dtype) -> None:
    """A pair that is masked out must not come back, and the engine still needs the similarities."""
    similarity, positive, negative = block[0].to(dtype), block[1], block[2]
    before = [tensor.clone() for tensor in (similarity, positive, negative)]
    kept_positive, kept_negative = MINERS[name](similarity, positive, negative)
    for mask, whole in ((kept_positive, positive), (kept_negative, negative)):
        assert mask.dtype == torch.bool and mask.shape == whole.shape
        assert not (mask & ~whole).any()
    assert all(torch.equal(*pair) for pair in zip(before, (similarity, positive, negative), strict=True))


@pytest.mark.parametrize("name", MINERS)
@given(block=blocks(), cut=st.integers(0, 12))
def test_separable_miners_may_see_part_of_a_row(name: str, block: Block, cut: int) -> None:
    """The engine tiles what calls itself separable, so tiles must add up to the whole."""
    miner = MINERS[name]
    if not miner.separable:
        assert isinstance(
            miner, SampledMiner | BatchHardMiner | TopKMiner | MultiSimilarityMiner | TripletViolationMiner
        )
        return
    parts = [miner(*(tensor[:, columns] for tensor in block)) for columns in (slice(cut), slice(cut, None))]
    for side, whole in enumerate(miner(*block)):
        assert torch.equal(torch.cat([part[side] for part in parts], dim=1), whole)


def batch(n: int = 24, m: int = 60, dim: int = 6) -> dict[str, Tensor]:
    """Anchors and references of five classes."""
    generator = torch.Generator().manual_seed(7)
    return {
        "embeddings": F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=generator), dim=1),
        "labels": torch.randint(5, (n,), generator=generator),
        "ref_emb": F.normalize(torch.randn(m, dim, dtype=torch.float64, generator=generator), dim=1),
        "ref_labels": torch.randint(5, (m,), generator=generator),
    }


def value_and_gradient(loss: torch.nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Value and gradient of one call."""
    leaf = data["embeddings"].clone().requires_grad_()
    value = loss(**(data | {"embeddings": leaf}))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", MINERS)
def test_the_block_size_changes_nothing(name: str) -> None:
    """One row at a time and all at once keep and draw the same pairs, call after call."""
    results = []
    for block_bytes in (1, 3 * 60 * 8, 2**24):
        loss = ContrastiveLoss(-1.0, miner=copy.deepcopy(MINERS[name]), block_bytes=block_bytes)
        results.append([value_and_gradient(loss, batch()) for _ in range(3)])
    for calls in results[1:]:
        torch.testing.assert_close(calls, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda miner: MultiSimilarityLoss(miner=miner),
        lambda miner: DirectWeightingLoss(curves.Constant(), curves.Exponential(5.0), miner=miner),
    ],
    ids=["multi-similarity", "direct"],
)
@pytest.mark.parametrize("name", MINERS)
def test_goes_with_any_weighting(name: str, loss: Callable[[Miner], torch.nn.Module]) -> None:
    """A weighting takes what any miner leaves: the loss moves the anchors, in the batch and against references."""
    data = batch()
    for part in (data, {key: data[key] for key in ("embeddings", "labels")}):
        value, gradient = value_and_gradient(loss(MINERS[name]), part)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def masks_of(miner: Miner, calls: int = 3) -> list[Tensor]:
    """The pairs that a miner keeps in some calls on the same block."""
    data = batch()
    similarity = data["embeddings"] @ data["ref_emb"].T
    positive = data["labels"][:, None] == data["ref_labels"]
    return [mask for _ in range(calls) for mask in miner(similarity, positive, ~positive)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Tells whether all masks are equal."""
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


SAMPLERS: list[Callable[..., SampledMiner]] = [
    lambda **seed: SemiHardMiner(measure="distance", **seed),
    lambda **seed: DistanceWeightedMiner(6, **seed),
]
samplers = pytest.mark.parametrize("sampler", SAMPLERS, ids=["semi-hard", "distance-weighted"])


@samplers
def test_the_seed_names_the_draws(sampler: Callable[..., SampledMiner]) -> None:
    """A run repeats, another seed is another run, and no call repeats the one before."""
    draws = masks_of(sampler(seed=3))
    assert same(draws, masks_of(sampler(seed=3)))
    assert not same(draws, masks_of(sampler(seed=4)))
    assert not same(draws[:2], draws[2:4])


@samplers
def test_a_generator_gives_the_seed(sampler: Callable[..., SampledMiner]) -> None:
    """Who seeds everything from one generator gets draws that repeat, and others from the next miner."""
    generator = torch.Generator().manual_seed(5)
    first, second = masks_of(sampler(seed=generator)), masks_of(sampler(seed=generator))
    assert same(first, masks_of(sampler(seed=torch.Generator().manual_seed(5))))
    assert not same(first, second)


@samplers
def test_draws_resume_from_a_checkpoint(sampler: Callable[..., SampledMiner]) -> None:
    """The state survives torch.save and weights-only loading, and the resumed run draws what the first would have."""
    miner, resumed, file = sampler(), sampler(), io.BytesIO()
    masks_of(miner)
    torch.save(ContrastiveLoss(miner=miner).state_dict(), file)
    file.seek(0)
    ContrastiveLoss(miner=resumed).load_state_dict(torch.load(file, weights_only=True))
    expected = masks_of(miner)
    assert same(expected, masks_of(resumed))
    assert not same(expected, masks_of(sampler()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda miner: pickle.loads(pickle.dumps(miner))])
@samplers
def test_a_copy_draws_on_by_itself(sampler: Callable[..., SampledMiner], copied: Callable[[Any], Any]) -> None:
    """Copies, as weight averaging and spawned processes make them, start where the original stands."""
    miner = sampler()
    masks_of(miner)
    twin = copied(miner)
    ahead = masks_of(miner)
    assert same(masks_of(twin), ahead)


@samplers
def test_ranks_draw_apart_and_resume_from_one_checkpoint(
    sampler: Callable[..., SampledMiner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 draws other pairs than rank 0, and the state that rank 0 saved continues rank 1's own stream."""
    zero = sampler()
    rank_zero = masks_of(zero)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    one = sampler()
    assert not same(masks_of(one), rank_zero)
    resumed = sampler()
    resumed.load_state_dict(zero.state_dict())
    assert same(masks_of(resumed), masks_of(one))


def shares(miner: Miner, row: list[float], positive: int, rows: int = 20_000) -> tuple[Tensor, Tensor]:
    """Share of draws in which each column is kept when every anchor is alike and the first columns are positives."""
    similarity = torch.tensor(row, dtype=torch.float64).expand(rows, -1)
    mask = (torch.arange(len(row)) < positive).expand(rows, -1)
    kept_positive, kept_negative = miner(similarity, mask, ~mask)
    return kept_positive.double().mean(dim=0), kept_negative.double().mean(dim=0)


def assert_frequencies(frequencies: Tensor, expected: Tensor, rows: int = 20_000) -> None:
    """Asserts that each share is within four standard deviations of its probability."""
    assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt() + 1e-12).all(), (
        frequencies,
        expected,
    )


@pytest.mark.parametrize(("positives", "negatives"), [(1, None), (3, None), (1, 4)])
def test_distance_weighted_draws_have_their_probability(positives: int, negatives: int | None) -> None:
    """Negatives are kept in proportion to the inverse density, times the number of draws, up to certainty."""
    row = [0.9] * positives + [0.95, 0.6, 0.5, 0.3, 0.2, 0.1, 0.03, 0.0, -0.5]
    weights = torch.tensor([inverse_density(s, 5, 0.5, 1.4) for s in row[positives:]]).double()
    _, frequencies = shares(DistanceWeightedMiner(5, negatives=negatives), row, positives)
    expected = (weights / weights.sum() * (negatives or positives)).clamp(max=1)
    assert (weights[-2:] == 0).all() and (expected[:2] == expected[0]).sum() <= 2
    assert_frequencies(frequencies[positives:], expected)


def test_semi_hard_draws_evenly() -> None:
    """Each positive as often as any other, and each negative of its band."""
    row = [0.9, 0.2, 0.85, 0.87, 0.95, 0.18, -0.5]  # bands: 0.85 and 0.87; 0.18
    seen_positive, seen_negative = shares(SemiHardMiner(0.2, measure="distance"), row, 2)
    assert_frequencies(seen_positive, torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0]).double())
    assert_frequencies(seen_negative, torch.tensor([0, 0, 0.25, 0.25, 0, 0.5, 0]).double())


def test_semi_hard_falls_back_to_any_negative() -> None:
    """Without a negative in the band, all of them are candidates."""
    _, frequencies = shares(SemiHardMiner(0.1, measure="distance"), [0.5, 0.6, 0.7, -0.5], 1)
    assert_frequencies(frequencies[1:], torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("dim", [2, 3, 512, 4096])
@pytest.mark.parametrize("max_distance", [1.4, None])
def test_distance_weights_neither_overflow_nor_vanish(dim: int, max_distance: float | None) -> None:
    """In float32 and any dimension every anchor with a negative in range draws one, also at both ends of the range."""
    similarity = torch.tensor([[0.9, 1 + 1e-6, 0.99], [0.9, 0.05, 0.04], [0.9, -1.0, -1 - 1e-6], [0.9, 1.0, -1.0]])
    positive = torch.tensor([True, False, False]).expand(4, 3)
    _, negative = DistanceWeightedMiner(dim, max_distance=max_distance)(similarity, positive, ~positive)
    assert negative.any(dim=1).tolist() == [True, True, max_distance is None, True]


def parsed(class_path: str, settings: dict[str, Any]) -> Miner:
    """A miner from a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Miner, "miner")
    text = json.dumps({"miner": {"class_path": class_path, "init_args": settings}})  # which is YAML as well
    miner = parser.instantiate_classes(parser.parse_string(text)).miner
    assert isinstance(miner, Miner)
    return miner


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the oldest jsonargparse has no other name for it
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AllPairs", {}),
        ("ThresholdMiner", {"positive_below": 0.9, "negative_above": None}),
        ("MultiSimilarityMiner", {"epsilon": 0.2}),
        ("SemiHardMiner", {"margin": 0.3, "measure": "squared_distance", "seed": 1}),
        ("BatchHardMiner", {}),
        ("TopKMiner", {"positives": 2, "negatives": None}),
        (
            "DistanceWeightedMiner",
            {"dim": 64, "min_distance": 0.4, "max_distance": None, "negatives": 2, "seed": 3},
        ),
        ("RankedListMiner", {"alpha": 1.1, "margin": 0.2}),
        ("TripletViolationMiner", {"margin": 0.0}),
    ],
)
def test_comes_from_a_config(name: str, settings: dict[str, Any]) -> None:
    """Each miner is made from its class path, takes its settings, and shows them when it is printed."""
    miner = parsed(f"lightning_dml.losses.mining.{name}", settings)
    assert type(miner).__name__ == name
    for key, value in settings.items():
        assert getattr(miner, key) == value
        assert f"{key}={value!r}" in repr(miner)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ThresholdMiner(positive_below=1.5), "positive_below.*1.5"),
        (lambda: ThresholdMiner(negative_above=float("nan")), "negative_above.*nan"),
        (lambda: MultiSimilarityMiner(float("nan")), "epsilon.*nan"),
        (lambda: TripletViolationMiner(float("inf")), "margin.*inf"),
        (lambda: RankedListMiner(alpha=0), "alpha.*0"),
        (lambda: RankedListMiner(margin=-0.1), "margin.*-0.1"),
        (lambda: TopKMiner(positives=0), "positives.*got 0; None"),
        (lambda: TopKMiner(negatives=2.5), "negatives.*got 2.5; None"),  # type: ignore[arg-type]
        (lambda: SemiHardMiner(margin=0), "margin.*0"),
        (lambda: SemiHardMiner(measure="cosine"), "measure.*distance.*'cosine'"),  # type: ignore[arg-type]
        (lambda: SemiHardMiner(seed=-1), "seed.*-1"),
        (lambda: DistanceWeightedMiner(1), "dim.*1"),
        (lambda: DistanceWeightedMiner(8, min_distance=0), "min_distance.*0"),
        (lambda: DistanceWeightedMiner(8, max_distance=0.4), "max_distance.*greater than 0.5.*got 0.4.*None"),
        (lambda: DistanceWeightedMiner(8, negatives=0), "negatives.*got 0; None"),
        (lambda: Miner()(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)), None),
    ],
)
def test_wrong_settings_are_named(call: Callable[[], object], words: str | None) -> None:
    """An error names the argument, the value and the way out."""
    with pytest.raises(NotImplementedError if words is None else InputError, match=words or "must define forward"):
        call()
