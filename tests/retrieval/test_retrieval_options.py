"""The options of RetrievalMetrics against a plain evaluation of one query after the other, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import (
    adjusted_mutual_info_score,
    normalized_mutual_info_score,
)

from lightning_dml.errors import InputError
from lightning_dml.retrieval import (
    DatabaseAugmentation,
    KReciprocal,
    QueryExpansion,
    RetrievalMetrics,
    RetrievalResult,
)
from lightning_dml.retrieval.clustering import kmeans_labels
from lightning_dml.retrieval.ties import RESOLUTION
from tests.retrieval.cases import LIST_METRICS, averages, evaluated, slow_evaluation
from tests.tolerances import gap, rounding


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(4, 40),
    classes=st.integers(1, 8),
    cameras=st.integers(0, 4),
    distractors=st.integers(0, 8),
    ignore=st.sampled_from(["label_and_group", "group"]),
    average=st.sampled_from(["micro", "macro"]),
)
def test_equals_a_plain_evaluation(
    seed: int, n: int, classes: int, cameras: int, distractors: int, ignore: Any, average: Any
) -> None:
    """Groups, distractors, averages and every metric must hold together, not each on its own."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.integers(classes, size=n) * 10**12 - 7, np.full(distractors, -1)])
    rows = rng.standard_normal((len(labels), 6)).astype(np.float32)
    groups = rng.integers(-1, max(cameras, 1), size=len(labels)) if cameras else np.full(len(labels), -1)
    is_query = (rng.random(len(labels)) < 0.7) & (labels != -1)
    is_gallery = (rng.random(len(labels)) < 0.8) | (labels == -1)
    assume(is_query.any() and is_gallery.any())  # there is nothing to evaluate otherwise, which compute() says
    ks = (1, 3, 60)

    metrics = RetrievalMetrics(ks=ks, include=LIST_METRICS, ignore=ignore, average=average)
    metrics.update(
        torch.from_numpy(rows),
        torch.from_numpy(labels),
        torch.arange(len(labels)),
        torch.from_numpy(is_query),
        torch.from_numpy(is_gallery),
        torch.from_numpy(groups),
    )
    # Two similarities that are nearer than rounding may change places, and those within RESOLUTION are ties.
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1)
    assume(gap(unit @ unit.T) > rounding(6 + 5) + RESOLUTION)
    values = evaluated(metrics)

    queries, gallery = is_query.nonzero()[0].tolist(), is_gallery.nonzero()[0].tolist()
    expected = slow_evaluation(rows, labels, groups, queries, gallery, ks, ignore)
    result = metrics.result
    assert isinstance(result, RetrievalResult)
    assert (result.queries, result.unmatched, result.items) == (len(queries), len(queries) - len(expected), len(rows))
    if not expected:
        assert all(math.isnan(value) for value in values.values())
        return
    assert values == pytest.approx(averages(expected, labels, average), rel=1e-9)
    per_class = result.per_class
    assert per_class is not None
    for label, means in per_class.as_dict().items():
        of_class = {query: its_values for query, its_values in expected.items() if labels[query] == label}
        assert means == pytest.approx(averages(of_class, labels, "micro"), rel=1e-9)


def clustered(n: int = 200, classes: int = 20, noise: float = 0.6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, so that the metrics are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(classes, 8, generator=generator)[labels] + noise * torch.randn(n, 8, generator=generator), labels


def test_the_protocol_of_vehicleid_is_the_mean_over_its_draws() -> None:
    """Published numbers are means over random galleries; a single draw is off by its luck."""
    rows, labels = clustered(120, 30)
    labels[:2] = -1  # distractors stay in every gallery
    metrics = RetrievalMetrics(ks=(1, 5), gallery_draws=4, seed=3)
    metrics.update(rows, labels, torch.arange(120) + 5)
    values = metrics.compute()

    rng = np.random.default_rng(3)
    draws = []
    nobody = np.full(120, -1)
    for _ in range(4):
        first: dict[int, int] = {}
        for item in rng.permutation(120).tolist():
            first.setdefault(int(labels[item]), item)
        gallery = [item for label, item in first.items() if label != -1] + [0, 1]
        queries = [item for item in range(120) if item not in gallery]
        its_values = slow_evaluation(rows.numpy(), labels.numpy(), nobody, queries, gallery, (1, 5), "group")
        assert len(its_values) == len(queries) == 120 - 30 - 2
        draws.append(averages(its_values, labels, "micro"))
    for name, value in values.items():
        assert value == pytest.approx(np.mean([draw[name] for draw in draws]))
    assert len({draw["recall@1"] for draw in draws}) > 1
    assert metrics.result is not None and metrics.result.queries == 4 * 88


def test_draws_and_roles_exclude_each_other() -> None:
    """Roles that the draws override would be dropped in silence."""
    metrics = RetrievalMetrics(gallery_draws=2)
    metrics.update(torch.eye(3), torch.zeros(3).long(), is_query=torch.ones(3).bool())
    with pytest.raises(InputError, match="is_gallery is not True for all rows, but gallery_draws=2 draws the roles"):
        metrics.update(torch.eye(3), torch.zeros(3).long(), is_gallery=torch.tensor([True, False, True]))


def test_intervals_surround_the_values_and_widen_with_confidence() -> None:
    """An interval is what tells a gain from luck; it must belong to the value beside it."""
    rows, labels = clustered()
    results = {}
    for confidence in (0.5, 0.95):
        metrics = RetrievalMetrics(ks=(1,), confidence=confidence)
        metrics.update(rows, labels)
        results[confidence] = metrics.compute()
    for name in ("recall@1", "map@r"):
        low, high = (results[0.95][f"{name}/{end}"] for end in ("low", "high"))
        inner = [results[0.5][f"{name}/{end}"] for end in ("low", "high")]
        assert low < inner[0] < results[0.95][name] < inner[1] < high


def test_clustering_metrics_look_at_all_labelled_items() -> None:
    """Distractors belong to no class, and queries without a match still have a cluster."""
    # Sixteen signs around those of the class: rows of length 4, so that no way to make them unit rounds, and k-means,
    # which a last digit may lead elsewhere, has the same numbers.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    centres = torch.randint(2, (10, 16), generator=generator).float() * 2 - 1
    rows = centres[labels] * torch.where(torch.rand(200, 16, generator=generator) < 0.12, -1.0, 1.0)
    labels[0] = 77  # alone in its class, so no query can find it
    metrics = RetrievalMetrics(include=("nmi", "ami"), ks=(1,), seed=5)
    metrics.update(torch.cat([rows, -rows[:5]]), torch.cat([labels * 10**9, torch.full((5,), -1)]))
    values = metrics.compute()
    clusters = kmeans_labels(torch.nn.functional.normalize(rows, dim=1), 11, seed=5)
    assert 0.5 < values["ami"] < values["nmi"]
    assert values["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert values["ami"] == pytest.approx(adjusted_mutual_info_score(labels, clusters))
    assert metrics.result is not None and metrics.result.per_class is None


def test_the_order_of_include_is_the_order_of_the_keys_and_names_come_once() -> None:
    """Tables and CSV columns follow it; a key that comes twice would be counted twice."""
    rows, labels = clustered(60, 6)
    metrics = RetrievalMetrics(ks=(1, 2), include=("mrr", "precision", "precision@1", "map@r"), confidence=0.9)
    metrics.update(rows, labels)
    names = ["mrr", "precision@1", "precision@2", "map@r"]
    assert list(metrics.compute()) == [*names, *(f"{name}/{end}" for name in names for end in ("low", "high"))]


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_half_precision_halves_the_memory_and_hardly_moves_the_values(metric: Any) -> None:
    """Sets of millions are kept in float16 by choice; the search is still float32."""
    rows, labels = clustered(400, 40)
    values = {}
    for dtype in ("float32", "float16"):
        metrics = RetrievalMetrics(metric=metric, dtype=dtype, include=("recall", "map@r", "map"))
        for start in range(0, 400, 64):
            metrics.update(rows[start : start + 64], labels[start : start + 64])
        values[dtype] = metrics.compute()
        (stored,) = metrics.embeddings  # the batches have become one piece
        assert stored.dtype == getattr(torch, dtype) and stored.shape == (400, 8)
    assert values["float16"] == pytest.approx(values["float32"], abs=0.01)
    assert values["float16"] != values["float32"]


def test_rows_too_large_for_half_precision_are_refused() -> None:
    """Turned to infinity on the quiet, they would be everybody's nearest neighbours."""
    metrics = RetrievalMetrics(metric="l2", dtype="float16")
    with pytest.raises(InputError, match="embeddings in float16 has NaN or infinite values in 1 of 3 rows"):
        metrics.update(torch.eye(3) * torch.tensor([[1.0], [70_000.0], [1.0]]), torch.zeros(3).long())
    assert not metrics.embeddings


@pytest.mark.parametrize(
    "reranking", [[QueryExpansion(k=3)], [DatabaseAugmentation(k=3), QueryExpansion(k=2)], [KReciprocal(k1=6, k2=3)]]
)
def test_reranking_changes_the_ranking_and_helps_on_noisy_classes(reranking: Any) -> None:
    """Re-ranking exists to raise MAP where neighbours of neighbours are of one class."""
    rows, labels = clustered(300, 15, noise=0.9)
    plain, reranked = RetrievalMetrics(), RetrievalMetrics(reranking=reranking)
    for metrics in (plain, reranked):
        metrics.update(rows, labels)
    assert reranked.compute()["map@r"] > plain.compute()["map@r"] + 0.02


def test_an_approximate_index_reports_what_it_misses() -> None:
    """A recall of 80 % may be the model's or the index's fault; the number beside it says which."""
    # Squared distances of whole numbers are exact in any order of sums, so that the index cannot exchange neighbours.
    rows, labels = clustered(2_000, 100)
    rows = (16 * rows).round()
    exact = RetrievalMetrics(ks=(1,), metric="l2")
    exact.update(rows, labels)
    expected = exact.compute()
    recalls = []
    for parameters in ("nprobe=1", "nprobe=16"):
        metrics = RetrievalMetrics(ks=(1,), metric="l2", index="IVF16,Flat", index_parameters=parameters)
        metrics.update(rows, labels)
        values = metrics.compute()
        assert list(values) == [*expected, "index_recall"]
        recalls.append(values.pop("index_recall"))
    assert 0.3 < recalls[0] < 0.99 and recalls[1] == 1.0
    assert values == pytest.approx(expected)  # with every list probed the search is exact


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "include a string": ({"include": "recall"}, "include must be a list of some of recall, .* got 'recall'"),
    "include unknown": ({"include": ["recall@1"]}, r"include must be .* got \['recall@1'\]; the K .* are ks"),
    "include nothing": ({"include": []}, r"include must be .* got \[\]"),
    "average": ({"average": "weighted"}, "average must be one of micro, macro, got 'weighted'"),
    "confidence": ({"confidence": 95.0}, "confidence must be .* got 95.0"),
    "bootstrap draws": (
        {"confidence": 0.9, "bootstrap_draws": 0},
        "bootstrap_draws must be an integer of at least 1, got 0",
    ),
    "ignore": ({"ignore": "camera"}, "ignore must be one of label_and_group, group, got 'camera'"),
    "gallery draws": ({"gallery_draws": -1}, "gallery_draws must be an integer of at least 0, got -1"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "dtype": ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, got 'bfloat16'"),
    "reranking kind": ({"reranking": ["dba"]}, r"reranking must be a list of .* objects, got \['dba'\]"),
    "reranking with l2": (
        {"reranking": [QueryExpansion()], "metric": "l2"},
        "reranking works on cosine similarities, got metric='l2'",
    ),
    "a step twice": ({"reranking": [QueryExpansion(), QueryExpansion(k=2)]}, "names one kind of step twice"),
    "k-reciprocal and more": ({"reranking": [KReciprocal(), QueryExpansion()]}, "KReciprocal .* stands alone"),
    "k-reciprocal and an index": (
        {"reranking": [KReciprocal()], "index": "HNSW8"},
        "reranking searches exactly in steps of its own, got index='HNSW8'",
    ),
    "a step by itself": ({"reranking": KReciprocal()}, "reranking must be a list of .* objects"),
    "ks a number": ({"ks": 5}, "ks must be one or more integers of at least 1, got 5"),
    "include none": ({"include": None}, "include must be a list of some of .* got None"),
    "an index of nothing": ({"index": "IVF4,Flat", "include": ["nmi"]}, "has no metric of a search"),
    "an interval of nothing": ({"confidence": 0.9, "include": ["ami"]}, "confidence=0.9 is for metrics of queries"),
    "unknown index": ({"index": "Foo"}, "index must be a faiss factory string such as .* got 'Foo'"),
    "empty index": ({"index": ""}, "index must be a faiss factory string .* got ''"),
    "index of another type": ({"index": 4}, "index must be a faiss factory string .* got 4"),
    "unknown parameter": ({"index": "IVF4,Flat", "index_parameters": "probes=3"}, "probes"),
    "parameters without an index": ({"index_parameters": "nprobe=3"}, "index_parameters='nprobe=3' are those of"),
    "map of an index": ({"index": "Flat", "include": ["map", "mrr"]}, "map and mrr look at the whole ranking"),
    "mrr of k-reciprocal": ({"reranking": [KReciprocal()], "include": ["mrr"]}, "of which KReciprocal gives"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_options_are_checked_when_the_metric_is_made(case: str) -> None:
    """An option that does not fit must not be found after an epoch of training."""
    options, message = CONFLICTS[case]
    with pytest.raises(InputError, match=message):
        RetrievalMetrics(**options)


def test_groups_are_given_always_or_never() -> None:
    """Rows without a group among others would be found by their own camera."""
    metrics = RetrievalMetrics()
    metrics.update(torch.eye(3), torch.zeros(3).long(), groups=torch.zeros(3).long())
    with pytest.raises(InputError, match="groups were given to some updates only"):
        metrics.update(torch.eye(3), torch.zeros(3).long())
    with pytest.raises(InputError, match=r"groups must be integers, got torch\.float32"):
        metrics.update(torch.eye(3), torch.zeros(3).long(), groups=torch.zeros(3))
