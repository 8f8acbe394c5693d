"""RetrievalMetrics in one process: against brute force and against pytorch-metric-learning."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from lightning_dml.distributed import collective_device
from lightning_dml.retrieval import RetrievalMetrics, scoring
from lightning_dml.retrieval.search import nearest
from lightning_dml.retrieval.ties import RESOLUTION
from tests.tolerances import gap, rounding


def brute_force(
    embeddings: Any, labels: Any, indices: Any, is_query: Any, is_gallery: Any, ks: tuple[int, ...], metric: str
) -> tuple[dict[str, float], float]:
    """Every definition written out, one query and one gallery item at a time, in float64.

    And the least gap between a hit and another item in a ranking, of squared distances where those are compared.
    """
    margin = math.inf
    items: dict[int, tuple[Any, int, bool, bool]] = {}
    for embedding, label, index, query, gallery in zip(embeddings, labels, indices, is_query, is_gallery, strict=True):
        items.setdefault(int(index), (embedding.astype(np.float64), int(label), bool(query), bool(gallery)))
    sums: dict[str, list[float]] = {f"recall@{k}": [] for k in ks}
    sums.update({"precision@1": [], "map@r": [], "r_precision": []})
    for index, (embedding, label, query, _) in items.items():
        if not query:
            continue
        ranked = []
        for other, (other_embedding, other_label, _, gallery) in items.items():
            if not gallery or other == index:
                continue
            if metric == "cosine":
                norms = np.linalg.norm(embedding) * np.linalg.norm(other_embedding)
                score = embedding @ other_embedding / norms
            elif metric == "inner_product":
                score = embedding @ other_embedding
            else:
                score = -(np.linalg.norm(embedding - other_embedding) ** 2)
            ranked.append((score, other_label == label))
        ranked.sort(key=lambda pair: -pair[0])
        margin = min([margin, *(high[0] - low[0] for high, low in pairwise(ranked) if high[1] != low[1])])
        hits = [hit for _, hit in ranked]
        r = sum(hits)
        if r == 0:
            continue
        for k in ks:
            sums[f"recall@{k}"].append(float(any(hits[:k])))
        sums["precision@1"].append(float(hits[0]))
        sums["r_precision"].append(sum(hits[:r]) / r)
        sums["map@r"].append(sum(sum(hits[:i]) / i for i in range(1, r + 1) if hits[i - 1]) / r)
    return {name: float(np.mean(values)) if values else math.nan for name, values in sums.items()}, margin


def computed(metrics: RetrievalMetrics) -> dict[str, float]:
    """The values, without the warnings that small random cases cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unmatched queries and large K are common in small random cases
        return metrics.compute()


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 40),
    classes=st.integers(1, 9),
    duplicates=st.integers(0, 10),
    roles=st.sampled_from(["self", "split", "mixed"]),
    metric=st.sampled_from(["cosine", "inner_product", "l2"]),
    batch=st.integers(1, 17),
)
def test_equals_brute_force(
    seed: int, n: int, classes: int, duplicates: int, roles: str, metric: Any, batch: int
) -> None:
    """Any batching, roles, duplicates and metric must give the numbers of the definition."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    indices = rng.permutation(3 * n)[:n]
    is_query = np.ones(n, bool) if roles == "self" else rng.random(n) < 0.5
    is_gallery = {"self": np.ones(n, bool), "split": ~is_query, "mixed": rng.random(n) < 0.6}[roles]
    # Copies come last and are embedded anew: the first of an index must be the one that counts.
    assume(is_query.any() and is_gallery.any())  # there is nothing to evaluate otherwise, which compute() says
    rows = np.concatenate([np.arange(n), rng.integers(n, size=duplicates)])
    embeddings = rng.standard_normal((n + duplicates, 5)).astype(np.float32)
    columns = (embeddings, labels[rows], indices[rows], is_query[rows], is_gallery[rows])
    ks = (1, 2, 5)

    metrics = RetrievalMetrics(ks=ks, metric=metric)
    for start in range(0, len(rows), batch):
        metrics.update(*(torch.from_numpy(column[start : start + batch].copy()) for column in columns))

    expected, margin = brute_force(*columns, ks, metric)
    # Similarities of a hit and of another item that are this near may change places in float32; below RESOLUTION they
    # are ties. Squared distances have the rounding of products up to the square of the sum of two lengths.
    longest = 1.0 if metric == "cosine" else 2 * float(np.linalg.norm(embeddings, axis=1).max())
    assume(margin > rounding(5 + 3, longest**2) + RESOLUTION * longest**2)
    assert computed(metrics) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def clustered(n: int, classes: int, dim: int = 8, noise: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that overlap, so that the metrics are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n) % classes
    rows = centres[labels] + noise * torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1), labels


@pytest.mark.parametrize("self_retrieval", [True, False])
def test_equals_pytorch_metric_learning(self_retrieval: bool) -> None:
    """Users who switch from that library must find their numbers again."""
    embeddings, labels = clustered(300, 23)
    is_query = torch.arange(300) < 120
    metrics = RetrievalMetrics(ks=(1,))
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"), k="max_bin_count"
    )
    if self_retrieval:
        metrics.update(embeddings, labels)
        expected = calculator.get_accuracy(embeddings, labels)
    else:
        metrics.update(embeddings, labels, is_query=is_query, is_gallery=~is_query)
        expected = calculator.get_accuracy(
            embeddings[is_query], labels[is_query], embeddings[~is_query], labels[~is_query]
        )
    values = metrics.compute()
    assert 0.2 < values["map@r"] < 0.9  # neither trivial nor hopeless
    assert values["precision@1"] == values["recall@1"] == pytest.approx(expected["precision_at_1"], rel=1e-6)
    assert values["r_precision"] == pytest.approx(expected["r_precision"], rel=1e-6)
    assert values["map@r"] == pytest.approx(expected["mean_average_precision_at_r"], rel=1e-6)


def test_the_keys_and_their_types() -> None:
    """Loggers and checkpoints refer to these names; tensors would break JSON."""
    embeddings, labels = clustered(40, 4)
    metrics = RetrievalMetrics()
    metrics.update(embeddings, labels)
    values = metrics.compute()
    assert list(values) == [
        "recall@1", "recall@2", "recall@4", "recall@8", "precision@1", "map@r", "r_precision"
    ]  # fmt: skip
    assert all(type(value) is float for value in values.values())


def test_large_labels_do_not_collide() -> None:
    """Labels are often hashes or ids, and float32 merges those above 2**24."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([2**24, 2**24 + 1, 2**24, 2**24 + 1])
    metrics = RetrievalMetrics(ks=(1,))
    metrics.update(embeddings, labels)
    # Each row lies beside the other class; as float32, both classes would be one and every value 1.
    assert metrics.compute() == {"recall@1": 0.0, "precision@1": 0.0, "map@r": 0.0, "r_precision": 0.0}


def test_k_above_the_gallery_counts_all_of_it() -> None:
    """A small validation set should give values and one warning, not an error."""
    embeddings, _ = clustered(6, 3)
    metrics = RetrievalMetrics(ks=(2, 5, 6, 100))
    metrics.update(embeddings, torch.tensor([0, 0, 0, 0, 1, 1]))
    with pytest.warns(UserWarning, match=r"ks: \[6, 100\] are more than the 5 gallery items of a query") as caught:
        values = metrics.compute()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert values["recall@5"] == values["recall@6"] == values["recall@100"] == 1.0
    assert 0 < values["map@r"] <= 1

    metrics.reset()
    metrics.update(embeddings, torch.zeros(6, dtype=torch.int64))
    assert set(computed(metrics).values()) == {1.0}


def test_a_query_outside_a_small_gallery_finds_all_of_it() -> None:
    """Queries inside and outside the gallery have different numbers of candidates."""
    # Row 0 has only two candidates, row 3 has three, and needs all of them for its R.
    metrics = RetrievalMetrics(ks=(1,))
    metrics.update(
        torch.randn(4, 3),
        torch.zeros(4, dtype=torch.int64),
        is_query=torch.tensor([True, False, False, True]),
        is_gallery=torch.tensor([True, True, True, False]),
    )
    assert metrics.compute() == {"recall@1": 1.0, "precision@1": 1.0, "map@r": 1.0, "r_precision": 1.0}


def test_one_warning_tells_of_queries_without_a_match() -> None:
    """Left out in silence, they would make the number look like that of the whole set."""
    metrics = RetrievalMetrics(ks=(1,))
    rows = torch.tensor([[5.0, 0.0], [5.0, 1.0], [5.0, 2.0], [0.0, 1.0], [1.0, 9.0]])
    metrics.update(rows, torch.tensor([0, 0, 0, 1, 2]))
    with pytest.warns(UserWarning, match="2 of 5 queries have no match in the gallery; they are left out") as caught:
        values = metrics.compute()
    assert len(caught) == 1
    assert values["recall@1"] == brute_force(
        rows.numpy(), [0, 0, 0, 1, 2], range(5), [True] * 5, [True] * 5, (1,), "cosine"
    )[0]["recall@1"] == 1.0  # fmt: skip


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({}, "3 of 3 queries have no match in the gallery; so every value is NaN"),
        ({"is_gallery": torch.tensor([True, False, False])}, "3 of 3 queries"),
    ],
)
def test_without_any_match_values_are_nan(roles: dict[str, Tensor], message: str) -> None:
    """0 would read as a bad model where the data are at fault."""
    metrics = RetrievalMetrics(ks=(1, 8))
    metrics.update(torch.eye(3), torch.arange(3), **roles)
    with pytest.warns(UserWarning, match=message) as caught:
        values = metrics.compute()
    assert len(caught) == 1
    assert len(values) == 5 and all(math.isnan(value) for value in values.values())


def test_cosine_is_the_default_and_does_not_need_unit_rows() -> None:
    """Not every embedder normalises; the default must not reward long rows."""
    embeddings, labels = clustered(120, 12)
    unit, scaled, raw = RetrievalMetrics(), RetrievalMetrics(), RetrievalMetrics(metric="inner_product")
    lengths = torch.rand(120, 1) * 20 + 0.1
    unit.update(embeddings, labels)
    scaled.update(embeddings * lengths, labels)
    raw.update(embeddings * lengths, labels)
    assert unit.compute() == scaled.compute()
    assert raw.compute() != unit.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept_as_float32(dtype: torch.dtype) -> None:
    """Half precision would fill the gallery with ties, and double its memory."""
    embeddings, labels = clustered(60, 6)
    metrics, expected = RetrievalMetrics(), RetrievalMetrics()
    metrics.update(embeddings.to(dtype), labels.to(torch.int16))
    expected.update(embeddings.to(dtype).float(), labels)
    assert metrics.embeddings[0].dtype == torch.float32 and metrics.labels[0].dtype == torch.int64
    assert metrics.compute() == expected.compute()


def test_large_r_is_searched_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of many images would otherwise need more memory than there is."""
    embeddings, labels = clustered(50, 2)
    metrics = RetrievalMetrics(ks=(1,))
    metrics.update(embeddings, labels)
    expected = metrics.compute()
    searched = []

    def spy(queries: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        searched.append(len(queries))
        return nearest(queries, *args)

    monkeypatch.setattr(scoring, "nearest", spy)
    monkeypatch.setattr(scoring, "_BLOCK_NEIGHBOURS", 25 * 7 + 3)  # R is 24, and one place more shows ties
    # faiss adds up the products of few queries in another order, which no two neighbours may be near enough to show.
    similarities = embeddings.double() @ embeddings.double().T
    assert gap(similarities) > rounding(8 + 3)
    assert metrics.compute() == pytest.approx(expected, rel=rounding(25, dtype=torch.float64))
    assert searched == [7] * 7 + [1]


def test_a_batch_may_be_empty_and_a_buffer_used_again() -> None:
    """A metric that keeps views instead of copies would see only the last batch."""
    embeddings, labels = clustered(40, 5)
    expected, metrics = RetrievalMetrics(), RetrievalMetrics()
    expected.update(embeddings, labels, torch.arange(40))
    metrics.update(embeddings[:0], labels[:0])  # says nothing about indices either
    buffer, numbers = torch.empty(10, 8), torch.empty(10, dtype=torch.int64)
    for start in range(0, 40, 10):
        buffer.copy_(embeddings[start : start + 10])
        numbers.copy_(labels[start : start + 10])
        metrics.update(buffer, numbers, torch.arange(start, start + 10))
    assert metrics.compute() == expected.compute()


def test_reset_copies_pickles_and_renewed_updates() -> None:
    """A cached value that outlives new rows would report the last epoch again."""
    embeddings, labels = clustered(80, 8)
    metrics = RetrievalMetrics()
    metrics.update(embeddings[:40], labels[:40])
    first = metrics.compute()
    twin, thawed = copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))
    metrics.update(embeddings[40:], labels[40:])
    both = metrics.compute()
    assert both != first
    assert twin.compute() == thawed.compute() == first
    thawed.update(embeddings[40:], labels[40:])
    assert thawed.compute() == both
    metrics.reset()
    metrics.update(embeddings[:40], labels[:40], torch.arange(40))  # and indices are a fresh choice
    assert metrics.compute() == first


def test_moves_and_casts_leave_the_rows_alone() -> None:
    """Casting a model to bfloat16 must not reach labels that it would round."""
    embeddings, labels = clustered(40, 5)
    metrics = RetrievalMetrics()
    metrics.update(embeddings, labels + 2**24)
    expected = metrics.compute()
    torch.nn.Sequential(metrics).to(torch.bfloat16)
    metrics.set_dtype(torch.float16)
    metrics.to("meta")
    assert metrics.compute() == expected
    assert metrics.embeddings[0].dtype == torch.float32 and metrics.labels[0].dtype == torch.int64
    assert not metrics.state_dict()


def test_there_is_no_value_per_batch() -> None:
    """The forward of torchmetrics would log recall within a batch, which means nothing."""
    with pytest.raises(NotImplementedError, match=r"call update\(\)"):
        RetrievalMetrics()(torch.eye(3), torch.zeros(3, dtype=torch.int64))


def test_nccl_carries_cuda_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wait on the CPU; sent through NCCL from there, they would stop the job."""
    devices = []
    monkeypatch.setattr("lightning_dml.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    for backend in ("nccl", "gloo"):
        monkeypatch.setattr("torch.distributed.get_backend", lambda backend=backend: backend)
        devices.append(str(collective_device()))
    assert devices == ["cuda:3", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_from_a_gpu_are_searched_there_with_the_same_result() -> None:
    """The GPU is there for speed; it must be used and change no value."""
    embeddings, labels = clustered(400, 40)
    on_cpu, on_gpu = RetrievalMetrics(), RetrievalMetrics()
    on_cpu.update(embeddings, labels, torch.arange(400))
    on_gpu.update(embeddings.cuda(), labels.cuda(), torch.arange(400).cuda())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert on_gpu.compute() == on_cpu.compute()
    assert torch.cuda.max_memory_allocated() > before


def test_a_metric_filled_on_a_gpu_computes_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickled metric may be opened on a laptop."""
    embeddings, labels = clustered(40, 5)
    metrics = RetrievalMetrics()
    metrics.update(embeddings, labels)
    expected = metrics.compute()
    metrics._search_device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert metrics.compute() == expected
