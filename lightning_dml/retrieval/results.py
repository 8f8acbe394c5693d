"""The evaluation of gathered rows: scores of all tasks, their averages and intervals, and clustering metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dml.distributed import collective_device, gather_numbers, on_first_rank, rank
from lightning_dml.errors import NothingToEvaluate
from lightning_dml.retrieval.averaging import (
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
from lightning_dml.retrieval.options import Options
from lightning_dml.retrieval.rows import Rows
from lightning_dml.retrieval.scoring import Scores, score
from lightning_dml.retrieval.tasks import Task, by_draws, by_roles, dense_classes, exclusion_keys

_CLUSTERING = {"nmi": normalized_mutual_information, "ami": adjusted_mutual_information}


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """The values of an evaluation, with what they were computed from.

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


def evaluate(rows: Rows, options: Options, rows_device: torch.device) -> RetrievalResult:
    """Evaluates the items of all ranks; every rank must call it, and gets the same.

    Args:
        rows: all items, the same on every rank.
        options: what to compute, and how.
        rows_device: where the embeddings of this rank came from.

    Raises:
        NothingToEvaluate: an InputError, when no item is a query, or none is in the gallery.
        RuntimeError: where another rank failed.
    """
    classes = dense_classes(rows.labels)
    keys = exclusion_keys(rows.labels, rows.groups, options.ignore)
    blind = exclusion_keys(rows.labels, rows.groups if options.ignore == "group" else None, "group")
    items = Items(rows.embeddings, classes, keys)
    tasks = _tasks(rows, classes, options)
    means: dict[str, float] = {}
    queries = answered = 0
    per_class = None
    if options.names:
        device = _search_device(rows_device)
        scores = [score(items, blind, task, options, device) for task in tasks]
        answered_rows = torch.cat([its_scores.answered for its_scores in scores])
        queries, answered = sum(its_scores.queries for its_scores in scores), len(answered_rows)
        _warn(queries, answered, max(its_scores.candidates for its_scores in scores), options)
        values = torch.cat([its_scores.values for its_scores in scores])
        per_class = class_means(values, rows.labels[answered_rows], options.names)
        averages = macro_average(per_class) if options.average == "macro" else micro_average(values)
        means = dict(zip(per_class.names, averages.tolist(), strict=True)) | _index_recall(scores, options)
    means |= _clustering(rows.embeddings, classes, options)
    order = [name for metric in options.include for name in (options.names_of(metric) or [metric])]
    values_by_name = {name: means[name] for name in order} | _intervals(per_class, options) | means
    return RetrievalResult(values_by_name, per_class, queries, queries - answered, len(rows))


def _tasks(rows: Rows, classes: Tensor, options: Options) -> Iterable[Task]:
    if options.gallery_draws:
        return by_draws(classes, options.gallery_draws, options.seed)
    for name, flags in (("is_query", rows.is_query), ("is_gallery", rows.is_gallery)):
        if not flags.any():
            raise NothingToEvaluate(
                f"{name} is False for all {len(rows)} items, so there is "
                f"{'nothing to search for' if name == 'is_query' else 'no gallery'}; evaluate queries and gallery "
                "together, or leave the roles out for self-retrieval"
            )
    return [by_roles(rows.is_query, rows.is_gallery)]


def _search_device(wanted: torch.device) -> torch.device:
    """The device of the search of all ranks: their GPUs if any rank's rows came from one, else the CPU.

    A rank without rows does not know where they come from, and a metric that was filled on a GPU may have been
    unpickled where there is none. Other accelerators lack float64.
    """
    flags = gather_numbers([wanted.type == "cuda", torch.cuda.is_available()], collective_device())
    if any(from_gpu for from_gpu, _ in flags) and all(has_gpu for _, has_gpu in flags):
        return wanted if wanted.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _warn(queries: int, answered: int, candidates: int, options: Options) -> None:
    if rank() != 0:
        return
    caller = 6  # of `RetrievalMetrics.compute`, which torch and torchmetrics wrap
    if answered < queries or queries == 0:
        outcome = "they are left out of the means" if answered else "so every value is NaN"
        warnings.warn(
            f"{queries - answered} of {queries} queries have no match in the gallery; {outcome}", stacklevel=caller
        )
    beyond = [k for k in options.ks if k > candidates]
    if beyond and answered and {"recall", "precision", "ndcg"} & set(options.include):
        warnings.warn(
            f"ks: {beyond} are more than the {candidates} gallery items of a query; Recall@K counts all of those",
            stacklevel=caller,
        )


def _index_recall(scores: Sequence[Scores], options: Options) -> dict[str, float]:
    if options.index is None:
        return {}
    recalls = [its_scores.index_recall for its_scores in scores if its_scores.index_recall is not None]
    return {"index_recall": math.fsum(recalls) / len(recalls) if recalls else math.nan}


def _clustering(embeddings: Tensor, classes: Tensor, options: Options) -> dict[str, float]:
    """NMI and AMI where they are asked for; distractors are left out."""
    wanted = {name: function for name, function in _CLUSTERING.items() if name in options.include}
    labelled = classes >= 0
    if not wanted or not labelled.any():
        return dict.fromkeys(wanted, math.nan)
    classes, count = classes[labelled], int(classes.max()) + 1
    rows = embeddings if len(classes) == len(embeddings) else embeddings[labelled]
    # One rank's answer for all: k-means on several machines need not agree to the last bit.
    clusters = on_first_rank(lambda beat: kmeans_labels(rows.float(), count, options.seed, after_iteration=beat))
    return {name: function(classes, clusters) for name, function in wanted.items()}


def _intervals(per_class: PerClass | None, options: Options) -> dict[str, float]:
    if options.confidence is None or per_class is None:
        return {}
    ends = bootstrap_interval(per_class, options.average, options.confidence, options.bootstrap_draws, options.seed)
    columns = zip(per_class.names, *(end.tolist() for end in ends), strict=True)
    return {key: end for name, low, high in columns for key, end in ((f"{name}/low", low), (f"{name}/high", high))}
