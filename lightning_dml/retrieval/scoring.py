"""The metrics of each query of a task, computed by all ranks together, each for its share of the queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_dml.distributed import collective_device, gather_rows, map_rows, together
from lightning_dml.retrieval.evaluation import (
    RANK_METRICS,
    Items,
    Search,
    count_relevant,
    list_metrics,
    list_values,
    positive_ranks,
    rank_block,
)
from lightning_dml.retrieval.exclusion import Exclusions, match_counts
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from lightning_dml.retrieval.options import Options
from lightning_dml.retrieval.reranking.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.reranking.k_reciprocal import KReciprocal
from lightning_dml.retrieval.search import BLOCK_ENTRIES, nearest, search_metric
from lightning_dml.retrieval.tasks import Task

# Neighbours in memory at a time (a few hundred MiB with all that is derived from them), however large R is.
_BLOCK_NEIGHBOURS = 2**22
# Multiplications after which the ranks meet: seconds on a GPU, half a minute on two cores.
_BLOCK_PRODUCTS = 2**41
# Queries of a block at most; faiss works on 4,096 at a time, and more would only be copied for nothing.
_BLOCK_QUERIES = 2**14
# Queries on which the recall of an approximate index is measured.
_INDEX_SAMPLE = 1000


@dataclass(frozen=True)
class Scores:
    """The values of a task.

    Attributes:
        answered: (n,) int64 rows of the items, the queries that have a match in the gallery.
        values: (n, metrics) float64 in the order of `Options.names`.
        queries: how many queries there were.
        candidates: the most gallery items that any of them may find.
        index_recall: measured share of the exact neighbours that an approximate index finds, or None.
    """

    answered: Tensor
    values: Tensor
    queries: int
    candidates: int
    index_recall: float | None


def score(items: Items, blind_keys: Tensor, task: Task, options: Options, device: torch.device) -> Scores:
    """Scores a task; every rank must call it, and gets the same.

    Args:
        items: all of them, on the CPU.
        blind_keys: (N,) int64, keys as those of the items for steps that must not know of labels, such as expansion.
        task: which are searched by which.
        options: which metrics, and how they are computed.
        device: where to search.
    """
    names = options.names
    relevant = count_relevant(items, task.queries, task.gallery)
    answered, relevant = task.queries[relevant > 0], relevant[relevant > 0]
    if not len(answered):
        return Scores(answered, torch.empty(0, len(names), dtype=torch.float64), len(task.queries), 0, None)
    unseen = int(match_counts(items.keys[answered], items.keys[task.gallery]).min())
    job = _Job(items, blind_keys, answered, task, relevant, options, device)
    columns = dict(zip(job.names, job.values().unbind(dim=1), strict=True))
    values = torch.stack([columns[name] for name in names], dim=1)
    return Scores(answered, values, len(task.queries), len(task.gallery) - unseen, job.index_recall)


class _Job:
    """The queries of a task that have an answer, their gallery, and the search that finds their neighbours."""

    def __init__(
        self,
        items: Items,
        blind_keys: Tensor,
        queries: Tensor,
        task: Task,
        relevant: Tensor,
        options: Options,
        device: torch.device,
    ) -> None:
        self.items, self.blind_keys, self.queries, self.relevant = items, blind_keys, queries, relevant
        self.task, self.options, self.metric = task, options, search_metric(options.metric)
        self.expansions = [step for step in options.reranking if isinstance(step, QueryExpansion)]
        self.gallery = self._gallery(device)
        # Precision and recall at K ask for K places, MAP@R and R-precision for R of them.
        by_r = {"map@r", "r_precision"} & set(options.include)
        by_k = {"recall", "precision", "ndcg"} & set(options.include)
        places = max(max(options.ks) if by_k else 1, int(relevant.max()) if by_r else 1)
        self.k = min(places, len(task.gallery))
        self.lists = list_metrics(options.ks, options.include)
        self.ranks = {name: RANK_METRICS[name] for name in options.include if name in RANK_METRICS}
        self.names = [*self.lists, *self.ranks]
        self.index_recall: float | None = None
        self.exhaustive = options.index is None and not any(isinstance(step, KReciprocal) for step in options.reranking)
        self.search = self._search()
        # The distances of k-reciprocal re-ranking are around 1 whatever the rows are.
        self.lengths = self.gallery.lengths() if self.exhaustive or options.index is not None else None

    def values(self) -> Tensor:
        """The metrics of each query, (n, names) float64, the same on every rank."""
        parts: list[Tensor] = []
        if self.lists:
            products = len(self.gallery) * self.items.embeddings.shape[1]
            block = min(_BLOCK_NEIGHBOURS // (self.k + 1), _BLOCK_PRODUCTS // products, _BLOCK_QUERIES)
            parts += map_rows(len(self.queries), self._list_block, max(1, block))
        if self.ranks:
            # Beside its similarities, a query has half a dozen numbers for each of its positives.
            entries = len(self.gallery) + 8 * int(self.relevant.max())
            parts += map_rows(len(self.queries), self._rank_block, max(1, BLOCK_ENTRIES // entries))
        return torch.cat(parts, dim=1)

    def _list_block(self, rows: Tensor) -> tuple[Tensor]:
        queries = self._block(rows)
        ranking = rank_block(
            rows, queries, self.gallery, self.k, self.metric, self.search, self.lengths, self.exhaustive
        )
        relevant = self.relevant[rows].to(ranking.hits.device)
        return (list_values(ranking, relevant, list(self.lists.values())),)

    def _rank_block(self, rows: Tensor) -> tuple[Tensor]:
        assert self.lengths is not None  # RetrievalMetrics refuses rank metrics of any other search
        ranks, tied = positive_ranks(self._block(rows), self.gallery, self.metric, self.lengths)
        return (torch.stack([function(ranks, tied) for function in self.ranks.values()], dim=1).cpu(),)

    def _gallery(self, device: torch.device) -> Items:
        """The gallery where it is searched: indexes and re-ranking work on the CPU."""
        options = self.options
        if options.reranking or options.index is not None:
            device = torch.device("cpu")
        gallery = self.items.part(self.task.gallery)
        for step in options.reranking:
            if isinstance(step, DatabaseAugmentation):
                keys = self.blind_keys[self.task.gallery]
                gallery = replace(gallery, embeddings=step.apply(gallery.embeddings, keys))
        return together(lambda: gallery.to(device))

    def _block(self, rows: Tensor) -> Items:
        """Some of the queries on the device of the gallery, expanded where that is asked for."""
        part = self.items.take(self.queries[rows]).to(self.gallery.classes.device)
        for step in self.expansions:
            exclude = [(self.blind_keys[self.queries[rows]], self.blind_keys[self.task.gallery])]
            part = replace(part, embeddings=step.apply(part.embeddings, self.gallery.embeddings, exclude))
        return part

    def _exclude(self, queries: Items) -> Exclusions:
        return [(queries.keys, self.gallery.keys)]

    def _search(self) -> Search:
        options, metric, gallery = self.options, self.metric, self.gallery
        for step in options.reranking:
            if isinstance(step, KReciprocal):
                return self._k_reciprocal_search(step)
        if options.index is not None:
            factory, parameters = options.index, options.index_parameters
            index = together(lambda: ApproximateIndex(gallery.embeddings, factory, metric, parameters, options.seed))
            self.index_recall = self._measure(index)
            return lambda rows, queries, k: index.search(queries.embeddings, k, self._exclude(queries))
        return lambda rows, queries, k: nearest(
            queries.embeddings, gallery.embeddings, k, metric, self._exclude(queries)
        )

    def _k_reciprocal_search(self, step: KReciprocal) -> Search:
        """The search among the items that have a role; the others do not take part in the encoding."""
        items = torch.unique(torch.cat([self.task.queries, self.task.gallery]))
        encoded = step.encode(self.items.part(items).embeddings)
        queries = torch.searchsorted(items, self.queries)
        gallery = torch.searchsorted(items, self.task.gallery)
        return lambda rows, block, k: encoded.nearest(queries[rows], gallery, k, self._exclude(block))

    def _measure(self, index: ApproximateIndex) -> float:
        """The recall of `index` on a random sample of the queries."""
        chosen = np.random.default_rng(self.options.seed).permutation(len(self.queries))[:_INDEX_SAMPLE]
        sample = self._block(torch.from_numpy(np.sort(chosen)))
        recall = together(
            lambda: index.recall(sample.embeddings, self.k, self.gallery.embeddings, self._exclude(sample))
        )
        # Ranks with other numbers of threads may have built slightly different indexes: the first one's counts.
        return float(gather_rows(torch.tensor([recall], dtype=torch.float64, device=collective_device()))[0])
