"""Plain evaluations and metrics by their definitions, which several tests compare with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from lightning_dml.retrieval import RetrievalMetrics

LIST_METRICS: tuple[Any, ...] = ("recall", "precision", "ndcg", "map@r", "r_precision", "map", "mrr")

Hits = tuple[bool, ...]
Runs = list[list[bool]]


def allowed(query: int, item: int, labels: Any, groups: Any, ignore: str) -> bool:
    """True where `item` counts for `query`."""
    if query == item:
        return False
    if groups[query] < 0 or groups[query] != groups[item]:
        return True
    return ignore == "label_and_group" and bool(labels[query] != labels[item])


def query_values(similarity: Sequence[float], hits: Sequence[bool], ks: Sequence[int]) -> dict[str, float]:
    """All metrics of one ranking without ties, by their definitions; scikit-learn for AP and nDCG."""
    order = sorted(range(len(hits)), key=lambda item: -similarity[item])
    ranked = [hits[item] for item in order]
    r = sum(ranked)
    values = {}
    for k in ks:
        values[f"recall@{k}"] = float(any(ranked[:k]))
        values[f"precision@{k}"] = sum(ranked[:k]) / k
        gains = sum(hit / math.log2(rank + 1) for rank, hit in enumerate(ranked[:k], start=1))
        values[f"ndcg@{k}"] = gains / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, r) + 1))
        if len(hits) > 1:
            assert values[f"ndcg@{k}"] == pytest.approx(ndcg_score([hits], [similarity], k=k))
    values["map@r"] = sum(sum(ranked[:rank]) / rank for rank in range(1, r + 1) if ranked[rank - 1]) / r
    values["r_precision"] = sum(ranked[:r]) / r
    values["map"] = float(average_precision_score(hits, similarity))
    values["mrr"] = 1 / (ranked.index(True) + 1)
    return values


def slow_evaluation(
    rows: Any, labels: Any, groups: Any, queries: Sequence[int], gallery: Sequence[int], ks: Sequence[int], ignore: str
) -> dict[int, dict[str, float]]:
    """The values of each query that has a match, by query."""
    rows = rows.astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = {}
    for query in queries:
        items = [item for item in gallery if allowed(query, item, labels, groups, ignore)]
        hits = [bool(labels[item] == labels[query] != -1) for item in items]
        if any(hits):
            values[query] = query_values([float(rows[query] @ rows[item]) for item in items], hits, ks)
    return values


def averages(values_of: dict[int, dict[str, float]], labels: Any, average: str) -> dict[str, float]:
    """Means over queries, or over the means of classes."""
    names = list(next(iter(values_of.values())))
    if average == "micro":
        return {name: float(np.mean([values[name] for values in values_of.values()])) for name in names}
    classes = sorted({int(labels[query]) for query in values_of})
    means = [
        {
            name: np.mean([values[name] for query, values in values_of.items() if labels[query] == label])
            for name in names
        }
        for label in classes
    ]
    return {name: float(np.mean([mean[name] for mean in means])) for name in names}


def evaluated(metrics: RetrievalMetrics) -> dict[str, float]:
    """The values, without the warnings that small random cases cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metrics.compute()


def orders(runs: Runs) -> Iterator[Hits]:
    """All ways in which the hits of each run can lie in it, equally probable."""
    placed = [list(combinations(range(len(run)), sum(run))) for run in runs]
    for choice in product(*placed):
        yield tuple(at in chosen for run, chosen in zip(runs, choice, strict=True) for at in range(len(run)))


def slow_recall(hits: Hits, k: int) -> float:
    """1 where a hit is among the first k, else 0."""
    return float(any(hits[:k]))


def slow_precision(hits: Hits, k: int) -> float:
    """Share of hits among the first k."""
    return sum(hits[:k]) / k


def slow_map_at_r(hits: Hits, r: int) -> float:
    """Mean of the precisions at the hits among the first r."""
    return sum(slow_precision(hits, place) for place in range(1, r + 1) if hits[place - 1]) / r


def slow_ndcg(hits: Hits, r: int, k: int) -> float:
    """Discounted gain over that of a perfect ranking."""
    gain = sum(1 / math.log2(place + 1) for place in range(1, k + 1) if hits[place - 1])
    return gain / sum(1 / math.log2(place + 1) for place in range(1, min(k, r) + 1))


def slow_average_precision(hits: Hits) -> float:
    """Mean of the precisions at all hits."""
    places = [place for place, hit in enumerate(hits, 1) if hit]
    return sum(number / place for number, place in enumerate(places, 1)) / len(places)


def slow_reciprocal_rank(hits: Hits) -> float:
    """One over the place of the first hit."""
    return 1 / (1 + hits.index(True))
