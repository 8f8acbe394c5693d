"""The nearest gallery rows of each query, for tensors of any origin."""

from __future__ import annotations

import warnings
from typing import get_args

import torch
from torch import Tensor

from lightning_dml.checks import check_choice, check_count, check_embeddings, check_finite, check_not_empty
from lightning_dml.errors import InputError
from lightning_dml.retrieval.exclusion import Exclusions, combined_keys, key_pairs, match_counts
from lightning_dml.retrieval.search import SimilarityName, nearest, search_metric, unit_rows


@torch.no_grad()
def knn(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    metric: SimilarityName = "inner_product",
    query_indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
    query_groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` nearest gallery rows of each query, best first, by exhaustive search in float32.

    A gallery row whose index equals the query's (and is not negative) is the query itself and is left out: by
    index, never by similarity, so that the true twin of an item still counts and a noisy copy of it does not.
    Rows of the query's group are left out in the same way.
    All rows of the answer have the same length: where `k` is more than the query with the fewest candidates
    has (gallery rows less those left out), it is reduced to that number for all queries, with a warning.

    Distances are computed in float32 as the field does; neighbours whose values differ by less than its rounding
    may change places, and those of equal value come in the order of their rows. "l2" values are *squared* Euclidean
    distances, computed as |q|^2 + |g|^2 - 2 q.g, so far from the origin it is best to centre the rows first.

    Tensors on the CPU are searched with faiss, others in blocks with torch. For an index that is built once and
    searched often, or that is approximate, see `ApproximateIndex`.

    Args:
        queries: (Nq, D) floating point; computed in float32.
        gallery: (Ng, D) floating point on the same device.
        k: neighbours wanted, at least 1.
        metric: "inner_product", "cosine" (rows are normalised first; a row of zeros has similarity 0 to all) or "l2".
        query_indices: (Nq,) integers that say which item each query is; negative means none.
        gallery_indices: (Ng,) integers, given together with `query_indices`.
        query_groups: (Nq,) integers, the group (camera, sequence, class) whose items a query passes over; negative
            means none.
        gallery_groups: (Ng,) integers, given together with `query_groups`.

    Returns:
        values: (Nq, k) float32; similarities descending, or for "l2" squared distances ascending.
        positions: (Nq, k) int64 rows of `gallery`, never negative.

    Raises:
        InputError: wrong shapes, dtypes, devices or lengths, nothing to search, `k` < 1, rows that hold NaN or
            infinity or whose products overflow, or a query that has no candidate.

    Examples:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> items = torch.arange(3)
        >>> values, positions = knn(gallery, gallery, 1, query_indices=items, gallery_indices=items)
        >>> positions.flatten().tolist()
        [1, 0, 1]
    """
    _check_request(queries, gallery, k, metric)
    exclude: list[tuple[Tensor, Tensor]] = []
    for name, of_queries, of_gallery in (
        ("indices", query_indices, gallery_indices),
        ("groups", query_groups, gallery_groups),
    ):
        exclude += key_pairs(name, of_queries, of_gallery, queries, gallery)
    available = len(gallery) - _most_excluded(exclude)
    if available < 1:
        raise InputError(
            f"gallery has {len(gallery)} rows, all of them copies of one query by index or of its group; give it other "
            "items, or leave the indices out to let queries find themselves"
        )
    if k > available:
        warnings.warn(f"k={k} is more than the {available} candidates of a query; it is now {available}", stacklevel=2)
    queries, gallery = queries.float(), gallery.float()
    if metric == "cosine":
        queries, gallery = unit_rows(queries), unit_rows(gallery)
    values, positions = nearest(queries, gallery, min(k, available), search_metric(metric), exclude)
    return _in_row_order(values, positions, descending=metric != "l2")


def _most_excluded(exclude: Exclusions) -> int:
    """Number of gallery rows that the query with the most of them passes over."""
    if not exclude:
        return 0
    counts = [match_counts(*keys) for keys in exclude]
    if len(exclude) == 2:  # a row that has both the index and the group of the query is passed over once
        (first, second), (third, fourth) = exclude
        both = combined_keys(torch.cat([first, second]), torch.cat([third, fourth]))
        counts.append(-match_counts(both[: len(first)], both[len(first) :]))
    return int(torch.stack(counts).sum(dim=0).max())


def _in_row_order(values: Tensor, positions: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    """The same neighbours, those of equal value by ascending row."""
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().flatten()
    if len(tied):
        some, order = positions[tied].sort(dim=1)
        # A stable sort by value keeps the order of the rows among equals.
        by_value = values[tied].gather(1, order).sort(dim=1, descending=descending, stable=True)
        positions[tied] = some.gather(1, by_value.indices)
    return values, positions


def _check_request(queries: Tensor, gallery: Tensor, k: int, metric: str) -> None:
    check_embeddings("queries", queries)
    check_embeddings("gallery", gallery, queries.shape[1])
    check_not_empty("queries", queries)
    check_not_empty("gallery", gallery)
    if queries.device != gallery.device:
        raise InputError(f"gallery is on {gallery.device} and queries are on {queries.device}; move one of them")
    check_count("k", k)
    check_choice("metric", metric, get_args(SimilarityName))
    check_finite("queries", queries)
    check_finite("gallery", gallery)
