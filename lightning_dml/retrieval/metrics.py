"""`RetrievalMetrics`: the torchmetrics front of this package; it holds the rows, functions hold the mathematics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dml.distributed import gather_rows, rank, world_size
from lightning_dml.errors import InputError
from lightning_dml.retrieval.checks import check_embeddings, check_finite, check_flags, check_integers
from lightning_dml.retrieval.functional import map_at_r, precision_at_k, r_precision, recall_at_k
from lightning_dml.retrieval.knn import SimilarityName, nearest, unit_rows
from lightning_dml.retrieval.rows import Rows, gather, in_index_order, to_collective_device

# Neighbours that are held at a time (a few hundred MiB with all that is derived from them), however large R is.
_BLOCK_NEIGHBOURS = 2**22


class RetrievalMetrics(Metric):
    """Recall@K, precision@1, R-precision and MAP@R of everything that was embedded, by exact search.

    Collects rows on the CPU. `compute` gathers them from all ranks, drops duplicates by index (a padded distributed
    sampler makes them), sorts by index, shares the queries out over the ranks, leaves each query itself out of its
    neighbours by index, and takes means in float64: the same numbers on every rank and for every number of ranks.
    The search runs where the embeddings came from: with faiss for the CPU, with torch on a GPU.

    Queries without a match in the gallery are left out of the means, with one warning that says how many. Where no
    query has one (the first batches of a sanity check, say), the values are NaN.

    `compute` is a collective that every rank must call, and its result is not cached: a cache that only some ranks
    have to renew would leave the others waiting. For the same reason there is no batch value: `forward` is refused.

    Args:
        ks: the K of Recall@K, each at least 1. A K above the number of gallery items counts all of them and warns.
        metric: "cosine" (default; rows need not be normalised), "inner_product" of the rows as they come, or "l2".

    Raises:
        InputError: `ks` is empty or has an entry below 1, or `metric` is unknown.

    Examples:
        >>> metrics = RetrievalMetrics(ks=(1, 2))
        >>> metrics.update(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]]), torch.tensor([0, 1, 0, 1]))
        >>> {name: round(value, 3) for name, value in metrics.compute().items()}
        {'recall@1': 0.0, 'recall@2': 0.75, 'precision@1': 0.0, 'map@r': 0.0, 'r_precision': 0.0}
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    embeddings: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]
    is_query: list[Tensor]
    is_gallery: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 2, 4, 8), metric: SimilarityName = "cosine") -> None:
        """Checks the settings; see the class for what they mean."""
        # torchmetrics must not gather: its "cat" fails if a rank saw nothing, `None` if batch counts differ.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
            raise InputError(f"ks must be one or more integers of at least 1, got {ks!r}")
        if metric not in get_args(SimilarityName):
            raise InputError(f"metric must be one of {', '.join(get_args(SimilarityName))}, got {metric!r}")
        self.ks = tuple(ks)
        self.metric: SimilarityName = metric
        self._search_device = torch.device("cpu")
        for name in ("embeddings", "labels", "indices", "is_query", "is_gallery"):
            self.add_state(name, default=[], dist_reduce_fx=None)

    def update(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        is_query: Tensor | None = None,
        is_gallery: Tensor | None = None,
    ) -> None:
        """Adds a batch; a batch without rows is allowed and adds nothing.

        Args:
            embeddings: (N, D) floating point, on any device; kept as float32.
            labels: (N,) integers, compared as int64.
            indices: (N,) integers >= 0 that name each item once over all ranks and dataloaders. Without them, rows
                are numbered as they come, and duplicates cannot be told.
            is_query: (N,) bool, all True by default.
            is_gallery: (N,) bool, all True by default; self-retrieval is everything both.

        Raises:
            InputError: shapes, lengths or dtypes are wrong, rows hold NaN or infinity, the dimension changed, an
                index is negative, or only some of the batches come with indices.
        """
        check_embeddings("embeddings", embeddings)
        count = len(embeddings)
        check_integers("labels", labels, count)
        if indices is not None:
            check_integers("indices", indices, count)
        for name, flags in (("is_query", is_query), ("is_gallery", is_gallery)):
            if flags is not None:
                check_flags(name, flags, count)
        if count == 0:
            return
        if indices is not None and int(indices.min()) < 0:
            raise InputError(f"indices must be 0 or more, got {int(indices.min())}; leave them out if there are none")
        if self.embeddings and bool(self.indices) != (indices is not None):
            raise InputError("indices were given to some updates only; give them to every update() or to none")
        if self.embeddings and self.embeddings[0].shape[1] != embeddings.shape[1]:
            raise InputError(
                f"embeddings have {embeddings.shape[1]} dimensions, earlier batches {self.embeddings[0].shape[1]}; "
                "call reset() before another model is evaluated"
            )
        rows = _kept(embeddings, torch.float32)
        check_finite("embeddings", rows)

        self.embeddings.append(rows)
        self.labels.append(_kept(labels, torch.int64))
        if indices is not None:
            self.indices.append(_kept(indices, torch.int64))
        everything = torch.ones(count, dtype=torch.bool)
        self.is_query.append(everything if is_query is None else _kept(is_query, torch.bool))
        self.is_gallery.append(everything if is_gallery is None else _kept(is_gallery, torch.bool))
        self._search_device = embeddings.device

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks' rows; every rank must call it, those without rows as well.

        Returns:
            `recall@K` for each K, `precision@1`, `map@r` and `r_precision`.

        Raises:
            InputError: on all ranks alike, when no rank has seen a row, when dimensions or the use of indices differ
                between ranks, or when one index came with different labels or roles.
        """
        rows = in_index_order(gather(self._local_rows(), with_indices=bool(self.indices)))
        if self.metric == "cosine":
            rows = Rows(unit_rows(rows.embeddings), rows.labels, rows.indices, rows.is_query, rows.is_gallery)
        queries, gallery = rows.take(rows.is_query), rows.take(rows.is_gallery)
        relevant = _count_relevant(queries, gallery)
        answerable = relevant > 0
        self._warn(len(queries), int(answerable.sum()), _most_candidates(queries.take(answerable), gallery))
        if not answerable.any():
            return dict.fromkeys(self._names(), math.nan)

        queries, relevant = queries.take(answerable), relevant[answerable]
        k = min(max(*self.ks, int(relevant.max())), len(gallery))
        mine = torch.arange(len(queries)).tensor_split(world_size())[rank()]
        values = self._per_query(queries.take(mine), gallery, relevant[mine], k)
        values = gather_rows(to_collective_device(values)).cpu()
        # fsum is exact, so the means depend on neither the number of threads nor the order of the rows.
        means = [math.fsum(column.tolist()) / len(values) for column in values.unbind(dim=1)]
        return dict(zip(self._names(), means, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a batch has no retrieval value of its own."""
        raise NotImplementedError("RetrievalMetrics has no value per batch; call update(), and compute() at the end")

    def _per_query(self, queries: Rows, gallery: Rows, relevant: Tensor, k: int) -> Tensor:
        """Every metric of every query, (Nq, metrics) float64 in the order of `_names`."""
        device = _usable(self._search_device)
        metric: Literal["inner_product", "l2"] = "l2" if self.metric == "l2" else "inner_product"
        gallery_embeddings, gallery_indices = gallery.embeddings.to(device), gallery.indices.to(device)
        blocks = [torch.empty(0, len(self._names()), dtype=torch.float64)]
        for block in torch.split(torch.arange(len(queries)), max(1, _BLOCK_NEIGHBOURS // k)):
            if len(block) == 0:  # a rank without queries
                continue
            part = queries.take(block)
            _, positions = nearest(
                part.embeddings.to(device), gallery_embeddings, k, metric, part.indices.to(device), gallery_indices
            )
            positions = positions.cpu()
            # Position -1 says that a query in a small gallery has no further candidate.
            hits = (gallery.labels[positions] == part.labels[:, None]) & (positions >= 0)
            columns = [function(hits, relevant[block]) for function in self._functions(k)]
            blocks.append(torch.stack(columns, dim=1))
        return torch.cat(blocks)

    def _names(self) -> list[str]:
        return [*(f"recall@{k}" for k in self.ks), "precision@1", "map@r", "r_precision"]

    def _functions(self, columns: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """A function of hits (Nq, columns) and relevant for each of `_names`."""
        return [
            *(partial(_recall, k=min(k, columns)) for k in self.ks),
            lambda hits, _: precision_at_k(hits, 1),
            map_at_r,
            r_precision,
        ]

    def _local_rows(self) -> Rows:
        labels = torch.cat(self.labels) if self.labels else torch.empty(0, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.bool)
        return Rows(
            torch.cat(self.embeddings) if self.embeddings else torch.empty(0, 0),
            labels,
            torch.cat(self.indices) if self.indices else torch.full_like(labels, -1),
            torch.cat(self.is_query) if self.is_query else none,
            torch.cat(self.is_gallery) if self.is_gallery else none,
        )

    def _warn(self, queries: int, answerable: int, candidates: int) -> None:
        if rank() != 0:
            return
        if answerable < queries or queries == 0:
            outcome = "they are left out of the means" if answerable else "so every value is NaN"
            warnings.warn(
                f"{queries - answerable} of {queries} queries have no match in the gallery; {outcome}", stacklevel=4
            )
        beyond = [k for k in self.ks if k > candidates]
        if beyond and answerable:
            warnings.warn(
                f"ks: {beyond} are more than the {candidates} gallery items of a query; Recall@K counts all of those",
                stacklevel=4,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # .to(), .cuda() or .half() on a LightningModule come here too: rows stay on the CPU in float32 and int64.
        return super()._apply(fn, exclude_state=[*self._defaults, *exclude_state])


def _recall(hits: Tensor, _relevant: Tensor, k: int) -> Tensor:
    return recall_at_k(hits, k)


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU, so that a caller's buffer may be used again."""
    return tensor.detach().to("cpu", dtype, copy=True)


def _usable(device: torch.device) -> torch.device:
    """`device`, or the CPU where a metric that was filled on a GPU has been unpickled without one."""
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device


def _count_relevant(queries: Rows, gallery: Rows) -> Tensor:
    """R of each query: gallery items with its label, less itself; (Nq,) int64."""
    classes, numbers = torch.unique(torch.cat([queries.labels, gallery.labels]), return_inverse=True)
    counts = torch.bincount(numbers[len(queries) :], minlength=len(classes))
    return counts[numbers[: len(queries)]] - queries.is_gallery.long()


def _most_candidates(queries: Rows, gallery: Rows) -> int:
    """The most gallery items that any query may find."""
    return len(gallery) - int(bool(queries.is_gallery.all()))
