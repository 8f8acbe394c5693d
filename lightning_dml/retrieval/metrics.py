"""The torchmetrics front of this package: `RetrievalMetrics` collects rows, functions do the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dml.checks import check_embeddings, check_finite, check_flags, check_integers
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.retrieval.averaging import AverageName
from lightning_dml.retrieval.options import Options, StoredName
from lightning_dml.retrieval.reranking.step import RerankingStep
from lightning_dml.retrieval.results import RetrievalResult, evaluate
from lightning_dml.retrieval.rows import Rows, gather_items
from lightning_dml.retrieval.search import SimilarityName, unit_rows
from lightning_dml.retrieval.tasks import IgnoreName

_STATES = ("embeddings", "labels", "indices", "is_query", "is_gallery", "groups")


class RetrievalMetrics(Metric):
    """Retrieval and clustering metrics of everything that was embedded, by exact search.

    Collects rows on the CPU. `compute` gathers them from all ranks, drops duplicates by index (a padded distributed
    sampler makes them), sorts by index, shares the queries out over the ranks, leaves each query itself out of its
    neighbours by index, and takes means in float64: the same numbers on every rank and for every number of ranks.
    The search runs where the embeddings came from: with faiss for the CPU, with torch on a GPU.

    Neighbours that float32 cannot tell apart are tied, and every metric is then its mean over all orders of them: an
    embedding that has collapsed to a point scores what chance scores, in whatever order its rows come. That holds for
    exact search, with query expansion and database augmentation too; of an approximate index and of k-reciprocal
    re-ranking only the neighbours that they name are known, and which of many tied ones those are is up to them.

    Queries without a match in the gallery are left out of the means, with one warning that says how many, and are
    counted in `result`. Where no query has one (the first batches of a sanity check, say), the values are NaN.

    `compute` is a collective that every rank must call, and its result is not cached: a cache that only some ranks
    have to renew would leave the others waiting. For the same reason there is no batch value: `forward` is refused.

    Args:
        ks: the K of the metrics at K, each at least 1. A K above the number of gallery items counts all of them and
            warns.
        metric: "cosine" (default; rows need not be normalised), "inner_product" of the rows as they come, or "l2".
        include: what to compute: "recall", "precision" and "ndcg" at each K, "precision@1", "map@r", "r_precision",
            all from the nearest neighbours; "map" and "mrr", which look at the whole gallery for each query and take
            a few times as long; "nmi" and "ami" of k-means with as many clusters as there are classes.
        average: "micro", over queries, or "macro", over the means of the classes.
        confidence: level in (0, 1) of bootstrap intervals over classes, as `recall@1/low` and `recall@1/high` and so
            on for every metric but the clustering ones; None leaves them out.
        bootstrap_draws: how often the classes are drawn anew.
        ignore: which gallery items a query passes over, if `groups` are given: "label_and_group", those of its label
            and group (in re-identification, pictures of the query by the query's own camera), or "group", all of its
            group (a sequence of frames).
        gallery_draws: above 0, the protocol of VehicleID: one random item of each class is the gallery, the others
            are queries, and the values are means over so many draws. Items with a role of their own are refused.
        seed: of draws, bootstrap, k-means and indexes.
        dtype: of the collected rows, "float32" or, at half the memory, "float16".
        reranking: steps such as `QueryExpansion()`, `DatabaseAugmentation()`, or `KReciprocal()` alone; for "cosine".
        index: a faiss factory string such as "IVF4096,Flat" or "HNSW32" for an approximate search of a very large
            gallery; `index_recall` then says which share of the exact neighbours it finds, measured on up to 1,000
            queries. None searches exactly.
        index_parameters: of its search, in faiss's words, such as "nprobe=16".

    Attributes:
        options: the arguments, as `options.ks`, `options.metric` and so on.
        result: the `RetrievalResult` of the last `compute`, with values per class; None before.

    Raises:
        InputError: for an option out of range, unknown, or at odds with another.

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
    groups: list[Tensor]

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8),
        metric: SimilarityName = "cosine",
        include: Sequence[str] = ("recall", "precision@1", "map@r", "r_precision"),
        average: AverageName = "micro",
        confidence: float | None = None,
        bootstrap_draws: int = 1000,
        ignore: IgnoreName = "label_and_group",
        gallery_draws: int = 0,
        seed: int = 0,
        dtype: StoredName = "float32",
        reranking: Sequence[RerankingStep] = (),
        index: str | None = None,
        index_parameters: str = "",
    ) -> None:
        """Checks the settings; see the class for what they mean."""
        # torchmetrics must not gather: its "cat" fails if a rank saw nothing, `None` if batch counts differ.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.options = Options(
            ks,
            metric,
            include,
            average,
            confidence,
            bootstrap_draws,
            ignore,
            gallery_draws,
            seed,
            dtype,
            reranking,
            index,
            index_parameters,
        )
        self.result: RetrievalResult | None = None
        self._rows_device = torch.device("cpu")
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx=None)

    def update(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        is_query: Tensor | None = None,
        is_gallery: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        """Adds a batch; a batch without rows is allowed and adds nothing.

        Args:
            embeddings: (N, D) floating point, on any device; kept on the CPU, for "cosine" as unit rows.
            labels: (N,) integers, compared as int64; -1 is a distractor, which matches nothing.
            indices: (N,) integers >= 0 that name each item once over all ranks and dataloaders. Without them, rows
                are numbered as they come, and duplicates cannot be told.
            is_query: (N,) bool, all True by default.
            is_gallery: (N,) bool, all True by default; self-retrieval is everything both.
            groups: (N,) integers, the camera or sequence of each item, negative for none; see `ignore`.

        Raises:
            InputError: shapes, lengths or dtypes are wrong, rows hold NaN or infinity (in float16: beyond 65,504),
                the dimension changed, an index is negative, only some of the batches come with indices or groups,
                or `gallery_draws` is at odds with a role.
        """
        check_embeddings("embeddings", embeddings)
        count = len(embeddings)
        check_integers("labels", labels, count)
        for name, column in (("indices", indices), ("groups", groups)):
            if column is not None:
                check_integers(name, column, count)
        for name, flags in (("is_query", is_query), ("is_gallery", is_gallery)):
            if flags is not None:
                check_flags(name, flags, count)
                if self.options.gallery_draws and not flags.all():
                    raise InputError(
                        f"{name} is not True for all rows, but gallery_draws={self.options.gallery_draws} draws the "
                        "roles; leave one of them out"
                    )
        if count == 0:
            return
        if indices is not None and int(indices.min()) < 0:
            raise InputError(f"indices must be 0 or more, got {int(indices.min())}; leave them out if there are none")
        for name, column in (("indices", indices), ("groups", groups)):
            if self.embeddings and bool(getattr(self, name)) != (column is not None):
                raise InputError(f"{name} were given to some updates only; give them to every update() or to none")
        if self.embeddings and self.embeddings[0].shape[1] != embeddings.shape[1]:
            raise InputError(
                f"embeddings have {embeddings.shape[1]} dimensions, earlier batches {self.embeddings[0].shape[1]}; "
                "call reset() before another model is evaluated"
            )
        rows = self._stored_rows(embeddings)

        self.embeddings.append(rows)
        self.labels.append(_copied(labels, torch.int64))
        if indices is not None:
            self.indices.append(_copied(indices, torch.int64))
        if groups is not None:
            self.groups.append(_copied(groups, torch.int64))
        everything = torch.ones(count, dtype=torch.bool)
        self.is_query.append(everything if is_query is None else _copied(is_query, torch.bool))
        self.is_gallery.append(everything if is_gallery is None else _copied(is_gallery, torch.bool))
        self._rows_device = embeddings.device

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The metrics over all ranks' rows; every rank must call it, those without rows as well.

        Returns:
            `recall@K` for each K, `precision@1`, `map@r` and so on, in the order of `include`; then the ends of their
            intervals, and `index_recall`, where those are asked for.

        Raises:
            NothingToEvaluate: an InputError, when no item is a query, or none is in the gallery.
            InputError: on all ranks alike, when no rank has seen a row, when dimensions or the use of indices or
                groups differ between ranks, or when one index came with different labels, roles or groups.
            RuntimeError: where another rank failed.
        """
        rows = gather_items(self._local_rows(), bool(self.indices), bool(self.groups))
        self.result = evaluate(rows, self.options, self._rows_device)
        return dict(self.result.values)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a batch has no retrieval value of its own."""
        raise NotImplementedError("RetrievalMetrics has no value per batch; call update(), and compute() at the end")

    def _local_rows(self) -> Rows:
        labels = torch.cat(self.labels) if self.labels else torch.empty(0, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.bool)
        return Rows(
            self._joined_embeddings(),
            labels,
            torch.cat(self.indices) if self.indices else torch.full_like(labels, UNLABELLED),
            torch.cat(self.is_query) if self.is_query else none,
            torch.cat(self.is_gallery) if self.is_gallery else none,
            torch.cat(self.groups) if self.groups else torch.full_like(labels, UNLABELLED),
        )

    def _joined_embeddings(self) -> Tensor:
        """This rank's embeddings in one piece, which takes the place of the batches: they are not kept twice."""
        if not self.embeddings:
            return torch.empty(0, 0, dtype=getattr(torch, self.options.dtype))
        if len(self.embeddings) > 1:
            whole = self.embeddings[0].new_empty((sum(map(len, self.embeddings)), self.embeddings[0].shape[1]))
            end = len(whole)
            while self.embeddings:
                batch = self.embeddings.pop()
                whole[end - len(batch) : end] = batch
                end -= len(batch)
            self.embeddings.append(whole)
        return self.embeddings[0]

    def _stored_rows(self, embeddings: Tensor) -> Tensor:
        """A copy of the embeddings on the CPU as they are stored, of unit length for "cosine"."""
        rows = embeddings.detach().float()
        check_finite("embeddings", rows)
        unit = self.options.metric == "cosine"
        stored = (unit_rows(rows) if unit else rows).to("cpu", getattr(torch, self.options.dtype), copy=not unit)
        if self.options.dtype == "float16" and not unit:
            check_finite("embeddings in float16", stored)
        return stored

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # .to(), .cuda() or .half() on a LightningModule come here too: rows stay on the CPU as they are stored.
        return super()._apply(fn, exclude_state=[*self._defaults, *exclude_state])


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU, so that a caller's buffer may be used again."""
    return tensor.detach().to("cpu", dtype, copy=True)
