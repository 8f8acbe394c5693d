"""The search of an ApproximateIndex and its recall, against the exact search and loops."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightning_dml.retrieval.index.approximate as module
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from lightning_dml.retrieval.search import nearest, unit_rows
from tests.retrieval.index.cases import METRICS, rows
from tests.tolerances import rounding


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exclude", [False, True])
def test_a_flat_index_is_the_exact_search(metric: Any, exclude: bool) -> None:
    """Normalising, order and exclusion are ours, and only here are they seen without the error of an index."""
    gallery, queries = rows(90) * 3, rows(20, seed=1)
    keys = [(torch.arange(20) % 4, torch.arange(90) % 7 - 1)] if exclude else []
    values, positions = ApproximateIndex(gallery, "Flat", metric).search(queries, 6, keys)
    if metric == "cosine":
        queries, gallery = unit_rows(queries), unit_rows(gallery)
    expected = nearest(queries, gallery, 6, "l2" if metric == "l2" else "inner_product", keys)
    # By value: the two may add in other orders and exchange neighbours that are nearer to each other than rounding.
    bound = rounding(3 * (8 + 2), (queries.norm(dim=1).max() + gallery.norm(dim=1).max()) ** 2)
    pairs = torch.cdist(queries.double(), gallery.double()).square()
    pairs = pairs if metric == "l2" else queries.double() @ gallery.double().T
    for its_values, its_positions in ((values, positions), expected):
        torch.testing.assert_close(its_values.double(), pairs.gather(1, its_positions), rtol=0, atol=bound)
    torch.testing.assert_close(values, expected[0], rtol=0, atol=bound)
    assert all(len(set(places)) == 6 for places in positions.tolist())
    assert values.dtype == torch.float32 and positions.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
def test_recall_rises_with_the_lists_that_are_probed(metric: Any) -> None:
    """An IVF index is chosen because nprobe trades time for recall, up to the exact answer."""
    gallery, queries = rows(800), rows(50, seed=1)
    index = ApproximateIndex(gallery, "IVF16,Flat", metric)
    recalls = []
    for probes in (1, 2, 4, 16):
        index.parameters = f"nprobe={probes}"
        recalls.append(index.recall(queries, 5, gallery))
    assert recalls == sorted(recalls)
    assert 0.1 < recalls[0] < recalls[1] < recalls[2] < recalls[3] == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("factory", "parameters", "least"),
    [
        ("HNSW16", "efSearch=64", 0.95),
        ("SQ8", "", 0.9),
        ("PQ4x4", "", 0.15),
        ("OPQ4_8,IVF4,PQ4x4", "nprobe=4", 0.15),
        ("PCA6,IVF4_HNSW8,PQ3x4fs,RFlat", "nprobe=4,k_factor_rf=50", 0.8),
        ("NSG16", "", 0.9),
    ],
)
@pytest.mark.filterwarnings("ignore:factory 'OPQ4")
def test_the_kinds_of_index_work_with_every_metric(metric: Any, factory: str, parameters: str, least: float) -> None:
    """Each takes another way through training, adding and parameters; random ranking would recall 5 of 700."""
    gallery, queries = rows(700), rows(40, seed=1)
    index = ApproximateIndex(gallery, factory, metric, parameters)
    values, positions = index.search(queries, 5)
    assert index.recall(queries, 5, gallery) >= least
    assert all(len(set(row)) == 5 for row in positions.tolist())
    steps = values.diff(dim=1)
    assert (steps >= 0).all() if metric == "l2" else (steps <= 0).all()
    assert (positions >= 0).all() and (positions < 700).all() and torch.isfinite(values).all()


@given(
    queries=st.lists(st.integers(-2, 4), min_size=1, max_size=5),
    gallery=st.lists(st.integers(-2, 4), min_size=30, max_size=30),
    groups=st.lists(st.integers(-1, 2), min_size=30, max_size=30),
    k=st.integers(1, 35),
    metric=st.sampled_from(METRICS),
)
def test_exclusion_filters_the_full_ranking(
    queries: list[int], gallery: list[int], groups: list[int], k: int, metric: Any
) -> None:
    """However many are left out of however few, the others keep their order and nothing else is lost."""
    index = ApproximateIndex(rows(30), "SQ8", metric)
    wanted = rows(len(queries), seed=1)
    group_of_query = [query % 3 - 1 for query in queries]
    exclude = [
        (torch.tensor(queries), torch.tensor(gallery)),
        (torch.tensor(group_of_query, dtype=torch.int32), torch.tensor(groups)),
    ]
    everything = index.search(wanted, 30)
    values, positions = index.search(wanted, k, exclude)
    worst = float("inf") if metric == "l2" else float("-inf")
    for row, query in enumerate(queries):
        others = [
            (float(value), int(place))
            for value, place in zip(everything[0][row], everything[1][row], strict=True)
            if not (query >= 0 and gallery[place] == query)
            and not (group_of_query[row] >= 0 and groups[place] == group_of_query[row])
        ]
        expected = (others + [(worst, -1)] * k)[:k]
        assert positions[row].tolist() == [place for _, place in expected]
        assert values[row].tolist() == pytest.approx([value for value, _ in expected])


@pytest.mark.parametrize("metric", METRICS)
def test_places_that_the_index_cannot_fill_are_marked(metric: Any) -> None:
    """Faiss leaves its largest float there, which would pass for a similarity."""
    gallery = rows(400)
    index = ApproximateIndex(gallery, "IVF8,Flat", metric, "nprobe=1")
    values, positions = index.search(rows(10, seed=1), 400)
    missing = positions < 0
    assert missing.any(dim=1).all() and (~missing).any(dim=1).all()
    assert torch.equal(missing, missing.sort(dim=1, stable=True).values)  # at the end
    assert (values[missing] == (float("inf") if metric == "l2" else float("-inf"))).all()
    assert torch.isfinite(values[~missing]).all()


def test_no_queries_are_none_found() -> None:
    """A rank whose share of the queries is empty must not stop the others."""
    values, positions = ApproximateIndex(rows(50), "Flat").search(
        rows(0), 3, [(torch.zeros(0).long(), torch.ones(50).long())]
    )
    assert values.shape == positions.shape == (0, 3)


def test_distances_to_compressed_rows_are_never_negative() -> None:
    """A residual quantiser sums parts that cancel, and the root of what rounding leaves would be NaN."""
    index = ApproximateIndex(rows(700) * 100, "IVF2,PQ4x4", "l2", "nprobe=2")
    index._index.make_direct_map()
    # An array, or a tensor once pytorch-metric-learning has loaded faiss's own extension for torch.
    compressed = np.asarray(index._index.reconstruct_n(0, 700))
    assert index._index.search(compressed, 3)[0].min() < 0  # what faiss says
    assert index.search(torch.from_numpy(compressed), 3)[0].min() == 0


def test_input_stays_as_it_is() -> None:
    """Normalising in place would change the user's embeddings, and a graph would be kept alive by the answer."""
    gallery, queries = rows(60), rows(5, seed=1).requires_grad_()
    before = gallery.clone(), queries.detach().clone()
    values, _ = ApproximateIndex(gallery, "Flat", "cosine").search(queries, 2)
    assert torch.equal(gallery, before[0]) and torch.equal(queries.detach(), before[1])
    assert not values.requires_grad


# The meaning of recall


def oracle_recall(queries: Tensor, gallery: Tensor, positions: Tensor, k: int, metric: str, allowed: Tensor) -> float:
    """Share of the rows found that are as near as the k-th nearest of those allowed, by loops in float64."""
    right = total = 0
    for row, query in enumerate(queries.double().tolist()):
        nearness = []
        for item in gallery.double().tolist():
            products = [a * b for a, b in zip(query, item, strict=True)]
            if metric == "l2":
                nearness.append(-sum((a - b) ** 2 for a, b in zip(query, item, strict=True)))
            elif metric == "cosine":
                lengths = (sum(a * a for a in query) * sum(b * b for b in item)) ** 0.5
                nearness.append(sum(products) / lengths if lengths else 0.0)
            else:
                nearness.append(sum(products))
        best = sorted((nearness[i] for i in range(len(gallery)) if allowed[row, i]), reverse=True)[:k]
        total += len(best)
        right += sum(1 for place in positions[row].tolist() if place >= 0 and nearness[place] >= best[-1] - 1e-5)
    return right / total


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 30),
    metric=st.sampled_from(METRICS),
    block=st.sampled_from([1, 20, 2**24]),
    half=st.booleans(),
)
def test_recall_is_that_of_a_slow_count_with_ties(seed: int, k: int, metric: Any, block: int, half: bool) -> None:
    """Rows of small integers tie all the time; a count of equal positions would call an index wrong that is right."""
    draw = torch.Generator().manual_seed(seed)
    gallery = torch.randint(-1, 2, (25, 3), generator=draw).to(torch.float16 if half else torch.float32)
    queries = torch.randint(-1, 2, (6, 3), generator=draw).float()
    query_keys, keys = torch.randint(-1, 3, (6,), generator=draw), torch.randint(-1, 3, (25,), generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ENTRIES", block)
        index = ApproximateIndex(gallery, "PCAR2,SQ4", metric)
        measured = index.recall(queries, k, gallery, [(query_keys, keys)])
    positions = index.search(queries, k, [(query_keys, keys)])[1]
    allowed = (query_keys[:, None] != keys) | (query_keys[:, None] < 0)
    assert measured == pytest.approx(oracle_recall(queries, gallery, positions, k, metric, allowed), abs=1e-12)


def test_ties_do_not_lower_recall_and_near_misses_do() -> None:
    """The rounding that is forgiven must stay far below what tells neighbours apart in a large gallery."""
    gallery = unit_rows(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1e-3], [0.0, 1.0]]))
    index = ApproximateIndex(gallery, "Flat")
    query = torch.tensor([[1.0, 0.0]])
    best = {int(index.search(query, 1)[1])}
    assert best < {0, 1, 2} and index.recall(query, 1, gallery) == 1.0
    # The same index over other rows: now the one found is 5e-7 less similar than two others.
    moved = gallery.clone()
    moved[list(best)] = gallery[3]
    assert index.recall(query, 1, moved) == 0.0


def test_another_order_of_rounding_is_no_error_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that are equally near in float32 are found in either order by two exact searches."""
    query = torch.tensor([[1.0, 2**-13]])
    nearer, other = [1.0, 2**-13], [1.0, 0.0]  # by 2**-26, a quarter of the last digit of 1
    gallery = torch.tensor([nearer, nearer, [0.0, 1.0]])
    index = ApproximateIndex(gallery, "Flat")
    best = int(index.search(query, 1)[1])
    gallery[best] = torch.tensor(other)
    monkeypatch.setattr(module, "nearest", lambda *_: (torch.ones(1, 1), torch.tensor([[1 - best]])))
    assert index.recall(query, 1, gallery) == 1.0


def test_the_docstring_examples_are_true(capfd: pytest.CaptureFixture[str]) -> None:
    """Examples are what people copy."""
    outcome = doctest.testmod(
        importlib.import_module("lightning_dml.retrieval.index.approximate"), extraglobs={"torch": torch}, verbose=False
    )
    assert outcome.failed == 0 and outcome.attempted > 0
    assert capfd.readouterr().err == ""
