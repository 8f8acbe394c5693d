"""What `RetrievalMetrics` can be asked for, and which of it does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning_dml.checks import is_integer
from lightning_dml.errors import InputError
from lightning_dml.retrieval.averaging import check_average, check_bootstrap
from lightning_dml.retrieval.index.factory import EXAMPLES, set_parameters, untrained_index
from lightning_dml.retrieval.reranking.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.reranking.k_reciprocal import KReciprocal
from lightning_dml.retrieval.search import SimilarityName
from lightning_dml.retrieval.tasks import IgnoreName

MetricName = Literal["recall", "precision", "precision@1", "map@r", "r_precision", "ndcg", "map", "mrr", "nmi", "ami"]
StoredName = Literal["float32", "float16"]

_AT_K = ("recall", "precision", "ndcg")
_WHOLE_RANKING = ("map", "mrr")
_CLUSTERING = ("nmi", "ami")
# A dimension that most product quantisers divide; indexes that do not fit it are looked at when rows are there.
_TRIAL_DIM = 10080


def metric_names(ks: Sequence[int], include: Sequence[str]) -> list[str]:
    """The keys of the metrics that each query has, in the order of `include`; clustering metrics have none."""
    per_query = [name for name in include if name not in _CLUSTERING]
    names = [each for name in per_query for each in ([f"{name}@{k}" for k in ks] if name in _AT_K else [name])]
    return list(dict.fromkeys(names))  # "precision" at a K of 1 and "precision@1" are the same


def check_options(
    ks: Sequence[int],
    metric: str,
    include: Sequence[str],
    average: str,
    confidence: float | None,
    bootstrap_draws: int,
    ignore: str,
    gallery_draws: int,
    seed: int,
    dtype: str,
) -> None:
    """Raises InputError for an option of `RetrievalMetrics` that is out of range or unknown."""
    if not isinstance(ks, Sequence) or not ks or not all(is_integer(k, 1) for k in ks):
        raise InputError(f"ks must be one or more integers of at least 1, got {ks!r}")
    for name, value, known in (
        ("metric", metric, SimilarityName),
        ("ignore", ignore, IgnoreName),
        ("dtype", dtype, StoredName),
    ):
        if value not in get_args(known):
            raise InputError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    listed = isinstance(include, Sequence) and not isinstance(include, str)
    if not listed or not include or any(name not in get_args(MetricName) for name in include):
        raise InputError(
            f"include must be a list of some of {', '.join(get_args(MetricName))}, got {include!r}; the K of recall, "
            "precision and ndcg are ks"
        )
    check_average(average)
    if not is_integer(seed, 0):
        raise InputError(f"seed must be an integer of at least 0, got {seed!r}")
    if not is_integer(bootstrap_draws, 1):
        raise InputError(f"bootstrap_draws must be an integer of at least 1, got {bootstrap_draws!r}")
    if confidence is not None:
        check_bootstrap(confidence, bootstrap_draws, seed)
        if set(include) <= set(_CLUSTERING):
            raise InputError(f"confidence={confidence} is for metrics of queries, and include={include!r} has none")
    if not is_integer(gallery_draws, 0):
        raise InputError(f"gallery_draws must be an integer of at least 0, got {gallery_draws!r}; 0 takes the roles")


def check_search(
    metric: str, include: Sequence[str], reranking: Sequence[object], index: str | None, index_parameters: str
) -> None:
    """Raises InputError for re-ranking steps and indexes that do not fit the other options or each other."""
    steps = reranking if isinstance(reranking, Sequence) else [None]
    if not all(isinstance(step, QueryExpansion | DatabaseAugmentation | KReciprocal) for step in steps):
        raise InputError(
            f"reranking must be a list of QueryExpansion, DatabaseAugmentation or KReciprocal objects, got {reranking}"
        )
    if (reranking or index is not None) and set(include) <= set(_CLUSTERING):
        raise InputError(
            f"include={include!r} has no metric of a search, which reranking and index are of; leave these out"
        )
    if reranking and metric != "cosine":
        raise InputError(f"reranking works on cosine similarities, got metric={metric!r}; leave one of them out")
    if len({type(step) for step in reranking}) < len(reranking):
        raise InputError("reranking names one kind of step twice; give each at most once")
    k_reciprocal = any(isinstance(step, KReciprocal) for step in reranking)
    if k_reciprocal and len(reranking) > 1:
        raise InputError("reranking: KReciprocal orders by distances of its own and stands alone; leave the others out")
    if index_parameters and index is None:
        raise InputError(f"index_parameters={index_parameters!r} are those of an index, but index is None; name one")
    if reranking and index is not None:
        raise InputError(
            f"reranking searches exactly in steps of its own, got index={index!r} too; leave one of them out"
        )
    if index is not None:
        _check_index(index, index_parameters)
    whole = [name for name in include if name in _WHOLE_RANKING]
    if whole and (k_reciprocal or index is not None):
        other = "KReciprocal" if k_reciprocal else f"index={index!r}"
        raise InputError(
            f"include: {' and '.join(whole)} look at the whole ranking, of which {other} gives the first places only; "
            "take map@r, or search exactly"
        )


def _check_index(index: str, parameters: str) -> None:
    """Raises InputError for what faiss does not know in any dimension; the rest shows when the dimension is known."""
    try:
        trial = untrained_index(index, _TRIAL_DIM, "inner_product")
    except InputError as error:
        if "no faiss factory string" in str(error) or not isinstance(index, str) or not index:
            raise InputError(f"index must be a faiss factory string {EXAMPLES}, got {index!r}") from error
        return
    if parameters:
        set_parameters(trial, index, parameters)
