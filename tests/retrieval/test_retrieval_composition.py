"""Re-ranking, indexes and intervals inside RetrievalMetrics, with roles and groups, against slow pieces together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lightning_dml.retrieval import (
    ApproximateIndex,
    DatabaseAugmentation,
    KReciprocal,
    QueryExpansion,
    RetrievalMetrics,
    RetrievalResult,
    scoring,
)
from lightning_dml.retrieval.averaging import AverageName, bootstrap_interval
from lightning_dml.retrieval.search import unit_rows
from tests.retrieval.cases import LIST_METRICS, allowed, averages, evaluated, query_values
from tests.retrieval.reranking.cases import clear, slow_distances, slow_expansion

Matrix = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
QueryValues = dict[int, dict[str, float]]

KS = (1, 3, 60)
FIRST_PLACES = ("recall", "precision", "ndcg", "map@r", "r_precision")
# Similarities of a hit and of another item that are nearer than this may change places in float32.
CLEAR = 3e-6

OPTIONS: dict[str, dict[str, Any]] = {
    "neither": {},
    "index": {"index": "Flat"},
    "expansion": {"reranking": (QueryExpansion(3, 1.0),)},
    "augmentation": {"reranking": (DatabaseAugmentation(2, 2.0),)},
    "both": {"reranking": (DatabaseAugmentation(2, 3.0), QueryExpansion(4, 0.5))},
    "both, named the other way round": {"reranking": (QueryExpansion(4, 0.5), DatabaseAugmentation(2, 3.0))},
    "k-reciprocal": {"reranking": (KReciprocal(5, 3, 0.4),)},
}
EXACT = [name for name in OPTIONS if name not in ("index", "k-reciprocal")]


@dataclass(frozen=True)
class Case:
    """Items as they are given to `update`; `items` names them, in an order that is not theirs."""

    rows: npt.NDArray[np.float32]
    labels: Numbers
    groups: Numbers
    is_query: Flags
    is_gallery: Flags
    items: Numbers

    def part(self, rows: Any) -> Case:
        """Some of the items, or all of them in another order."""
        return Case(*(column[rows] for column in vars(self).values()))

    @property
    def queries(self) -> list[int]:
        """Rows of the queries."""
        return self.is_query.nonzero()[0].tolist()

    @property
    def gallery(self) -> list[int]:
        """Rows of the gallery."""
        return self.is_gallery.nonzero()[0].tolist()


def make_case(seed: int, apart: bool) -> Case:
    """Noisy classes with three cameras, distractors, queries that nothing matches, and rows without any role."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(5, size=26) * 10**12 + 3
    # 20 of a class, two queries alone in theirs, four without a role; four distractors come on top.
    labels = np.concatenate([classes[:20], [-5, 77], classes[22:], np.full(4, -1)])
    is_query = rng.random(30) < (0.5 if apart else 0.7)
    is_gallery = ~is_query if apart else rng.random(30) < 0.8
    is_query[20:22], is_gallery[20:22] = True, not apart
    is_query[22:26], is_gallery[22:26] = False, False
    is_query[26], is_gallery[26] = True, not apart  # a distractor may be asked for as well
    is_query[27:], is_gallery[27:] = False, True
    centres = {label: rng.standard_normal(6) for label in np.unique(labels).tolist()}
    rows = np.stack([centres[label] for label in labels.tolist()]) + 0.9 * rng.standard_normal((30, 6))
    case = Case(
        rows.astype(np.float32), labels, rng.integers(-1, 3, size=30), is_query, is_gallery, 7 * rng.permutation(30) + 2
    )
    return case.part(rng.permutation(30))


def filled(case: Case, **options: Any) -> RetrievalMetrics:
    """The metric after two batches of the case."""
    metrics = RetrievalMetrics(ks=options.pop("ks", KS), **options)
    half = len(case.rows) // 2
    for batch in (case.part(slice(half)), case.part(slice(half, None))):
        columns = (batch.rows, batch.labels, batch.items, batch.is_query, batch.is_gallery, batch.groups)
        metrics.update(*map(torch.from_numpy, columns))
    return metrics


def slow_similarities(case: Case, steps: Sequence[Any], ignore: str) -> Matrix:
    """Similarity of each query (row) to each gallery item (column) after the steps; NaN for all other pairs."""
    rows = case.rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = np.full((len(rows), len(rows)), np.nan)
    for step in steps:
        if isinstance(step, KReciprocal):
            known = (case.is_query | case.is_gallery).nonzero()[0]
            distances = slow_distances(torch.from_numpy(rows[known]), step.k1, step.k2, step.weight)
            table[np.ix_(known, known)] = -distances
            return table
    # An item is not moved by itself nor, where groups are ignored whatever the label, by its group.
    keys = [100 + group if ignore == "group" and group >= 0 else row for row, group in enumerate(case.groups.tolist())]
    query_keys, gallery_keys = [keys[row] for row in case.queries], [keys[row] for row in case.gallery]
    asked, items = rows[case.queries], rows[case.gallery]
    for step in steps:
        if isinstance(step, DatabaseAugmentation):
            items = slow_expansion(items, items, step.k, step.alpha, gallery_keys, gallery_keys)
    for step in steps:
        if isinstance(step, QueryExpansion):
            asked = slow_expansion(asked, items, step.k, step.alpha, query_keys, gallery_keys)
    table[np.ix_(case.queries, case.gallery)] = asked @ items.T
    return table


def slow_values(case: Case, table: Matrix, ignore: str) -> tuple[QueryValues, float]:
    """The values of each query that has a match, and the least gap between a hit and another item of a ranking."""
    values, margin = {}, math.inf
    for query in case.queries:
        items = [item for item in case.gallery if allowed(query, item, case.labels, case.groups, ignore)]
        hits = [bool(case.labels[item] == case.labels[query] != -1) for item in items]
        if any(hits):
            similarity = [float(table[query, item]) for item in items]
            values[query] = query_values(similarity, hits, KS)
            ranked = sorted(zip(similarity, hits, strict=True))
            gaps = [high[0] - low[0] for low, high in pairwise(ranked) if low[1] != high[1]]
            margin = min([margin, *gaps])
    return values, margin


@pytest.mark.parametrize("chosen", OPTIONS)
@settings(max_examples=15, phases=[Phase.generate])  # a smaller seed is no simpler case
@given(
    seed=st.integers(0, 10_000),
    apart=st.booleans(),
    ignore=st.sampled_from(["label_and_group", "group"]),
    average=st.sampled_from(["micro", "macro"]),
)
def test_each_option_equals_its_parts(chosen: str, seed: int, apart: bool, ignore: Any, average: Any) -> None:
    """Each part may be right and yet be given the wrong rows, or the wrong items to pass over."""
    case, options = make_case(seed, apart), OPTIONS[chosen]
    expected, margin = slow_values(case, slow_similarities(case, options.get("reranking", ()), ignore), ignore)
    assume(expected and margin > CLEAR)
    if chosen == "k-reciprocal":  # whose sets of neighbours a change of two places would change
        assume(clear(unit_rows(torch.from_numpy(case.rows))))
    include = LIST_METRICS if chosen in EXACT else FIRST_PLACES

    metrics = filled(case, include=include, ignore=ignore, average=average, **options)
    values = evaluated(metrics)

    if chosen == "index":
        assert values.pop("index_recall") == 1.0
    of_all = averages(expected, case.labels, average)
    assert values == pytest.approx({name: of_all[name] for name in values}, rel=1e-9)
    result = metrics.result
    assert isinstance(result, RetrievalResult) and result.per_class is not None
    assert (result.queries, result.unmatched) == (len(case.queries), len(case.queries) - len(expected))
    for label, means in result.per_class.as_dict().items():
        of_class = {query: its_values for query, its_values in expected.items() if case.labels[query] == label}
        assert means == pytest.approx({name: averages(of_class, case.labels, "micro")[name] for name in means})


@pytest.mark.parametrize("chosen", OPTIONS)
@pytest.mark.parametrize("apart", [False, True])
def test_rows_without_a_role_change_nothing(chosen: str, apart: bool) -> None:
    """A training split that is embedded along with the others would otherwise move the test split's numbers."""
    for seed in range(4):
        case = make_case(seed, apart)
        expected = evaluated(filled(case.part(case.is_query | case.is_gallery), **OPTIONS[chosen]))
        assert evaluated(filled(case, **OPTIONS[chosen])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("chosen", EXACT)
@pytest.mark.parametrize("ignore", ["label_and_group", "group"])
def test_labels_do_not_move_rows(chosen: str, ignore: Any) -> None:
    """A query that was expanded with the help of the labels scores what no search without them can reach."""
    for seed in range(4):
        case = make_case(seed, apart=False)
        # Gallery items that match nothing that is asked for: as distractors, alone in their classes, or in few.
        nobody = (case.labels == -1) | ~case.is_query & (np.arange(30) % 3 == 0)
        case = replace(case, is_query=case.is_query & ~nobody)
        names = (np.full(30, -1), 1000 + np.arange(30), 1000 + np.arange(30) % 2, np.full(30, 1000))
        cases = [replace(case, labels=np.where(nobody, other, case.labels)) for other in names]
        options = OPTIONS[chosen] | {"ignore": ignore, "include": LIST_METRICS}
        results = [evaluated(filled(renamed, **options)) for renamed in cases]
        assert all(values == pytest.approx(results[0], rel=1e-9) for values in results[1:])


@pytest.mark.parametrize(("ignore", "precision"), [("label_and_group", 1.0), ("group", 0.0)])
def test_a_picture_by_the_same_camera_moves_a_query_unless_groups_are_ignored(ignore: Any, precision: float) -> None:
    """Whoever searches has no labels, so a query cannot know that its nearest neighbour is of its own class."""
    # The query, its class by its own camera and by another, and another class by that one. Halfway to the second, the
    # query is nearest to the third (40 degrees against 70); halfway to the last, to that one (25 against 85).
    angles = torch.tensor([0.0, 40.0, 60.0, -50.0]).deg2rad()
    metrics = RetrievalMetrics((1,), include=("precision@1",), ignore=ignore, reranking=[QueryExpansion(1, 0.0)])
    metrics.update(
        torch.stack([angles.cos(), angles.sin()], dim=1),
        torch.tensor([0, 0, 0, 1]),
        is_query=torch.tensor([True, False, False, False]),
        groups=torch.tensor([0, 0, 1, 1]),
    )
    assert metrics.compute() == {"precision@1": precision}


def test_intervals_are_those_of_the_options() -> None:
    """An option that is dropped on the way still gives an interval, but not the one that a paper then reports."""
    case = make_case(3, apart=False)
    options: list[tuple[AverageName, float, int, int]] = [
        ("micro", 0.9, 200, 0),
        ("macro", 0.9, 200, 0),
        ("micro", 0.6, 200, 0),
        ("micro", 0.9, 57, 0),
        ("micro", 0.9, 200, 4),
    ]
    ends = set()
    for average, confidence, draws, seed in options:
        metrics = filled(case, average=average, confidence=confidence, bootstrap_draws=draws, seed=seed)
        values = evaluated(metrics)
        assert metrics.result is not None and metrics.result.per_class is not None
        per_class = metrics.result.per_class
        low, high = bootstrap_interval(per_class, average, confidence, draws, seed)
        for name, *pair in zip(per_class.names, low.tolist(), high.tolist(), strict=True):
            assert [values[f"{name}/low"], values[f"{name}/high"]] == pair
        ends.add((values["map@r/low"], values["map@r/high"]))
    assert len(ends) == 5


class Spy(ApproximateIndex):
    """An index that remembers the arguments that it was built from."""

    built: list[tuple[ApproximateIndex, dict[str, Any]]]

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Notes the arguments by name."""
        super().__init__(*arguments, **more)
        self.built.append((self, signature(ApproximateIndex).bind(*arguments, **more).arguments))


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("ignore", ["label_and_group", "group"])
def test_an_index_gets_the_options_and_what_it_finds_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, metric: Any, ignore: Any
) -> None:
    """A seed that never arrives cannot be varied, and an excluded item that is found lifts every number."""
    monkeypatch.setattr(scoring, "ApproximateIndex", Spy)
    monkeypatch.setattr(Spy, "built", [], raising=False)
    case = make_case(8, apart=False)
    case = case.part(case.items.argsort())  # the order in which the gallery is searched
    values = evaluated(
        filled(
            case,
            ks=(4,),
            metric=metric,
            ignore=ignore,
            seed=11,
            include=("recall", "precision@1"),
            index="IVF5,Flat",
            index_parameters="nprobe=2",
        )
    )

    ((index, arguments),) = Spy.built
    gallery = arguments.pop("gallery").numpy()
    search = "l2" if metric == "l2" else "inner_product"
    assert arguments == {"factory": "IVF5,Flat", "metric": search, "parameters": "nprobe=2", "seed": 11}
    rows = case.rows.astype(np.float64)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(gallery, rows[case.gallery], atol=1e-6)

    hits, right, wanted = [], 0, 0
    for query in case.queries:
        items = [item for item in case.gallery if allowed(query, item, case.labels, case.groups, ignore)]
        matching = [item for item in items if case.labels[item] == case.labels[query] != -1]
        if not matching:
            continue
        distances = ((rows[query] - rows) ** 2).sum(axis=1) if metric == "l2" else -rows @ rows[query]
        best = sorted(items, key=distances.tolist().__getitem__)[:4]
        _, positions = index.search(torch.from_numpy(rows[query : query + 1]).float(), len(case.gallery))
        named = [case.gallery[place] for place in positions[0].tolist() if place >= 0]
        first = [item for item in named if item in items][:4]
        hits.append([item in matching for item in first])
        right, wanted = right + len(set(first) & set(best)), wanted + len(best)
    assert 0.3 < right / wanted < 1
    expected = {
        "recall@4": np.mean([any(of_query) for of_query in hits]),
        "precision@1": np.mean([any(of_query[:1]) for of_query in hits]),
        "index_recall": right / wanted,
    }
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("chosen", EXACT)
@pytest.mark.parametrize("ignore", ["label_and_group", "group"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_collapsed_embedding_scores_chance_in_any_order(chosen: str, ignore: Any, apart: bool) -> None:
    """Rows that are equal but for their rounding must not be ranked by it, nor by the order in which they came."""
    rng = np.random.default_rng(0)
    point, scales = rng.standard_normal(33), np.exp(rng.standard_normal((30, 1)))
    case = replace(make_case(2, apart), rows=(scales * point).astype(np.float32))
    chances = []
    for query in case.queries:
        items = [item for item in case.gallery if allowed(query, item, case.labels, case.groups, ignore)]
        r = sum(bool(case.labels[item] == case.labels[query] != -1) for item in items)
        if r:
            missed = math.comb(len(items) - r, 3) / math.comb(len(items), 3)
            chances.append((1 - missed, r / len(items), r / len(items)))
    chance = dict(zip(("recall@3", "precision@1", "r_precision"), np.mean(chances, axis=0), strict=True))

    orders = [np.random.default_rng(seed).permutation(30) for seed in range(5)]
    options = OPTIONS[chosen] | {"ks": (3,), "include": ("precision@1", *LIST_METRICS), "ignore": ignore}
    results = [evaluated(filled(replace(case.part(order), items=np.arange(30)), **options)) for order in orders]
    for values in results:
        assert {name: values[name] for name in chance} == pytest.approx(chance, rel=1e-9)
        assert values == pytest.approx(results[0], rel=1e-9)
