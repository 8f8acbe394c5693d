"""Rankings of a block of queries, with their ties, against exact arithmetic and every order of the tied items."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.retrieval import RetrievalMetrics, average_precision, evaluation, reciprocal_rank
from lightning_dml.retrieval.evaluation import Items, list_metrics, list_values, positive_ranks, rank_block
from lightning_dml.retrieval.search import SearchName, nearest, unit_rows
from lightning_dml.retrieval.ties import RESOLUTION
from tests.retrieval.cases import (
    Runs,
    orders,
    slow_average_precision,
    slow_map_at_r,
    slow_ndcg,
    slow_precision,
    slow_recall,
    slow_reciprocal_rank,
)

AT_K = ("recall", "precision", "ndcg")
AT_R = ("map@r", "r_precision")
METRICS: tuple[SearchName, ...] = ("inner_product", "l2")


def exact_runs(queries: Items, gallery: Items, row: int, metric: SearchName) -> Runs:
    """The ranking of a query in exact arithmetic: runs of equal similarity, whose items are hits or not."""
    query = [Fraction(value) for value in queries.embeddings[row].tolist()]
    runs: dict[Fraction, list[bool]] = {}
    for item, values in enumerate(gallery.embeddings.tolist()):
        if queries.keys[row] == gallery.keys[item]:
            continue
        pairs = list(zip(query, map(Fraction, values), strict=True))
        near = sum((a * b if metric == "inner_product" else -((a - b) ** 2) for a, b in pairs), Fraction(0))
        hit = int(queries.classes[row]) >= 0 and bool(queries.classes[row] == gallery.classes[item])
        runs.setdefault(near, []).append(hit)
    return [runs[near] for near in sorted(runs, reverse=True)]


def slow_values(runs: Runs, ks: list[int], at_r: bool) -> list[float]:
    """Means over all orders of the list metrics, in the order of `list_metrics`, then of AP and reciprocal rank."""
    r = sum(map(sum, runs))
    table = []
    for order in orders(runs):
        padded = order + (False,) * max(ks)
        line = [slow_recall(padded, k) for k in ks] + [slow_precision(padded, k) for k in ks]
        line += [slow_ndcg(padded, r, k) for k in ks]
        line += [slow_map_at_r(padded, r), slow_precision(padded, r)] if at_r else []
        table.append([*line, slow_average_precision(order), slow_reciprocal_rank(order)])
    values: list[float] = np.mean(table, axis=0).tolist()
    return values


def fast_values(queries: Items, gallery: Items, k: int, ks: list[int], at_r: bool, metric: SearchName) -> Tensor:
    """The values of the same metrics by the package."""

    def search(_rows: Tensor, block: Items, places: int) -> tuple[Tensor, Tensor]:
        return nearest(block.embeddings, gallery.embeddings, places, metric, [(block.keys, gallery.keys)])

    lengths = gallery.lengths()
    ranking = rank_block(torch.arange(len(queries)), queries, gallery, k, metric, search, lengths)
    relevant = torch.tensor([sum(map(sum, exact_runs(queries, gallery, row, metric))) for row in range(len(queries))])
    functions = list(list_metrics(ks, AT_K + (AT_R if at_r else ())).values())
    ranks, tied = positive_ranks(queries, gallery, metric, lengths)
    whole = torch.stack([average_precision(ranks, tied), reciprocal_rank(ranks, tied)], dim=1)
    return torch.cat([list_values(ranking, relevant, functions), whole], dim=1)


def coordinates(draw: st.DrawFn, count: int, third: st.SearchStrategy[int]) -> Tensor:
    """Points of a small grid, many of them equally near."""
    small = st.integers(-1, 1)
    return torch.tensor([draw(st.tuples(small, small, third)) for _ in range(count)], dtype=torch.float32)


@st.composite
def searches(draw: st.DrawFn, metric: SearchName) -> tuple[Items, Items]:
    """A few queries and items, some excluded; every product is exact in float32 and differs by at least 1 if it does.

    Lengths differ by up to 10,000, and still 1 is above the resolution of ties for any pair: queries lie in a plane
    in which the inner product does not see the third coordinate, and for "l2" items are near or in one far cluster.
    """
    far = [0, 1, 2**7, 2**14, -(2**14)] if metric == "inner_product" else [0, 0, 1, 700]
    counts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    classes, keys = st.integers(-1, 1), st.integers(0, 6)
    sides = [
        Items(
            coordinates(draw, count, third),
            torch.tensor(draw(st.lists(classes, min_size=count, max_size=count))),
            torch.tensor(draw(st.lists(keys, min_size=count, max_size=count))),
        )
        for count, third in zip(counts, (st.just(0), st.sampled_from(far)), strict=True)
    ]
    queries, gallery = sides
    answered = [any(map(any, exact_runs(queries, gallery, row, metric))) for row in range(len(queries))]
    assume(any(answered))
    return queries.take(torch.tensor(answered).nonzero().flatten()), gallery


@pytest.mark.parametrize("counted", [0, 1000])
@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data())
def test_values_are_those_of_all_orders(metric: SearchName, counted: int, data: st.DataObject) -> None:
    """Runs behind the last place, excluded items, places without a candidate and rows of all lengths occur at once."""
    queries, gallery = data.draw(searches(metric))
    k = data.draw(st.integers(1, len(gallery)))
    ks = sorted({1, k, len(gallery) + 2} if k == len(gallery) else {1, k})
    runs = [exact_runs(queries, gallery, row, metric) for row in range(len(queries))]
    at_r = max(sum(map(sum, of_query)) for of_query in runs) <= k
    expected = [slow_values(of_query, ks, at_r) for of_query in runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_COUNTED_POSITIVES", counted)
        values = fast_values(queries, gallery, k, ks, at_r, metric)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counted", [0, 1000])
@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data())
def test_positive_ranks_are_those_of_a_sort(metric: SearchName, counted: int, data: st.DataObject) -> None:
    """Few positives are counted and many are searched in sorted rows, and both must name the same places."""
    queries, gallery = data.draw(searches(metric))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_COUNTED_POSITIVES", counted)
        ranks, tied = positive_ranks(queries, gallery, metric, gallery.lengths())
    assert ranks.dtype == tied.dtype == torch.int64
    expected = []
    for row in range(len(queries)):
        places, above = [], 0
        for run in exact_runs(queries, gallery, row, metric):
            places += [(above + 1, len(run))] * sum(run)
            above += len(run)
        expected.append(places)
    most = max(map(len, expected))
    padded = [places + [(0, 0)] * (most - len(places)) for places in expected]
    assert torch.stack([ranks, tied], dim=2).tolist() == [[list(place) for place in places] for places in padded]


@pytest.mark.parametrize("counted", [0, 1000])
def test_a_block_without_positives_has_no_ranks(monkeypatch: pytest.MonkeyPatch, counted: int) -> None:
    """The last rank of a large job may get no query at all."""
    monkeypatch.setattr(evaluation, "_COUNTED_POSITIVES", counted)
    gallery = Items(torch.eye(3), torch.tensor([-1, 0, 1]), torch.arange(3))
    for block in (gallery.take(torch.tensor([], dtype=torch.int64)), gallery):
        ranks, tied = positive_ranks(block, gallery, "inner_product", gallery.lengths())
        assert ranks.shape == tied.shape == (len(block), 1) and not ranks.any() and not tied.any()
        assert average_precision(ranks, tied).isnan().all() and reciprocal_rank(ranks, tied).isnan().all()


CLASSES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, -1])


def collapsed(noise: float, scale: float, dim: int) -> Iterator[Tensor]:
    """Ten rows that are one point but for noise of that length, relative to theirs, in several orders."""
    generator = torch.Generator().manual_seed(0)
    point = unit_rows(torch.randn(1, dim, generator=generator))
    rows = scale * (point + noise * unit_rows(torch.randn(10, dim, generator=generator)))
    for _ in range(5):
        yield rows[torch.randperm(10, generator=generator)]


@pytest.mark.parametrize(
    ("metric", "scale"), [("inner_product", 1.0), ("l2", 1.0), ("inner_product", 3e-4), ("l2", 9e3)]
)
@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("dim", [3, 512])
def test_a_collapsed_model_scores_chance(metric: SearchName, scale: float, noise: float, dim: int) -> None:
    """Ranked by the order of the files, often sorted by class, it would score anything up to 1."""
    ks = [1, 2, 4]
    for rows in collapsed(noise, scale, dim):
        items = Items(rows, CLASSES, torch.arange(10))
        queries = items.take((CLASSES >= 0).nonzero().flatten())
        expected = []
        for row, number in enumerate(CLASSES[CLASSES >= 0].tolist()):
            others = [int(label) == number for at, label in enumerate(CLASSES) if at != row]
            expected.append(slow_values([others], ks, at_r=True))
        values = fast_values(queries, items, 4, ks, True, metric)
        np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [3, 20])
def test_a_large_collapsed_gallery_scores_chance(metric: SearchName, k: int) -> None:
    """Sizes at which faiss multiplies matrices by blocks, whose edges are rounded differently."""
    generator = torch.Generator().manual_seed(0)
    rows = unit_rows(torch.randn(1, 300, generator=generator)).repeat(1101, 1)
    items = Items(rows, torch.arange(1101) // 3, torch.arange(1101))  # in the order of the classes

    def search(_rows: Tensor, block: Items, places: int) -> tuple[Tensor, Tensor]:
        return nearest(block.embeddings, rows, places, metric, [(block.keys, items.keys)])

    ranking = rank_block(torch.arange(1101), items, items, k, metric, search, items.lengths())
    functions = list(list_metrics([k], ("recall", "precision", "r_precision")).values())
    values = list_values(ranking, torch.full((1101,), 2), functions)
    chance = [1 - math.comb(1098, k) / math.comb(1100, k), 2 / 1100, 2 / 1100]
    np.testing.assert_allclose(values.numpy(), np.tile(chance, (1101, 1)), rtol=1e-12)
    ranks, tied = positive_ranks(items, items, metric, items.lengths())
    assert (ranks == 1).all() and (tied == 1100).all() and ranks.shape == (1101, 2)


def test_a_search_without_lengths_shows_all_there_is() -> None:
    """Re-ranking and indexes give the first places only: a run there ends with the last of them."""
    queries = Items(torch.ones(1, 2), torch.tensor([0]), torch.tensor([9]))
    gallery = Items(torch.ones(5, 2), torch.tensor([1, 0, 0, 0, 0]), torch.arange(5))
    search = partial(_as_they_lie, torch.full((1, 3), 2.0))
    ranking = rank_block(torch.arange(1), queries, gallery, 2, "inner_product", search, None, exhaustive=False)
    # Of the three that were seen two are hits, one of them at the two places with probability 1.
    values = list_values(ranking, torch.tensor([4]), list(list_metrics([1, 2], ("recall",)).values()))
    assert values.tolist() == [[pytest.approx(2 / 3, abs=1e-15), 1.0]]


def _as_they_lie(values: Tensor, _rows: Tensor, queries: Items, k: int) -> tuple[Tensor, Tensor]:
    return values, torch.arange(k).expand(len(queries), k)


def line(gaps: list[float], length: float = 1.0) -> Tensor:
    """Rows whose inner products with (1, 0) fall by so many resolutions of ties from one to the next."""
    falls = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(dim=0) * RESOLUTION
    near = 1 - falls
    return (length * torch.stack([near, (1 - near.square()).clamp_min(0).sqrt()], dim=1)).float()


@given(gaps=st.lists(st.floats(0, 3), min_size=1, max_size=8), counted=st.sampled_from([0, 1000]), data=st.data())
def test_where_every_item_is_a_positive_the_score_is_one(gaps: list[float], counted: int, data: st.DataObject) -> None:
    """Nearly collapsed rows lie in chains, each tied with the next but not with the one after; 1 is the maximum."""
    rows = line(gaps)
    gallery = Items(rows, torch.zeros(len(rows), dtype=torch.int64), torch.arange(len(rows)))
    query = Items(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([len(rows)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_COUNTED_POSITIVES", counted)
        k = data.draw(st.integers(1, len(rows)))
        values = fast_values(query, gallery, k, [1, k], k == len(rows), "inner_product")
    np.testing.assert_allclose(values.numpy(), 1, rtol=0, atol=1e-12)


def test_a_nearly_collapsed_model_scores_no_more_than_chance() -> None:
    """Nine tenths of the items that rounding cannot tell apart are hits: so much is the precision at any place."""
    generator = torch.Generator().manual_seed(0)
    rows = unit_rows(torch.randn(1, 64, generator=generator) + 1e-6 * torch.randn(400, 64, generator=generator))
    items = Items(rows, (torch.arange(400) % 10 > 0).long(), torch.arange(400))
    queries = items.take((items.classes == 1).nonzero().flatten())
    ranks, tied = positive_ranks(queries, items, "inner_product", items.lengths())
    # The exact mean over all orders of the 399 others; the rows are not all within one resolution.
    expected = average_precision(torch.ones(1, 359, dtype=torch.int64), torch.full((1, 359), 399)).item()
    assert expected == pytest.approx(0.9, abs=0.002)
    assert average_precision(ranks, tied).mean().item() == pytest.approx(expected, abs=0.01)


@given(data=st.data(), metric=st.sampled_from(METRICS))
def test_ranks_stay_within_the_gallery(data: st.DataObject, metric: SearchName) -> None:
    """Rows of very different lengths are rounded differently, and windows of ties that overlap must not add up."""
    count = data.draw(st.integers(2, 12))
    gaps = data.draw(st.lists(st.floats(0, 2), min_size=count - 1, max_size=count - 1))
    sizes = data.draw(st.lists(st.sampled_from([0.0, 1.0, 30.0, 1000.0]), min_size=count, max_size=count))
    rows = torch.cat([line(gaps)[:, :1], torch.tensor(sizes)[:, None]], dim=1)
    classes = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    gallery = Items(rows, classes, torch.arange(count))
    query = Items(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([count]))
    ranks, tied = positive_ranks(query, gallery, metric, gallery.lengths())
    for metric_of_ranks in (average_precision, reciprocal_rank):  # which refuse ranks that cannot be
        value = metric_of_ranks(ranks, tied)
        assert (value.isnan() | (value <= 1 + 1e-12)).all()
    assert ((ranks + tied - 1)[ranks > 0] <= count).all()


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e20])
def test_lengths_of_very_short_and_long_rows(size: float) -> None:
    """An infinite length would tie all neighbours with each other, and a query may be short enough for such rows."""
    items = Items(torch.full((1, 4), size), torch.tensor([0]), torch.tensor([0]))
    assert items.lengths().item() == pytest.approx(2 * size, rel=1e-6, abs=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-13, 2.0**13])
def test_an_index_knows_ties_at_every_scale(metric: SearchName, scale: float) -> None:
    """An index that finds every neighbour must give the values of the exact search, whatever the rows' lengths."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(200) // 4
    centres = 2 * torch.randn(50, 8, generator=generator)
    # Whole numbers times a power of two, whose products are exact in any order: only equal ones are ties.
    rows = scale * (16 * (centres[classes] + torch.randn(200, 8, generator=generator))).round()
    values = []
    for index in (None, "Flat"):
        metrics = RetrievalMetrics(ks=(1, 4), metric=metric, index=index)
        metrics.update(rows, classes)
        values.append(metrics.compute())
    assert values[1].pop("index_recall") == 1
    assert values[1] == pytest.approx(values[0], abs=1e-9)
