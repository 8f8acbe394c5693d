"""Query expansion and database-side augmentation against loops, and their gain on noisy classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.reranking import expansion
from lightning_dml.retrieval.reranking.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.search import nearest, unit_rows
from tests.retrieval.reranking.cases import slow_expansion


def random_rows(count: int, seed: int, dimensions: int = 5) -> Tensor:
    """Unit rows in no order, some of them far from all others."""
    return unit_rows(torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)))


@given(
    n_queries=st.integers(0, 6),
    n_gallery=st.integers(1, 12),
    k=st.integers(1, 14),
    alpha=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_expansion_equals_the_definition(n_queries: int, n_gallery: int, k: int, alpha: float, seed: int) -> None:
    """Weights, exclusions and too few candidates are where implementations of it differ."""
    queries, gallery = random_rows(n_queries, seed), random_rows(n_gallery, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    query_keys = torch.randint(-1, 3, (n_queries,), generator=generator)
    gallery_keys = torch.randint(-1, 3, (n_gallery,), generator=generator)

    answer = QueryExpansion(k, alpha).apply(queries, gallery, [(query_keys, gallery_keys)])

    keys = query_keys.tolist(), gallery_keys.tolist()
    expected = slow_expansion(queries.double().numpy(), gallery.double().numpy(), k, alpha, *keys)
    assert answer.dtype == torch.float32 and answer.shape == queries.shape
    np.testing.assert_allclose(answer.numpy(), expected.reshape(n_queries, 5), atol=1e-5)


@given(count=st.integers(1, 12), k=st.integers(1, 14), alpha=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 10**6))
def test_augmentation_equals_the_definition(count: int, k: int, alpha: float, seed: int) -> None:
    """Rows must come from the original gallery, and no row may count as its own neighbour."""
    gallery = random_rows(count, seed)
    own = list(range(count))
    rows = gallery.double().numpy()
    expected = slow_expansion(rows, rows, k, alpha, own, own)
    np.testing.assert_allclose(DatabaseAugmentation(k, alpha).apply(gallery).numpy(), expected, atol=1e-5)


def test_keys_tell_which_rows_are_one_item() -> None:
    """A duplicate would otherwise be the best neighbour there is, and nothing would move."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    moved = DatabaseAugmentation(k=1, alpha=0.0).apply(gallery, torch.tensor([7, 7, 8], dtype=torch.int32))
    torch.testing.assert_close(moved[0], unit_rows(torch.tensor([[1.8, 0.6]]))[0])
    # Without a key of its own, a row is its own nearest neighbour.
    alone = DatabaseAugmentation(k=1, alpha=0.0).apply(gallery, torch.tensor([-1, -1, -1]))
    torch.testing.assert_close(alone, gallery)


def test_alpha_decides_whom_a_query_moves_to() -> None:
    """With a large exponent only near neighbours count, which keeps a long list from pulling the query away."""
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.96, 0.28], [0.6, -0.8]])
    moved = {alpha: QueryExpansion(k=2, alpha=alpha).apply(query, gallery)[0, 1].item() for alpha in (0.0, 9.0)}
    assert moved[0.0] < 0 < moved[9.0]


def test_both_lift_the_map_at_r_of_noisy_clusters() -> None:
    """Were a sign or a weight wrong, the numbers would fall instead."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40).repeat_interleave(12)
    gallery = unit_rows(torch.randn(40, 32, generator=generator)[labels] + torch.randn(480, 32, generator=generator))
    keys = torch.arange(480)

    def map_at_r(queries: Tensor, items: Tensor) -> float:
        _, positions = nearest(queries, items, 11, "inner_product", [(keys, keys)])
        hits = (labels[positions] == labels[:, None]).double()
        return (hits * hits.cumsum(dim=1) / torch.arange(1, 12)).mean().item()

    plain = map_at_r(gallery, gallery)
    assert map_at_r(QueryExpansion(k=5).apply(gallery, gallery, [(keys, keys)]), gallery) > plain + 0.05
    augmented = DatabaseAugmentation(k=5).apply(gallery)
    assert map_at_r(augmented, augmented) > plain + 0.05


def test_blocks_and_storage_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a block must not decide the numbers, and a half-precision gallery stays one."""
    queries, gallery, keys = random_rows(23, 1), random_rows(37, 2), torch.arange(23)
    exclude = [(keys, torch.arange(37))]
    whole = QueryExpansion(4).apply(queries, gallery, exclude), DatabaseAugmentation(4).apply(gallery)
    monkeypatch.setattr(expansion, "_BLOCK_ENTRIES", 20)  # 4 rows
    torch.testing.assert_close(QueryExpansion(4).apply(queries, gallery, exclude), whole[0])
    torch.testing.assert_close(DatabaseAugmentation(4).apply(gallery), whole[1])

    half = DatabaseAugmentation(4).apply(gallery.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole[1], atol=5e-3, rtol=0)
    half = QueryExpansion(4).apply(queries.half(), gallery.half(), exclude)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_rows_of_zeros_and_of_one_point_stay_finite(alpha: float) -> None:
    """A model that collapsed must show in the metrics, not as NaN or as an error."""
    for rows in (torch.zeros(4, 3), torch.ones(4, 3) / 3**0.5):
        torch.testing.assert_close(QueryExpansion(2, alpha).apply(rows, rows), rows)
        torch.testing.assert_close(DatabaseAugmentation(2, alpha).apply(rows), rows)


@pytest.mark.parametrize("kind", [QueryExpansion, DatabaseAugmentation])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": True}, "k must be an integer of at least 1, got True"),
        ({"k": 2.0}, r"k must be an integer of at least 1, got 2\.0"),
        ({"alpha": -0.5}, r"alpha must be a number, finite, at least 0, got -0\.5; 0 weights all alike"),
        ({"alpha": float("nan")}, "alpha must be a number, finite, at least 0, got nan; 0 weights all alike"),
    ],
)
def test_settings_out_of_range(kind: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    """They come out of a YAML file, and hours of training may come before the first evaluation."""
    with pytest.raises(InputError, match=message):
        kind(**settings)


def test_input_that_does_not_fit() -> None:
    """A wrong matrix must be named, not found out from a product that fails."""
    rows, broken = torch.eye(3), torch.full((1, 3), float("nan"))
    calls: dict[str, Callable[[], Tensor]] = {
        "gallery is empty": lambda: QueryExpansion().apply(rows, rows[:0]),
        r"gallery must have shape \(N, 3\), got \(3, 2\)": lambda: QueryExpansion().apply(rows, rows[:, :2]),
        "queries must be floating point": lambda: QueryExpansion().apply(rows.long(), rows),
        "gallery has NaN": lambda: QueryExpansion().apply(rows, broken),
        "queries has NaN": lambda: QueryExpansion().apply(broken, rows),
        r"gallery must have shape \(N, D\)": lambda: DatabaseAugmentation().apply(rows[0]),
        "keys must have shape": lambda: DatabaseAugmentation().apply(rows, torch.arange(2)),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
