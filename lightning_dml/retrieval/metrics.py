"""`RetrievalMetrics`: the torchmetrics front of this package; it holds the rows, functions hold the mathematics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dml.checks import check_embeddings, check_finite, check_flags, check_integers
from lightning_dml.distributed import collective_device, gather_numbers, on_first_rank, rank
from lightning_dml.errors import InputError, NothingToEvaluate
from lightning_dml.retrieval.averaging import (
    AverageName,
    PerClass,
    bootstrap_interval,
    class_means,
    macro_average,
    micro_average,
)
from lightning_dml.retrieval.clustering import (
    adjusted_mutual_information,
    kmeans_labels,
    normalized_mutual_information,
)
from lightning_dml.retrieval.evaluation import Items
from lightning_dml.retrieval.options import StoredName, check_options, check_search, metric_names
from lightning_dml.retrieval.reranking.step import RerankingStep
from lightning_dml.retrieval.rows import Rows, gather_items
from lightning_dml.retrieval.scoring import Scores, Settings, score
from lightning_dml.retrieval.search import SimilarityName, unit_rows
from lightning_dml.retrieval.tasks import IgnoreName, Task, by_draws, by_roles, dense_classes, exclusion_keys

_CLUSTERING = {"nmi": normalized_mutual_information, "ami": adjusted_mutual_information}
_STATES = ("embeddings", "labels", "indices", "is_query", "is_gallery", "groups")


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """What an evaluation found.

    Attributes:
        values: what `RetrievalMetrics.compute` returns.
        per_class: the mean of each metric over the queries of each class; None for clustering metrics alone.
        queries: how many queries there were, over all draws; 0 for clustering metrics alone.
        unmatched: how many of them have no match in the gallery and are left out of the means.
        items: how many different items were evaluated.
    """

    values: dict[str, float]
    per_class: PerClass | None
    queries: int
    unmatched: int
    items: int


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
        dtype: in which rows are kept, "float32" or, at half the memory, "float16".
        reranking: steps such as `QueryExpansion()`, `DatabaseAugmentation()`, or `KReciprocal()` alone; for "cosine".
        index: a faiss factory string such as "IVF4096,Flat" or "HNSW32" for an approximate search of a very large
            gallery; `index_recall` then says which share of the exact neighbours it finds, measured on up to 1,000
            queries. None searches exactly.
        index_parameters: of its search, in faiss's words, such as "nprobe=16".

    Attributes:
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
        check_options(ks, metric, include, average, confidence, bootstrap_draws, ignore, gallery_draws, seed, dtype)
        check_search(metric, include, reranking, index, index_parameters)
        self.ks = tuple(ks)
        self.metric: SimilarityName = metric
        self.include = tuple(dict.fromkeys(include))
        self.average: AverageName = average
        self.confidence = confidence
        self.bootstrap_draws = bootstrap_draws
        self.ignore: IgnoreName = ignore
        self.gallery_draws = gallery_draws
        self.seed = seed
        self.dtype_name: StoredName = dtype
        self.reranking = tuple(reranking)
        self.index = index
        self.index_parameters = index_parameters
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
                if self.gallery_draws and not flags.all():
                    raise InputError(
                        f"{name} is not True for all rows, but gallery_draws={self.gallery_draws} draws the roles; "
                        "leave one of them out"
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
        rows = self._kept_rows(embeddings)

        self.embeddings.append(rows)
        self.labels.append(_kept(labels, torch.int64))
        if indices is not None:
            self.indices.append(_kept(indices, torch.int64))
        if groups is not None:
            self.groups.append(_kept(groups, torch.int64))
        everything = torch.ones(count, dtype=torch.bool)
        self.is_query.append(everything if is_query is None else _kept(is_query, torch.bool))
        self.is_gallery.append(everything if is_gallery is None else _kept(is_gallery, torch.bool))
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
        classes = dense_classes(rows.labels)
        keys = exclusion_keys(rows.labels, rows.groups, self.ignore)
        blind = exclusion_keys(rows.labels, rows.groups if self.ignore == "group" else None, "group")
        items = Items(rows.embeddings, classes, keys)
        tasks = self._tasks(rows, classes)
        means: dict[str, float] = {}
        counts, per_class = (0, 0), None
        names = metric_names(self.ks, self.include)
        if names:
            settings = self._settings(_search_device(self._rows_device))
            scores = [score(items, blind, task, settings) for task in tasks]
            answered = torch.cat([each.answered for each in scores])
            counts = sum(each.queries for each in scores), len(answered)
            self._warn(*counts, max(each.candidates for each in scores))
            values = torch.cat([each.values for each in scores])
            per_class = class_means(values, rows.labels[answered], names)
            means = self._means(values, per_class) | self._index_recall(scores)
        means |= self._clustering(rows.embeddings, classes)
        order = [name for each in self.include for name in (metric_names(self.ks, [each]) or [each])]
        values_by_name = {name: means[name] for name in order} | self._intervals(per_class) | means
        self.result = RetrievalResult(values_by_name, per_class, counts[0], counts[0] - counts[1], len(rows))
        return dict(values_by_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a batch has no retrieval value of its own."""
        raise NotImplementedError("RetrievalMetrics has no value per batch; call update(), and compute() at the end")

    def _tasks(self, rows: Rows, classes: Tensor) -> Iterable[Task]:
        if self.gallery_draws:
            return by_draws(classes, self.gallery_draws, self.seed)
        for name, flags in (("is_query", rows.is_query), ("is_gallery", rows.is_gallery)):
            if not flags.any():
                raise NothingToEvaluate(
                    f"{name} is False for all {len(rows)} items, so there is "
                    f"{'nothing to search for' if name == 'is_query' else 'no gallery'}; evaluate queries and gallery "
                    "together, or leave the roles out for self-retrieval"
                )
        return [by_roles(rows.is_query, rows.is_gallery)]

    def _settings(self, device: torch.device) -> Settings:
        return Settings(
            self.ks,
            "l2" if self.metric == "l2" else "inner_product",  # rows are of unit length where it is "cosine"
            self.include,
            self.reranking,
            self.index,
            self.index_parameters,
            self.seed,
            device,
        )

    def _means(self, values: Tensor, per_class: PerClass) -> dict[str, float]:
        averages = macro_average(per_class) if self.average == "macro" else micro_average(values)
        return dict(zip(per_class.names, averages.tolist(), strict=True))

    def _index_recall(self, scores: Sequence[Scores]) -> dict[str, float]:
        measured = [each.index_recall for each in scores if each.index_recall is not None]
        if self.index is None:
            return {}
        return {"index_recall": math.fsum(measured) / len(measured) if measured else math.nan}

    def _intervals(self, per_class: PerClass | None) -> dict[str, float]:
        if self.confidence is None or per_class is None:
            return {}
        ends = bootstrap_interval(per_class, self.average, self.confidence, self.bootstrap_draws, self.seed)
        columns = zip(per_class.names, *(end.tolist() for end in ends), strict=True)
        return {key: end for name, low, high in columns for key, end in ((f"{name}/low", low), (f"{name}/high", high))}

    def _clustering(self, embeddings: Tensor, classes: Tensor) -> dict[str, float]:
        """NMI and AMI where they are asked for; distractors are left out."""
        wanted = {name: function for name, function in _CLUSTERING.items() if name in self.include}
        labelled = classes >= 0
        if not wanted or not labelled.any():
            return dict.fromkeys(wanted, math.nan)
        classes, clusters = classes[labelled], int(classes.max()) + 1
        rows = embeddings if len(classes) == len(embeddings) else embeddings[labelled]
        # One rank's answer for all: k-means on several machines need not agree to the last bit.
        found = on_first_rank(lambda beat: kmeans_labels(rows.float(), clusters, self.seed, after_iteration=beat))
        return {name: function(classes, found) for name, function in wanted.items()}

    def _local_rows(self) -> Rows:
        labels = torch.cat(self.labels) if self.labels else torch.empty(0, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.bool)
        return Rows(
            self._joined_embeddings(),
            labels,
            torch.cat(self.indices) if self.indices else torch.full_like(labels, -1),
            torch.cat(self.is_query) if self.is_query else none,
            torch.cat(self.is_gallery) if self.is_gallery else none,
            torch.cat(self.groups) if self.groups else torch.full_like(labels, -1),
        )

    def _joined_embeddings(self) -> Tensor:
        """This rank's embeddings in one piece, which takes the place of the batches: they are not kept twice."""
        if not self.embeddings:
            return torch.empty(0, 0, dtype=getattr(torch, self.dtype_name))
        if len(self.embeddings) > 1:
            whole = self.embeddings[0].new_empty((sum(map(len, self.embeddings)), self.embeddings[0].shape[1]))
            end = len(whole)
            while self.embeddings:
                batch = self.embeddings.pop()
                whole[end - len(batch) : end] = batch
                end -= len(batch)
            self.embeddings.append(whole)
        return self.embeddings[0]

    def _kept_rows(self, embeddings: Tensor) -> Tensor:
        """A copy on the CPU as it is stored, of unit length for "cosine"."""
        rows = embeddings.detach().float()
        check_finite("embeddings", rows)
        rows = unit_rows(rows) if self.metric == "cosine" else rows
        kept = rows.to("cpu", getattr(torch, self.dtype_name), copy=self.metric != "cosine")
        if self.dtype_name == "float16" and self.metric != "cosine":
            check_finite("embeddings in float16", kept)
        return kept

    def _warn(self, queries: int, answered: int, candidates: int) -> None:
        if rank() != 0:
            return
        if answered < queries or queries == 0:
            outcome = "they are left out of the means" if answered else "so every value is NaN"
            warnings.warn(
                f"{queries - answered} of {queries} queries have no match in the gallery; {outcome}", stacklevel=5
            )
        beyond = [k for k in self.ks if k > candidates]
        if beyond and answered and {"recall", "precision", "ndcg"} & set(self.include):
            warnings.warn(
                f"ks: {beyond} are more than the {candidates} gallery items of a query; Recall@K counts all of those",
                stacklevel=5,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # .to(), .cuda() or .half() on a LightningModule come here too: rows stay on the CPU as they are stored.
        return super()._apply(fn, exclude_state=[*self._defaults, *exclude_state])


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU, so that a caller's buffer may be used again."""
    return tensor.detach().to("cpu", dtype, copy=True)


def _search_device(wanted: torch.device) -> torch.device:
    """Where all ranks search: on their GPUs if any rank's rows came from one, else on the CPU.

    A rank without rows does not know where they come from, and a metric that was filled on a GPU may have been
    unpickled where there is none. Other accelerators lack float64.
    """
    flags = gather_numbers([wanted.type == "cuda", torch.cuda.is_available()], collective_device())
    if any(was for was, _ in flags) and all(has for _, has in flags):
        return wanted if wanted.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
