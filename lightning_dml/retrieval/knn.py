"""Exact nearest neighbours: faiss for tensors on the CPU, blocked torch top-k for all others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.checks import check_embeddings, check_finite, check_integers

SimilarityName = Literal["inner_product", "cosine", "l2"]

# Similarities that the torch search holds at a time: 64 MiB of float32.
_BLOCK_ENTRIES = 2**24


@torch.no_grad()
def knn(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    metric: SimilarityName = "inner_product",
    query_indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` nearest gallery rows of each query, best first, by exhaustive search in float32.

    A gallery row whose index equals the query's (and is not negative) is the query itself and is left out: by
    index, never by similarity, so that the true twin of an item still counts and a noisy copy of it does not.
    All rows of the answer have the same length: where `k` is more than the query with the fewest candidates
    has (gallery rows less its own copies), it is reduced to that number for all queries, with a warning.

    Distances are computed in float32 as the field does; neighbours whose values differ by less than its rounding
    may change places. "l2" values are *squared* Euclidean distances, computed as |q|^2 + |g|^2 - 2 q.g, so far from
    the origin it is best to centre the rows first.

    Args:
        queries: (Nq, D) floating point; computed in float32.
        gallery: (Ng, D) floating point on the same device.
        k: neighbours wanted, at least 1.
        metric: "inner_product", "cosine" (rows are normalised first; a row of zeros has similarity 0 to all) or "l2".
        query_indices: (Nq,) integers that say which item each query is; negative means none.
        gallery_indices: (Ng,) integers, given together with `query_indices`.

    Returns:
        values: (Nq, k) float32; similarities descending, or for "l2" squared distances ascending.
        positions: (Nq, k) int64 rows of `gallery`, never negative.

    Raises:
        InputError: wrong shapes, dtypes, devices or lengths, nothing to search, `k` < 1, rows that hold NaN or
            infinity or whose products overflow, or a query that has no candidate but itself.

    Examples:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> items = torch.arange(3)
        >>> values, positions = knn(gallery, gallery, 1, query_indices=items, gallery_indices=items)
        >>> positions.flatten().tolist()
        [1, 0, 1]
    """
    _check_request(queries, gallery, k, metric)
    most_copies = 0
    if query_indices is not None and gallery_indices is not None:
        check_integers("query_indices", query_indices, len(queries))
        check_integers("gallery_indices", gallery_indices, len(gallery))
        most_copies = int(_copies(query_indices, gallery_indices).max())
    elif query_indices is not None or gallery_indices is not None:
        missing = "query_indices" if query_indices is None else "gallery_indices"
        raise InputError(f"{missing} is missing; self is left out by comparing both indices, so give both or neither")
    available = len(gallery) - most_copies
    if available < 1:
        raise InputError(
            f"gallery has {len(gallery)} rows, all of them copies of one query by index; give it other items, or "
            "leave the indices out to let queries find themselves"
        )
    if k > available:
        warnings.warn(f"k={k} is more than the {available} candidates of a query; it is now {available}", stacklevel=2)
    queries, gallery = queries.float(), gallery.float()
    if metric == "cosine":
        queries, gallery, metric = unit_rows(queries), unit_rows(gallery), "inner_product"
    return nearest(queries, gallery, min(k, available), metric, query_indices, gallery_indices)


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: Literal["inner_product", "l2"],
    query_indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`knn` for input that is already checked (float32, 1 <= k <= Ng, at least one query), without clamping.

    A query with fewer than `k` candidates left keeps those that it has; the rest of its positions are -1 and of
    its values the worst possible.
    """
    if query_indices is None or gallery_indices is None:
        return _search(queries, gallery, k, metric)
    most_copies = int(_copies(query_indices, gallery_indices).max())
    if most_copies == 0:
        return _search(queries, gallery, k, metric)
    # Among so many neighbours, at most `most_copies` of a query are dropped: k remain, or all that there are.
    values, positions = _search(queries, gallery, min(k + most_copies, len(gallery)), metric)
    query_column = query_indices[:, None]
    keep = (gallery_indices[positions] != query_column) | (query_column < 0)
    # The i-th kept neighbour moves to column i; what is dropped goes to a spare column that is cut off.
    order = keep.cumsum(dim=1)
    column = torch.where(keep & (order <= k), order - 1, k)
    worst = float("inf") if metric == "l2" else float("-inf")
    kept_values = values.new_full((len(queries), k + 1), worst).scatter_(1, column, values)
    kept_positions = positions.new_full((len(queries), k + 1), -1).scatter_(1, column, positions)
    return kept_values[:, :k].contiguous(), kept_positions[:, :k].contiguous()


def unit_rows(rows: Tensor) -> Tensor:
    """`rows` (N, D) float32 divided by their Euclidean norms; rows of zeros stay zeros."""
    # Scaled by the largest entry first, so that squares of very large or small entries do not leave float32.
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=1)


def _search(queries: Tensor, gallery: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    search = _search_faiss if queries.device.type == "cpu" else _search_torch
    values, positions = search(queries, gallery, k, metric)
    # faiss answers -1 where it could compare nothing, both answer inf or NaN where a product overflowed.
    broken = ~torch.isfinite(values).all(dim=1) | (positions < 0).any(dim=1)
    if broken.any():
        raise InputError(
            f"queries: {int(broken.sum())} rows, the first is row {int(broken.nonzero()[0])}, have products with the "
            "gallery that overflow float32; scale the rows down or search with metric='cosine'"
        )
    return values, positions


def _search_faiss(queries: Tensor, gallery: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    # The flat index is measured a little faster than faiss.knn; both are exhaustive.
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(gallery.shape[1])
    index.add(gallery.contiguous().numpy())
    values, positions = index.search(queries.contiguous().numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(positions)


def _search_torch(
    queries: Tensor, gallery: Tensor, k: int, metric: str, block_entries: int = _BLOCK_ENTRIES
) -> tuple[Tensor, Tensor]:
    blocks = []
    gallery_squares = gallery.square().sum(dim=1) if metric == "l2" else None
    with _full_float32(queries.device.type):
        for block in torch.split(queries, max(1, block_entries // len(gallery))):
            similarities = block @ gallery.T
            if gallery_squares is not None:
                squares = block.square().sum(dim=1, keepdim=True) + gallery_squares
                similarities = squares.sub_(similarities, alpha=2).clamp_min_(0)
            blocks.append(torch.topk(similarities, k, dim=1, largest=gallery_squares is None))
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Products in true float32: neither an autocast region around us nor a TF32 setting may round them."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and reading the old one raises where a program has set the new one.
    switch, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, switch)
    setattr(matmul, switch, exact)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(matmul, switch, before)


def _copies(query_indices: Tensor, gallery_indices: Tensor) -> Tensor:
    """How many gallery rows each query is left out of, (Nq,) int64."""
    items = gallery_indices[gallery_indices >= 0].sort().values
    # Negative queries sort before every item, so both searches give 0 for them.
    return torch.searchsorted(items, query_indices, right=True) - torch.searchsorted(items, query_indices)


def _check_request(queries: Tensor, gallery: Tensor, k: int, metric: str) -> None:
    for name, tensor in (("queries", queries), ("gallery", gallery)):
        check_embeddings(name, tensor)
        if len(tensor) == 0:
            raise InputError(f"{name} is empty, got shape {tuple(tensor.shape)}; give at least one row")
    if queries.shape[1] != gallery.shape[1]:
        raise InputError(
            f"gallery has {gallery.shape[1]} dimensions and queries have {queries.shape[1]}; embed both with one model"
        )
    if queries.device != gallery.device:
        raise InputError(f"gallery is on {gallery.device} and queries are on {queries.device}; move one of them")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k must be an integer of at least 1, got {k!r}")
    if metric not in get_args(SimilarityName):
        raise InputError(f"metric must be one of {', '.join(get_args(SimilarityName))}, got {metric!r}")
    check_finite("queries", queries)
    check_finite("gallery", gallery)
