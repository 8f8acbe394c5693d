"""Exhaustive search of checked input: faiss for tensors on the CPU, blocked torch top-k for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.exclusion import Exclusions, match_counts

SimilarityName = Literal["inner_product", "cosine", "l2"]
SearchName = Literal["inner_product", "l2"]

# Similarities in memory at a time: 64 MiB of float32.
BLOCK_ENTRIES = 2**24
# Entries of a half-precision gallery that are converted at a time: 64 MiB of float32.
_CONVERTED_ENTRIES = 2**24
# Neighbours in memory at a time where some are left out: 48 MiB of values and positions, before what is derived.
_BLOCK_NEIGHBOURS = 2**22


def nearest(
    queries: Tensor, gallery: Tensor, k: int, metric: SearchName, exclude: Exclusions = ()
) -> tuple[Tensor, Tensor]:
    """The nearest neighbours as `knn` finds them, for input that is already checked, without clamping `k`.

    Args:
        queries: (Nq, D) float32.
        gallery: (Ng, D) float32 or float16 on the same device.
        k: at least 1.
        metric: "inner_product", or "l2" (values are squared distances).
        exclude: pairs of query keys (Nq,) and gallery keys (Ng,), int64; a gallery item whose key equals that of
            the query, and is not negative, is left out.

    Returns:
        values: (Nq, k) float32, best first; the worst possible value in places without a candidate.
        positions: (Nq, k) int64 rows of `gallery`; -1 in places without a candidate.
    """
    return search_excluding(
        lambda rows, width: _search(rows, gallery, min(width, len(gallery)), metric), queries, k, metric, exclude
    )


def search_excluding(
    search: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    queries: Tensor,
    k: int,
    metric: SearchName,
    exclude: Exclusions,
) -> tuple[Tensor, Tensor]:
    """The `k` nearest that are not excluded, from a search that knows nothing of exclusion; see `nearest`.

    Args:
        search: of queries (n, D) and a number of neighbours; may return fewer of them, and positions of -1.
        queries: (Nq, D).
        k: neighbours of each query.
        metric: of the values.
        exclude: as in `nearest`.
    """
    dropped = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for query_keys, gallery_keys in exclude:
        dropped += match_counts(query_keys, gallery_keys)
    # Among k + c neighbours of a query with c excluded items there are k others, or all that exist. Queries are
    # searched together by the next power of two of c, so that one query with many does not make all searches long.
    extra = torch.where(dropped == 0, 0, 2 ** dropped.clamp_min(1).double().log2().ceil().long())
    values = queries.new_full((len(queries), k), worst_value(metric))
    positions = torch.full((len(queries), k), -1, device=queries.device)
    for width in torch.unique(extra).tolist():
        of_width = (extra == width).nonzero().flatten()
        # Callers choose their blocks by k; where much is excluded, that many queries would take too much memory.
        for rows in torch.split(of_width, max(1, _BLOCK_NEIGHBOURS // (k + width))):
            everything = len(rows) == len(queries)
            near = search(queries if everything else queries[rows], k + width)
            if width:
                near = drop_excluded(*near, k, metric, [(keys[rows], others) for keys, others in exclude])
            if everything and near[0].shape[1] == k:
                return near
            columns = min(k, near[0].shape[1])
            values[rows, :columns], positions[rows, :columns] = near[0][:, :columns], near[1][:, :columns]
    return values, positions


def drop_excluded(
    values: Tensor, positions: Tensor, k: int, metric: SearchName, exclude: Exclusions
) -> tuple[Tensor, Tensor]:
    """The first `k` columns of (n, columns) neighbours that are not excluded, filled up with -1 as in `nearest`."""
    keep = positions >= 0
    for query_keys, gallery_keys in exclude:
        keep &= (gallery_keys[positions] != query_keys[:, None]) | (query_keys[:, None] < 0)
    # The i-th kept neighbour moves to column i; what is dropped goes to a spare column that is cut off.
    order = keep.cumsum(dim=1)
    column = torch.where(keep & (order <= k), order - 1, k)
    first_values = values.new_full((len(values), k + 1), worst_value(metric)).scatter_(1, column, values)
    first_positions = positions.new_full((len(values), k + 1), -1).scatter_(1, column, positions)
    return first_values[:, :k], first_positions[:, :k]


def search_metric(metric: SimilarityName) -> SearchName:
    """The metric of the search itself: rows of unit length, which "cosine" asks for, go by inner product."""
    return "l2" if metric == "l2" else "inner_product"


def worst_value(metric: str) -> float:
    """The value in a place without a neighbour: the worst that there can be."""
    return float("inf") if metric == "l2" else float("-inf")


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) float32 divided by their Euclidean norms; rows of zeros stay zeros."""
    # Scaled by the largest entry first, so that squares of very large or small entries do not leave float32.
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=1)


@torch.no_grad()
def similarities(queries: Tensor, gallery: Tensor, metric: SearchName) -> Tensor:
    """Similarities of all pairs, larger is nearer: inner products or minus squared distances; (Nq, Ng) float32."""
    table = queries.new_empty(len(queries), len(gallery))
    squares = queries.square().sum(dim=1, keepdim=True)
    rows = len(gallery) if gallery.dtype == torch.float32 else max(1, _CONVERTED_ENTRIES // gallery.shape[1])
    for start in range(0, len(gallery), max(1, rows)):
        part = gallery[start : start + rows].float()
        columns = table[:, start : start + rows]
        with _full_float32(queries.device.type):
            torch.mm(queries, part.T, out=columns)
        if metric == "l2":
            columns.mul_(2).sub_(squares).sub_(part.square().sum(dim=1)).clamp_max_(0)
    return table


def _search(queries: Tensor, gallery: Tensor, k: int, metric: SearchName) -> tuple[Tensor, Tensor]:
    search = _search_faiss if queries.device.type == "cpu" else _search_torch
    values, positions = search(queries, gallery, k, metric)
    # faiss answers -1 where it could compare nothing, both answer inf or NaN where a product overflowed.
    check_products(torch.isfinite(values).all(dim=1) & (positions >= 0).all(dim=1))
    return values, positions


def check_products(finite: Tensor) -> None:
    """Raises InputError unless all queries, (Nq,) bool, have finite products with the gallery."""
    if not finite.all():
        raise InputError(
            f"queries: {int((~finite).sum())} rows, the first is row {int((~finite).nonzero()[0])}, have products with "
            "the gallery that overflow float32; scale the rows down or take metric='cosine'"
        )


def check_on_cpu(name: str, tensor: Tensor) -> None:
    """Raises InputError unless `tensor` is on the CPU."""
    if tensor.device.type != "cpu":
        raise InputError(f"{name} must be on the CPU, where faiss runs, got {tensor.device}; move it with .cpu()")


def _search_faiss(queries: Tensor, gallery: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Brute force of faiss on the rows as they lie; an index would keep a copy of them."""
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    wanted = queries.contiguous().numpy()
    if gallery.dtype == torch.float32:
        values, positions = faiss.knn(wanted, gallery.contiguous().numpy(), k, metric=kind)
        return torch.from_numpy(values), torch.from_numpy(positions)
    merged: tuple[Tensor, Tensor] | None = None
    start = 0
    for block in torch.split(gallery, max(k, _CONVERTED_ENTRIES // gallery.shape[1])):
        values, positions = faiss.knn(wanted, block.float().contiguous().numpy(), min(k, len(block)), metric=kind)
        part = torch.from_numpy(values), torch.from_numpy(positions) + start
        merged = part if merged is None else _merged(merged, part, k, metric)
        start += len(block)
    assert merged is not None  # an empty gallery is refused before
    return merged


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], k: int, metric: str) -> tuple[Tensor, Tensor]:
    values = torch.cat([first[0], second[0]], dim=1)
    best = values.topk(min(k, values.shape[1]), dim=1, largest=metric != "l2")
    return best.values, torch.cat([first[1], second[1]], dim=1).gather(1, best.indices)


def _search_torch(
    queries: Tensor, gallery: Tensor, k: int, metric: SearchName, block_entries: int = BLOCK_ENTRIES
) -> tuple[Tensor, Tensor]:
    gallery = gallery.float()
    best = [
        torch.topk(similarities(block, gallery, metric), k, dim=1)
        for block in torch.split(queries, max(1, block_entries // len(gallery)))
    ]
    values = torch.cat([block.values for block in best])
    return (values.neg_() if metric == "l2" else values), torch.cat([block.indices for block in best])


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Products in true float32: neither an autocast region around us nor a matmul precision may round them.

    `torch.set_float32_matmul_precision("medium")`, which Lightning recommends, makes them bfloat16 on some CPUs too.
    """
    matmul: Any = torch.backends.mkldnn.matmul if device_type == "cpu" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    # torch 2.9 gave each backend a switch of its own, and reading the old ones raises where a program has set those.
    if hasattr(matmul, "fp32_precision"):
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)
