"""Faults that were observed in pytorch-metric-learning's AccuracyCalculator (2.9.0), each with the right value instead.

Labels in float32 are in test_retrieval_metrics.py; what needs several ranks is in test_retrieval_ranks.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval import RetrievalMetrics

EVERYTHING: tuple[Any, ...] = ("recall", "precision", "ndcg", "map@r", "r_precision", "map", "mrr")


def evaluated(rows: Tensor, labels: Tensor, **options: Any) -> dict[str, float]:
    """The values of self-retrieval, without warnings about small sets."""
    metrics = RetrievalMetrics(**{"include": EVERYTHING, **options})
    metrics.update(rows, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metrics.compute()


@pytest.mark.parametrize("k", [2, 5, 6, 40])
def test_no_value_is_above_one_where_k_exceeds_the_gallery(k: int) -> None:
    """The peer's MAP@R reached 1.595, which no reader of a table would believe."""
    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(k)), dim=1)
    for labels in (torch.zeros(6).long(), torch.tensor([0, 0, 0, 1, 1, 1])):
        values = evaluated(rows, labels, ks=(1, k))
        assert all(0 <= value <= 1 for value in values.values())
    assert evaluated(rows, torch.zeros(6).long(), ks=(k,))["map@r"] == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_is_named_and_scores_nothing(broken: float) -> None:
    """NaN queries scored a precision of 1.0 at the peer: the worst model looked like the best."""
    rows = torch.randn(8, 4)
    rows[3, 2] = rows[5, 0] = broken
    with pytest.raises(InputError, match="embeddings has NaN or infinite values in 2 of 8 rows, the first is row 3"):
        evaluated(rows, torch.zeros(8).long())


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_collapsed_embedding_scores_chance_in_whatever_order_its_rows_come(metric: Any, noise: float) -> None:
    """At the peer, and with any search that breaks ties by row, a set sorted by class made a collapsed model shine."""
    per_class, classes = 5, 40
    n = per_class * classes
    in_order = torch.arange(n) // per_class
    shuffled = in_order[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    rows = torch.tensor([[0.3, -0.7, 0.2, 0.9]]).repeat(n, 1)
    rows = rows + noise * torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    results = [evaluated(rows, labels, metric=metric, ks=(1, 10)) for labels in (in_order, shuffled)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    # Of n - 1 candidates, per_class - 1 are right, in random order.
    r, others = per_class - 1, n - 1
    missed = math.prod((others - r - place) / (others - place) for place in range(10))
    assert results[0]["recall@1"] == pytest.approx(r / others)
    assert results[0]["recall@10"] == pytest.approx(1 - missed)
    assert results[0]["r_precision"] == pytest.approx(r / others)


def test_duplicates_of_other_classes_are_neither_found_first_nor_last() -> None:
    """The same photograph under two labels is found or not by the order of the files, unless ties are averaged."""
    rows = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2, 3])]
    labels = torch.tensor([0, 0, 1, 1, 0, 2, 2])
    expected = evaluated(rows, labels, ks=(1, 2))
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        assert evaluated(rows[order], labels[order], ks=(1, 2)) == pytest.approx(expected, rel=1e-12)
    # Item 0 has a twin of its class and one of another; it finds its own first in half of all orders.
    metrics = RetrievalMetrics(ks=(1,))
    is_query = torch.arange(7) == 0
    metrics.update(rows, labels, is_query=is_query)
    assert metrics.compute()["recall@1"] == 0.5


def test_recall_at_k_counts_any_hit_for_several_k() -> None:
    """The field reports Recall@1, 2, 4, 8; the peer has precision@1 only, and others call the share of positives so."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((60, 5)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(12, size=60))
    values = evaluated(rows, labels, ks=(1, 2, 4, 8), metric="l2")
    distances = torch.cdist(rows.double(), rows.double()).fill_diagonal_(math.inf)
    hits = labels[distances.argsort(dim=1)[:, :-1]] == labels[:, None]
    answerable = hits.any(dim=1)
    for k in (1, 2, 4, 8):
        assert values[f"recall@{k}"] == pytest.approx(hits[answerable, :k].any(dim=1).double().mean().item())


MEMORY = """
import sys
from pathlib import Path
import torch
from lightning_dml.retrieval import RetrievalMetrics

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

torch.set_num_threads(1)
metrics = RetrievalMetrics(include=("recall", "map@r", "map", "mrr"))
for n in (2_000, 12_000):
    metrics.reset()
    rows, labels = torch.randn(n, 16), torch.arange(n) // 5
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    metrics.update(rows, labels)
    metrics.compute()
    added = status("VmHWM") - before
print(added / 1024)
"""


def test_memory_does_not_grow_with_the_square_of_the_rows() -> None:
    """The peer's default takes 1.5 GB for 5,000 rows; of 12,000, the matrix of all pairs alone would take 580 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300
