"""knn against a sort of all pairs in float64, faiss against torch, and self left out by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval import knn, search
from lightning_dml.retrieval.search import _full_float32, _search_faiss, _search_torch, nearest, unit_rows
from tests.tolerances import gap, rounding, whole_rows

METRICS = ("inner_product", "cosine", "l2")


def slow_knn(
    queries: Tensor, gallery: Tensor, k: int, metric: str, query_indices: Tensor, gallery_indices: Tensor
) -> tuple[list[list[float]], list[list[int]]]:
    """One Python loop per query and gallery row."""
    all_values, all_positions = [], []
    for query, query_index in zip(queries.double().numpy(), query_indices.tolist(), strict=True):
        scored = []
        for position, (item, index) in enumerate(zip(gallery.double().numpy(), gallery_indices.tolist(), strict=True)):
            if index == query_index and index >= 0:
                continue
            if metric == "l2":
                value = float(((query - item) ** 2).sum())
            elif metric == "cosine":
                value = float(query @ item / (np.linalg.norm(query) * np.linalg.norm(item)))
            else:
                value = float(query @ item)
            scored.append((value, position))
        scored.sort(reverse=metric != "l2")
        all_values.append([value for value, _ in scored[:k]])
        all_positions.append([position for _, position in scored[:k]])
    return all_values, all_positions


@given(
    seed=st.integers(0, 10_000),
    n_queries=st.integers(1, 40),
    n_gallery=st.integers(4, 40),
    dim=st.integers(2, 9),
    k=st.integers(1, 3),
    items=st.integers(20, 60),
    metric=st.sampled_from(METRICS),
)
def test_equals_a_sort_of_all_pairs(
    seed: int, n_queries: int, n_gallery: int, dim: int, k: int, items: int, metric: Any
) -> None:
    """Every metric is computed from these positions; a wrong neighbour makes all of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n_queries, dim, generator=generator)
    gallery = torch.randn(n_gallery, dim, generator=generator)
    query_indices = torch.randint(-2, items, (n_queries,), generator=generator)
    gallery_indices = torch.randperm(items + n_gallery, generator=generator)[:n_gallery]
    gallery_indices[0] = -1
    gallery_indices[-1] = -2
    expected = slow_knn(queries, gallery, n_gallery, metric, query_indices, gallery_indices)

    values, positions = knn(
        queries, gallery, k, metric=metric, query_indices=query_indices, gallery_indices=gallery_indices
    )

    assert positions.dtype == torch.int64 and values.dtype == torch.float32
    # Squared distances are sums of products up to the square of both lengths; cosines divide by two lengths as well.
    bound = rounding(3 * (dim + 2), (queries.norm(dim=1).max() + gallery.norm(dim=1).max()) ** 2)
    for row, its_positions, all_values, all_positions in zip(values, positions.tolist(), *expected, strict=True):
        value_of = dict(zip(all_positions, all_values, strict=True))  # without those that are left out
        assert len(set(its_positions)) == k
        # By value: float32 may exchange neighbours that are nearer to each other than its rounding.
        assert [value_of[position] for position in its_positions] == pytest.approx(all_values[:k], rel=0, abs=bound)
        assert row.tolist() == pytest.approx(all_values[:k], rel=0, abs=bound)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("n_queries", [3, 100])  # faiss has another code path below 20 queries
@pytest.mark.parametrize("block_entries", [1, 700, 2**24])
def test_torch_search_equals_faiss(metric: Any, n_queries: int, block_entries: int) -> None:
    """The GPU searches with torch and the CPU with faiss; results must not depend on the machine."""
    queries, gallery = whole_rows(n_queries, 16, 500), whole_rows(150, 16, 500, seed=1)
    values, positions = _search_faiss(queries, gallery, 7, metric)
    torch_values, torch_positions = _search_torch(queries, gallery, 7, metric, block_entries)
    assert gap(_search_torch(queries, gallery, 8, metric)[0]) > 0  # no ties, which either may order as it likes
    assert torch.equal(torch_positions, positions)
    assert torch.equal(torch_values, values)


def test_l2_values_are_squared_and_ascend() -> None:
    """As in faiss; a user who takes them for plain distances sets wrong thresholds."""
    values, positions = knn(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]), 3, metric="l2")
    assert values.tolist() == [[1.0, 4.0, 25.0]]
    assert positions.tolist() == [[1, 2, 0]]


def test_self_is_left_out_by_index_where_it_is_not_the_nearest() -> None:
    """Dropping the first hit instead would remove a true neighbour and keep the query itself."""
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.4]])
    # The query is item 2, embedded far from its gallery row; its true twin at position 0 must stay.
    values, positions = knn(
        gallery[:1], gallery, 3, query_indices=torch.tensor([2]), gallery_indices=torch.tensor([0, 1, 2, 3])
    )
    assert positions.tolist() == [[0, 1, 3]]
    assert values.tolist() == [pytest.approx([1.0, 0.9, 0.6])]


def test_every_copy_of_the_query_is_left_out() -> None:
    """A padded duplicate would be a sure hit and raise recall."""
    gallery = torch.arange(6.0)[:, None] + 1
    _, positions = knn(
        gallery[:2],
        gallery,
        2,
        query_indices=torch.tensor([5, 9]),
        gallery_indices=torch.tensor([5, 1, 2, 5, 5, 3]),
    )
    assert positions.tolist() == [[5, 2], [5, 4]]


def test_negative_indices_are_nobody() -> None:
    """Unknown items all have -1 and must not pass for copies of one another."""
    rows = torch.randn(5, 3)
    nobody = torch.full((5,), -1)
    _, positions = knn(rows, rows, 1, metric="l2", query_indices=nobody, gallery_indices=nobody)
    assert positions.flatten().tolist() == [0, 1, 2, 3, 4]


def test_k_is_clamped_to_the_query_with_the_fewest_candidates() -> None:
    """A small gallery should warn, not fail or return rows that do not exist."""
    rows = torch.randn(5, 3)
    with pytest.warns(UserWarning, match=r"k=9 is more than the 5 candidates of a query; it is now 5"):
        _, positions = knn(rows, rows, 9)
    assert positions.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 5

    with pytest.warns(UserWarning, match="more than the 3 candidates"):
        values, positions = knn(
            rows, rows, 5, query_indices=torch.arange(5), gallery_indices=torch.tensor([0, 0, 1, 2, 3])
        )
    assert positions.shape == values.shape == (5, 3)
    assert (positions >= 0).all()


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_nearest_fills_up_with_minus_one(metric: Any) -> None:
    """A place without a candidate must never look like gallery row 0."""
    gallery = torch.tensor([[1.0], [2.0], [3.0]])
    queries = torch.tensor([[2.0], [9.0]])
    values, positions = nearest(queries, gallery, 3, metric, [(torch.tensor([1, 7]), torch.tensor([0, 1, 2]))])
    assert positions[0].sort().values.tolist() == [-1, 0, 2]
    assert positions.tolist()[0][2] == -1 and positions.tolist()[1] == [2, 1, 0]
    assert values[0, 2] == (float("inf") if metric == "l2" else float("-inf"))


def test_input_is_left_as_it_was_and_may_be_half_or_strided() -> None:
    """Normalising in place would change the user's embeddings."""
    queries = torch.randn(8, 6, requires_grad=True)
    gallery = torch.randn(6, 10, dtype=torch.bfloat16).T
    before = queries.detach().clone(), gallery.clone()
    values, positions = knn(queries, gallery, 2, metric="cosine")
    assert torch.equal(queries, before[0]) and torch.equal(gallery, before[1])
    assert values.dtype == torch.float32 and not values.requires_grad
    similarities = torch.cosine_similarity(queries.detach()[:, None], gallery.float()[None], dim=2)
    assert torch.equal(positions, similarities.topk(2).indices)


def test_cosine_holds_at_any_scale() -> None:
    """Tiny or huge rows overflow when squared; a row of zeros has no direction."""
    rows = torch.randn(5, 4)
    for scale in (1e-30, 1.0, 1e30):
        torch.testing.assert_close(unit_rows(rows * scale), rows / rows.norm(dim=1, keepdim=True))
    assert unit_rows(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_torch_search_is_float32_under_autocast() -> None:
    """Called in a validation step, the search is inside autocast; bfloat16 would swap close neighbours."""
    queries, gallery = torch.randn(4, 32), torch.randn(20, 32)
    expected = _search_torch(queries, gallery, 3, "inner_product")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (queries @ gallery.T).dtype == torch.bfloat16  # the region does act on products
        values, positions = _search_torch(queries, gallery, 3, "inner_product")
    assert values.dtype == torch.float32
    assert torch.equal(values, expected[0]) and torch.equal(positions, expected[1])


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_torch_search_switches_lower_precision_off_and_back(device_type: str) -> None:
    """TF32 and bfloat16 swap close neighbours, yet the user's training must get its setting back, even on an error."""
    matmul: Any = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")

    def setting() -> str:
        return str(getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision())

    try:
        lowered = setting()
        assert lowered not in ("ieee", "highest")
        with pytest.raises(KeyError), _full_float32(device_type):
            assert setting() in ("ieee", "highest")
            raise KeyError("a search that fails")
        assert setting() == lowered
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_similarities_are_float32_whatever_precision_training_has() -> None:
    """With "medium", as Lightning recommends it for GPUs, some CPUs multiply in bfloat16: ties and MAP would change."""
    queries, gallery = torch.randn(300, 128), torch.randn(500, 128)
    exact = (queries.double() @ gallery.double().T).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        table = search.similarities(queries, gallery, "inner_product")
    finally:
        torch.set_float32_matmul_precision(before)
    magnitude = queries.norm(dim=1).max() * gallery.norm(dim=1).max()
    assert (table - exact).abs().max() < rounding(128, magnitude) < 0.01  # in bfloat16 some 0.1


def broken_rows() -> Tensor:
    """A NaN and an infinite value in different rows, to be counted as two."""
    rows = torch.randn(9, 3)
    rows[4, 1], rows[7, 0] = float("nan"), float("-inf")
    return rows


GOOD = torch.eye(3)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "not a matrix": ({"queries": torch.ones(3)}, r"queries must have shape \(N, D\), got \(3,\)"),
    "no dimensions": ({"gallery": torch.ones(3, 0)}, r"gallery must have shape \(N, D\), got \(3, 0\)"),
    "integers": ({"gallery": torch.ones(3, 3).long()}, r"gallery must be floating point, got torch.int64"),
    "dimensions differ": (
        {"gallery": torch.ones(3, 2)},
        r"gallery must have shape \(N, 3\), got \(3, 2\); all embeddings must come from embedders of the same",
    ),
    "devices differ": ({"gallery": torch.ones(3, 3, device="meta")}, "gallery is on meta and queries are on cpu"),
    "no queries": ({"queries": torch.ones(0, 3)}, r"queries is empty, got shape \(0, 3\)"),
    "no gallery": ({"gallery": torch.ones(0, 3)}, r"gallery is empty, got shape \(0, 3\)"),
    "k of zero": ({"k": 0}, "k must be an integer of at least 1, got 0"),
    "k not an integer": ({"k": 1.5}, "k must be an integer of at least 1, got 1.5"),
    "unknown metric": ({"metric": "euclid"}, "metric must be one of inner_product, cosine, l2, got 'euclid'"),
    "broken queries": ({"queries": broken_rows()}, "queries has NaN or infinite values in 2 of 9 rows, .* row 4;"),
    "broken gallery": ({"gallery": broken_rows()}, "gallery has NaN or infinite values in 2 of 9 rows, .* row 4;"),
    "one index only": ({"query_indices": torch.arange(3)}, "gallery_indices is missing"),
    "other index only": ({"gallery_indices": torch.arange(3)}, "query_indices is missing"),
    "index length": (
        {"query_indices": torch.arange(2), "gallery_indices": torch.arange(3)},
        r"query_indices must have shape \(3,\), one for each row of queries, got \(2,\)",
    ),
    "index dtype": (
        {"query_indices": torch.arange(3), "gallery_indices": torch.arange(3.0)},
        "gallery_indices must be integers, got torch.float32",
    ),
    "nothing but self": (
        {"query_indices": torch.arange(3), "gallery_indices": torch.zeros(3).long()},
        "gallery has 3 rows, all of them copies of one query by index",
    ),
    "overflow": ({"queries": GOOD * 1e30, "gallery": GOOD * 1e30}, "queries: 3 rows, the first is row 0, .*overflow"),
    "overflow in l2": ({"gallery": GOOD * 1e30, "metric": "l2"}, "queries: 3 rows, the first is row 0, .*overflow"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_value_and_way_out(case: str) -> None:
    """Left to itself, faiss answers wrong input with a crash or with garbage."""
    changes, message = ERRORS[case]
    arguments: dict[str, Any] = {"queries": GOOD, "gallery": GOOD, "k": 1, **changes}
    with pytest.raises(InputError, match=message):
        knn(**arguments)


def test_rows_whose_sum_overflows_are_not_called_broken() -> None:
    """Large but finite rows are valid; a quick check by their sum would refuse them."""
    rows = torch.full((2, 4), 3e38)
    values, _ = knn(rows, rows, 1, metric="cosine")
    assert values.flatten().tolist() == pytest.approx([1.0, 1.0])


@given(
    seed=st.integers(0, 10_000),
    n_queries=st.integers(0, 30),
    n_gallery=st.integers(1, 60),
    k=st.integers(1, 70),
    groups=st.integers(1, 6),
    metric=st.sampled_from(["inner_product", "l2"]),
    half=st.booleans(),
)
def test_nearest_passes_over_large_groups(
    seed: int, n_queries: int, n_gallery: int, k: int, groups: int, metric: Any, half: bool
) -> None:
    """Queries pass over different numbers of items; each must still get its k nearest of the others, or all of them."""
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, which float16 holds too: float32 and the loop in float64 have the same values, not only near ones.
    queries = whole_rows(n_queries, 4, 1000, seed)
    gallery = whole_rows(n_gallery, 4, 1000, seed + 1).to(torch.float16 if half else torch.float32)
    # Groups of very different size: the first holds about half of all items.
    query_keys = torch.randint(-1, groups, (n_queries,), generator=generator)
    gallery_keys = torch.randint(-1, groups, (n_gallery,), generator=generator)
    gallery_keys[torch.rand(n_gallery, generator=generator) < 0.5] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CONVERTED_ENTRIES", 40)  # half precision in blocks of ten rows, or k
        values, positions = nearest(queries, gallery, k, metric, [(query_keys, gallery_keys)])
    assert values.shape == positions.shape == (n_queries, k)
    places_found = [[position for position in row if position >= 0] for row in positions.tolist()]
    right = slow_knn(queries, gallery.float(), n_gallery, metric, query_keys, gallery_keys)
    for row, places, all_values, all_positions in zip(values, places_found, *right, strict=True):
        # Neighbours that tie may come in either order.
        value_of = dict(zip(all_positions, all_values, strict=True))
        assert len(set(places)) == len(places) == min(k, len(all_values))
        assert [value_of[place] for place in places] == row[: len(places)].tolist() == all_values[:k]
    assert torch.equal(values.isinf(), positions < 0)


def test_groups_are_passed_over_beside_the_query_itself() -> None:
    """In re-identification a camera finds its own pictures too easily; they must not count."""
    gallery = torch.arange(6.0)[:, None] + 1
    _, positions = knn(
        gallery[:2],
        gallery,
        3,
        query_indices=torch.tensor([5, 1]),
        gallery_indices=torch.arange(6),
        query_groups=torch.tensor([7, -1]),
        gallery_groups=torch.tensor([0, -1, 7, 7, 3, 7]),
    )
    # Item 5 has the index and the group of the first query; it is one item fewer, not two.
    assert positions.tolist() == [[4, 1, 0], [5, 4, 3]]
    with pytest.raises(InputError, match="gallery_groups is missing; items are left out by comparing both groups"):
        knn(gallery, gallery, 1, query_groups=torch.arange(6))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_values_come_in_the_order_of_rows(metric: Any) -> None:
    """Otherwise the same search shows other pictures on another machine."""
    gallery = torch.eye(3)[torch.tensor([2, 0, 1, 0, 2, 0, 1])]
    _, positions = knn(torch.eye(3)[:2], gallery, 7, metric=metric)
    assert positions.tolist() == [[1, 3, 5, 0, 2, 4, 6], [2, 6, 0, 1, 3, 4, 5]]
