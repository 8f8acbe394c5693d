"""ApproximateIndex: what it finds, how near that is to the exact search, what it refuses, and its files."""

from __future__ import annotations

import doctest
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightning_dml.retrieval.index as module
from lightning_dml.errors import InputError
from lightning_dml.retrieval import index_file
from lightning_dml.retrieval.index import ApproximateIndex
from lightning_dml.retrieval.search import nearest, unit_rows
from tests.tolerances import rounding

METRICS = ("inner_product", "cosine", "l2")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of faiss spin between its many short k-means, and on a busy machine that takes most of the time."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def rows(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Gaussian rows that differ by seed alone."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def state(index: ApproximateIndex) -> bytes:
    """All that faiss keeps of an index."""
    return bytes(faiss.serialize_index(index._index).tobytes())


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
    assert all(len(set(found)) == 6 for found in positions.tolist())
    assert values.dtype == torch.float32 and positions.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
def test_recall_rises_with_the_lists_that_are_probed(metric: Any) -> None:
    """That nprobe trades time for recall, up to the exact answer, is the reason for choosing an IVF index."""
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
    assert all(len(set(found)) == 5 for found in positions.tolist())
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
        kept = [
            (float(value), int(place))
            for value, place in zip(everything[0][row], everything[1][row], strict=True)
            if not (query >= 0 and gallery[place] == query)
            and not (group_of_query[row] >= 0 and groups[place] == group_of_query[row])
        ]
        expected = (kept + [(worst, -1)] * k)[:k]
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


# What recall means


def oracle_recall(queries: Tensor, gallery: Tensor, found: Tensor, k: int, metric: str, allowed: Tensor) -> float:
    """By loops in float64: found rows that are as near as the k-th nearest of those allowed, of all that there are."""
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
        right += sum(1 for place in found[row].tolist() if place >= 0 and nearness[place] >= best[-1] - 1e-5)
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
    found = index.search(queries, k, [(query_keys, keys)])[1]
    allowed = (query_keys[:, None] != keys) | (query_keys[:, None] < 0)
    assert measured == pytest.approx(oracle_recall(queries, gallery, found, k, metric, allowed), abs=1e-12)


def test_ties_do_not_lower_recall_and_near_misses_do() -> None:
    """The rounding that is forgiven must stay far below what tells neighbours apart in a large gallery."""
    gallery = unit_rows(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1e-3], [0.0, 1.0]]))
    index = ApproximateIndex(gallery, "Flat")
    query = torch.tensor([[1.0, 0.0]])
    found = {int(index.search(query, 1)[1])}
    assert found < {0, 1, 2} and index.recall(query, 1, gallery) == 1.0
    # The same index over other rows: now the one found is 5e-7 less similar than two others.
    moved = gallery.clone()
    moved[list(found)] = gallery[3]
    assert index.recall(query, 1, moved) == 0.0


def test_another_order_of_rounding_is_no_error_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that are equally near in float32 are found in either order by two exact searches."""
    query = torch.tensor([[1.0, 2**-13]])
    nearer, other = [1.0, 2**-13], [1.0, 0.0]  # by 2**-26, a quarter of the last digit of 1
    gallery = torch.tensor([nearer, nearer, [0.0, 1.0]])
    index = ApproximateIndex(gallery, "Flat")
    found = int(index.search(query, 1)[1])
    gallery[found] = torch.tensor(other)
    monkeypatch.setattr(module, "nearest", lambda *_: (torch.ones(1, 1), torch.tensor([[1 - found]])))
    assert index.recall(query, 1, gallery) == 1.0


# How it is built


@pytest.mark.parametrize("metric", METRICS)
def test_a_half_precision_gallery_is_converted_by_blocks(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 copy of a gallery of many millions is what half precision is to avoid."""
    gallery = rows(500).half()
    expected = state(ApproximateIndex(gallery.float(), "IVF4,SQ8", metric, train_rows=200))
    converted: list[int] = []
    original = ApproximateIndex._prepared

    def prepared(self: ApproximateIndex, part: Tensor) -> Tensor:
        converted.append(len(part))
        return original(self, part)

    monkeypatch.setattr(ApproximateIndex, "_prepared", prepared)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 8 * 60)
    assert state(ApproximateIndex(gallery, "IVF4,SQ8", metric, train_rows=200)) == expected
    assert converted == [200, *[60] * 8, 20]


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "HNSW8", "PQ2x4", "OPQ2_4,PQ2x4", "RQ2x4", "NSG8"])
@pytest.mark.filterwarnings("ignore:factory 'OPQ2")
def test_a_seed_gives_one_index(factory: str) -> None:
    """An experiment that is run again must find the same neighbours, whatever the state of the global generators."""
    gallery = rows(700, 4)
    first = ApproximateIndex(gallery, factory, "l2", seed=3, train_rows=650)
    torch.manual_seed(99)
    assert state(first) == state(ApproximateIndex(gallery, factory, "l2", seed=3, train_rows=650))


@pytest.mark.parametrize("train_rows", [400, None])
def test_seeds_differ(train_rows: int | None) -> None:
    """A seed that does nothing would hide how much the choice of training rows and first centroids matters."""
    built = [ApproximateIndex(rows(500), "IVF8,Flat", seed=seed, train_rows=train_rows) for seed in (1, 2)]
    assert state(built[0]) != state(built[1])


def test_it_trains_on_rows_from_all_over_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Galleries are sorted by class: the first rows alone would make lists for a few classes."""
    gallery = torch.arange(70_000.0)[:, None].repeat(1, 2)
    samples: list[Tensor] = []
    original = faiss.IndexIVFFlat.train

    def train(self: Any, sample: Any) -> None:
        samples.append(torch.from_numpy(sample).clone())
        original(self, sample)

    monkeypatch.setattr(faiss.IndexIVFFlat, "train", train)
    for train_rows in (1000, None, 10**6):
        ApproximateIndex(gallery, "IVF4,Flat", "l2", train_rows=train_rows)
    assert [len(sample) for sample in samples] == [1000, 65_536, 70_000]
    for sample in samples:
        drawn = sample[:, 0]
        assert len(set(drawn.tolist())) == len(drawn)
        assert drawn.mean() == pytest.approx(35_000, rel=0.1)


def test_a_graph_is_linked_by_one_thread_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links depend on the order in which threads come to the nodes; other indexes need not pay for that."""
    faiss.omp_set_num_threads(2)
    threads: list[int] = []
    for kind in (faiss.IndexHNSWFlat, faiss.IndexIVFFlat):

        def add(self: Any, block: Any, original: Any = kind.add) -> None:
            threads.append(faiss.omp_get_max_threads())
            original(self, block)

        monkeypatch.setattr(kind, "add", add)
    gallery = rows(200)
    ApproximateIndex(gallery, "HNSW8")
    ApproximateIndex(gallery, "HNSW8", graph_threads=2)
    ApproximateIndex(gallery, "IVF2,Flat")
    ApproximateIndex(gallery, "IVF2_HNSW8,Flat")
    assert threads == [1, 2, 2, 2]
    assert faiss.omp_get_max_threads() == 2


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,PQ4x4", "PQ4x4", "OPQ4,PQ4x4", "RQ2x4"])
def test_few_training_rows_are_said_once_and_by_us(factory: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Faiss prints a line for each of its k-means, hundreds for OPQ, and no filter reaches them."""
    with pytest.warns(UserWarning, match=f"factory '{factory}' learns .* from 300 training rows; below 39") as caught:
        ApproximateIndex(rows(300), factory)
    assert len(caught) == 1 and caught[0].filename == __file__
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_enough_training_rows_are_not_worth_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """A warning that always comes is not read; and with it switched off wrongly, that of faiss would show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = ApproximateIndex(rows(39 * 16), "IVF4,PQ4x4")
    assert capfd.readouterr().err == ""
    assert index._index.cp.min_points_per_centroid == 39


@pytest.mark.filterwarnings("ignore:factory 'PCA6")
def test_repr_and_length_say_what_it_is() -> None:
    """A kept index is recognised by its settings, those set later included."""
    index = ApproximateIndex(rows(100), "PCA6,IVF4,PQ3x4,RFlat", "l2", " nprobe = 2, k_factor_rf=3,")
    index.parameters = "nprobe=4"
    assert len(index) == 100
    assert repr(index) == (
        "ApproximateIndex('PCA6,IVF4,PQ3x4,RFlat', metric='l2', parameters='nprobe=4,k_factor_rf=3', rows=100, "
        "dimensions=8)"
    )


def test_refused_parameters_leave_the_others_as_they_were() -> None:
    """Half of a string set and the other half refused would search otherwise than `parameters` says."""
    index = ApproximateIndex(rows(200), "IVF4,Flat", parameters="nprobe=2")
    with pytest.raises(InputError, match="no parameter 'efSearch'"):
        index.parameters = "nprobe=4,efSearch=3"
    assert index.parameters == "nprobe=2" and index._index.nprobe == 2


# What it refuses


def broken_rows() -> Tensor:
    """NaN and infinity in different rows, to be counted as two."""
    broken = rows(100)
    broken[4, 1], broken[7, 0] = float("nan"), float("-inf")
    return broken


BUILD_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "not a matrix": ({"gallery": torch.ones(3)}, r"gallery must be \(rows, dimensions\), got shape \(3,\)"),
    "integers": ({"gallery": torch.ones(3, 3).long()}, "gallery must be floating point, got torch.int64"),
    "empty": ({"gallery": rows(0)}, r"gallery is empty, got shape \(0, 8\); give at least one row"),
    "elsewhere": ({"gallery": torch.ones(3, 3, device="meta")}, r"gallery is on meta; .* move it with .cpu\(\)"),
    "broken": ({"gallery": broken_rows()}, "gallery has NaN or infinite values in 2 of 100 rows, .* row 4;"),
    "metric": ({"metric": "dot"}, "metric must be one of inner_product, cosine, l2, got 'dot'"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "train_rows": ({"train_rows": 0}, "train_rows must be an integer of at least 1, got 0"),
    "train_rows is true": ({"train_rows": True}, "train_rows must be an integer of at least 1, got True"),
    "threads": ({"graph_threads": 0}, "graph_threads must be an integer of at least 1, got 0"),
    "nothing": ({"factory": ""}, "factory must be a faiss factory string such as 'IVF1024,Flat'.* got ''"),
    "no string": ({"factory": 3}, "factory must be a faiss factory string .* got 3"),
    "unknown": (
        {"factory": "Hello"},
        r"'Hello' is no faiss factory string for 8 dimensions \(could not parse index string Hello\); write one such",
    ),
    "unknown codes": ({"factory": "IVF4,Hello"}, "'IVF4,Hello' is no faiss factory string .*such as 'IVF1024,Flat'"),
    "huge number": ({"factory": "IVF99999999999999999999,Flat"}, "is no faiss factory string for 8 dimensions"),
    "no lists": ({"factory": "IVF0,Flat"}, "'IVF0,Flat' has 0 lists"),
    "lists": (
        {"factory": "IVF4096,Flat"},
        "'IVF4096,Flat' learns 4096 lists and needs at least 4096 training rows, got 100: give more rows, or take "
        "fewer lists, such as IVF2",
    ),
    "lists of a sample": (
        {"factory": "IVF64,Flat", "train_rows": 50},
        "'IVF64,Flat' learns 64 lists and needs at least 64 training rows, got 50: raise train_rows, or .* IVF1",
    ),
    "codes": (
        {"factory": "IVF2,PQ4"},
        r"'IVF2,PQ4' learns 2\*\*8 codes and needs at least 256 training rows, got 100: give .* as 4 in PQ8x4",
    ),
    "codes of a rotation": ({"factory": "OPQ4,PQ4x4"}, r"'OPQ4,PQ4x4' learns 2\*\*8 codes and .* 256 .* got 100"),
    "residual codes": ({"factory": "RQ2x7"}, r"'RQ2x7' learns 2\*\*7 codes and .* 128 training rows, got 100"),
    "pieces": (
        {"factory": "PQ3"},
        "'PQ3' cuts rows into a number of pieces that does not divide .* 8 .* must be one of 1, 2, 4, 8",
    ),
    "pieces of a rotation": ({"factory": "OPQ3,Flat"}, "'OPQ3,Flat' cuts rows .* one of 1, 2, 4, 8"),
    "l2 only": ({"factory": "LSH"}, "'LSH' cannot search by inner product or cosine; take metric='l2'"),
    "l2 only for cosine": ({"factory": "IMI2x4,Flat", "metric": "cosine"}, "'IMI2x4,Flat' cannot search by inner"),
    "l2 in secret": ({"factory": "HNSW8_PQ4x4"}, "'HNSW8_PQ4x4' cannot search by inner product or cosine"),
    "own numbers": ({"factory": "IDMap,Flat"}, "'IDMap,Flat' has no search by row; write one such as"),
    "no search": ({"factory": "Residual4x4,PQ4", "metric": "l2"}, "'Residual4x4,PQ4' has no search by row"),
    "faiss refuses": (
        {"factory": "PCA6,Flat", "gallery": rows(4)},
        "'PCA6,Flat' cannot be built from 4 rows of 8 dimensions, trained on 4: PCA matrix cannot output 6 dimensions",
    ),
    "unknown parameter": (
        {"factory": "IVF2,Flat", "parameters": "probes=3"},
        "parameters: index 'IVF2,Flat' has no parameter 'probes', got 'probes=3'; it has nprobe",
    ),
    "no parameters": (
        {"parameters": "nprobe=3"},
        "index 'Flat' has no parameter 'nprobe', got 'nprobe=3'; it has none",
    ),
    "no value": ({"parameters": "nprobe"}, "parameters must be names with numbers .*'nprobe=16'.* got 'nprobe'"),
    "no number": ({"parameters": "nprobe=x"}, "parameters must be names with numbers .* got 'nprobe=x'"),
    "no name": ({"parameters": "=3"}, "parameters must be names with numbers .* got '=3'"),
    "zero": ({"factory": "IVF2,Flat", "parameters": "nprobe=0"}, "numbers of at least 1, .* got 'nprobe=0'"),
    "endless": ({"factory": "IVF2,Flat", "parameters": "nprobe=inf"}, "numbers of at least 1, .* got 'nprobe=inf'"),
}


@pytest.mark.parametrize("case", BUILD_ERRORS)
def test_what_cannot_be_built_is_refused_with_the_way_out(case: str) -> None:
    """Faiss says it in terms of its source code, after an hour, or not at all."""
    changes, message = BUILD_ERRORS[case]
    arguments: dict[str, Any] = {"gallery": rows(100), "factory": "Flat", **changes}
    with pytest.raises(InputError, match=message):
        ApproximateIndex(**arguments)


def test_settings_are_checked_before_the_gallery_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a gallery of many millions even one pass takes long."""
    monkeypatch.setattr(module, "check_finite", lambda *_: pytest.fail("the gallery was read"))
    for factory, parameters in (("IVF4096,Flat", ""), ("PQ3", ""), ("Flat", "nprobe=2")):
        with pytest.raises(InputError):
            ApproximateIndex(rows(100), factory, parameters=parameters)


SEARCH_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "not a matrix": ({"queries": torch.ones(8)}, r"queries must be \(rows, dimensions\), got shape \(8,\)"),
    "dimensions": ({"queries": rows(5, 7)}, "queries have 7 dimensions and the index has 8; embed both with one model"),
    "broken": ({"queries": broken_rows()}, "queries has NaN or infinite values in 2 of 100 rows"),
    "overflow": (
        {"queries": rows(5) * 1e38},
        r"queries: \d rows.* have products with the gallery that overflow float32",
    ),
    "k of zero": ({"k": 0}, "k must be an integer of at least 1, got 0"),
    "k no integer": ({"k": 2.0}, "k must be an integer of at least 1, got 2.0"),
    "query keys": (
        {"exclude": [(torch.arange(4), torch.arange(100))]},
        r"exclude, query keys must have shape \(5,\), one for each row, got \(4,\)",
    ),
    "gallery keys": (
        {"exclude": [(torch.arange(5), torch.arange(100.0))]},
        "exclude, gallery keys must be integers, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", SEARCH_ERRORS)
@pytest.mark.parametrize("recall", [False, True])
def test_searches_are_checked(case: str, recall: bool) -> None:
    """Faiss reads as many floats as the index has dimensions, whatever it is given."""
    changes, message = SEARCH_ERRORS[case]
    gallery = rows(100) * 100
    index = ApproximateIndex(gallery, "Flat")
    arguments: dict[str, Any] = {"queries": rows(5), "k": 2, **changes}
    with pytest.raises(InputError, match=message):
        index.recall(gallery=gallery, **arguments) if recall else index.search(**arguments)


def test_recall_needs_the_gallery_and_something_to_find() -> None:
    """Over other rows, or over nothing, a share means nothing."""
    gallery = rows(20)
    index = ApproximateIndex(gallery, "Flat")
    with pytest.raises(InputError, match=r"gallery has shape \(19, 8\) and the index holds \(20, 8\); give the rows"):
        index.recall(rows(3), 2, gallery[1:])
    with pytest.raises(InputError, match="gallery has NaN"):
        index.recall(rows(3), 2, broken_rows()[:20])
    with pytest.raises(InputError, match="0 queries have no candidate"):
        index.recall(rows(0), 2, gallery)
    ones = torch.ones(20).long()
    with pytest.raises(InputError, match="3 queries have no candidate in the gallery; give others, or exclude less"):
        index.recall(rows(3), 2, gallery, [(ones[:3], ones)])


# Files


@pytest.mark.parametrize(
    ("factory", "metric", "parameters"),
    [
        ("IVF4,Flat", "cosine", "nprobe=3,max_codes=90"),
        ("HNSW8", "l2", "efSearch=40,efConstruction=20"),
        ("PCA6,PQ3x4,RFlat", "inner_product", "k_factor_rf=7"),
    ],
)
@pytest.mark.filterwarnings("ignore:factory 'PCA6")
def test_a_loaded_index_is_the_saved_one(factory: str, metric: Any, parameters: str, tmp_path: Path) -> None:
    """An index is kept for months; metric and parameters are not all in what faiss writes."""
    index = ApproximateIndex(rows(300), factory, metric, parameters)
    index.save(tmp_path / "folder" / "gallery.index")
    loaded = ApproximateIndex.load(str(tmp_path / "folder" / "gallery.index"))
    assert repr(loaded) == repr(index) and state(loaded) == state(index)
    queries = rows(30, seed=1)
    for ours, theirs in zip(index.search(queries, 9), loaded.search(queries, 9), strict=True):
        assert torch.equal(ours, theirs)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["gallery.index"]


def test_a_parameter_that_faiss_does_not_keep_is_set_again(tmp_path: Path) -> None:
    """Without it the loaded index would search more, or less, than the one that was measured."""
    index = ApproximateIndex(rows(300), "IVF4,Flat", parameters="max_codes=90")
    faiss_only: Any = faiss.deserialize_index(faiss.serialize_index(index._index))
    index.save(tmp_path / "index")
    assert faiss_only.max_codes == 0 and ApproximateIndex.load(tmp_path / "index")._index.max_codes == 90


@pytest.mark.parametrize("where", ["in the middle", "before the renaming"])
def test_an_interrupted_save_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is killed or a disk that is full must not cost the index that was there."""
    path = tmp_path / "index"
    ApproximateIndex(rows(40), "Flat").save(path)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "in the middle":
            patch.setattr(faiss, "write_index", stop)  # the header is in the file by then
        else:
            patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            ApproximateIndex(rows(50), "Flat").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_through_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes go through C++; an error on the way back must not be lost there."""
    original = index_file._Summed.write

    def write(self: index_file._Summed, data: bytes) -> int:
        if self.length + len(data) > 500:
            raise OSError("no space left on device")
        return original(self, data)

    index = ApproximateIndex(rows(500), "SQ8")
    monkeypatch.setattr(index_file._Summed, "write", write)
    with pytest.raises(OSError, match="no space left"):
        index.save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Half an index that loads answers with half the gallery."""
    path = tmp_path / "index"
    ApproximateIndex(rows(200), "IVF4,Flat", parameters="nprobe=2").save(path)
    whole = path.read_bytes()
    start = whole.index(b"}\n")
    cuts = [whole[:length] for length in (40, start, start + 2, start + 60, len(whole) - 100, len(whole) - 1)]
    flips = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for place in (40, start, start + 3, len(whole) // 2, len(whole) - 30, len(whole) - 1)
    ]
    for content in (*cuts, *flips, whole + b"\n", whole + whole):
        path.write_bytes(content)
        with pytest.raises(InputError, match="index was cut off or is damaged; copy it again, or build and save"):
            ApproximateIndex.load(path)
    path.write_bytes(whole)
    assert len(ApproximateIndex.load(path)) == 200


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """A plain faiss file has no metric or parameters, and a folder or nothing is a slip of the hand."""
    faiss.write_index(ApproximateIndex(rows(20), "Flat")._index, str(tmp_path / "plain.faiss"))
    (tmp_path / "empty").touch()
    for name in ("plain.faiss", "empty"):
        with pytest.raises(InputError, match=f"{name} is not an index file; give one that ApproximateIndex.save wrote"):
            ApproximateIndex.load(tmp_path / name)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"there is no index file .*; give one that ApproximateIndex.save wrote"):
            ApproximateIndex.load(path)


def test_the_docstring_examples_are_true(capfd: pytest.CaptureFixture[str]) -> None:
    """Examples are what people copy."""
    outcome = doctest.testmod(
        importlib.import_module("lightning_dml.retrieval.index"), extraglobs={"torch": torch}, verbose=False
    )
    assert outcome.failed == 0 and outcome.attempted > 0
    assert capfd.readouterr().err == ""
