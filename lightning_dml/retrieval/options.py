"""What `RetrievalMetrics` can be asked for, and which of it does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning_dml.errors import InputError
from lightning_dml.retrieval.averaging import check_average, check_bootstrap
from lightning_dml.retrieval.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.k_reciprocal import KReciprocal
from lightning_dml.retrieval.search import SimilarityName
from lightning_dml.retrieval.tasks import IgnoreName

MetricName = Literal["recall", "precision", "precision@1", "map@r", "r_precision", "ndcg", "map", "mrr", "nmi", "ami"]
StoredName = Literal["float32", "float16"]

_AT_K = ("recall", "precision", "ndcg")
_WHOLE_RANKING = ("map", "mrr")
_CLUSTERING = ("nmi", "ami")


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
    if not ks or not all(_is_integer(k, 1) for k in ks):
        raise InputError(f"ks must be one or more integers of at least 1, got {ks!r}")
    for name, value, known in (
        ("metric", metric, SimilarityName),
        ("ignore", ignore, IgnoreName),
        ("dtype", dtype, StoredName),
    ):
        if value not in get_args(known):
            raise InputError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    unknown = [include] if isinstance(include, str) else [each for each in include if each not in get_args(MetricName)]
    if unknown or not include:
        raise InputError(
            f"include must be a list of some of {', '.join(get_args(MetricName))}, got {include!r}; the K of recall, "
            "precision and ndcg are ks"
        )
    check_average(average)
    if not _is_integer(seed, 0):
        raise InputError(f"seed must be an integer of at least 0, got {seed!r}")
    check_bootstrap(0.5 if confidence is None else confidence, bootstrap_draws, seed)
    if not _is_integer(gallery_draws, 0):
        raise InputError(f"gallery_draws must be an integer of at least 0, got {gallery_draws!r}; 0 takes the roles")


def check_search(
    metric: str, include: Sequence[str], reranking: Sequence[object], index: str | None, index_parameters: str
) -> None:
    """Raises InputError for re-ranking steps and indexes that do not fit the other options or each other."""
    for step in reranking:
        if not isinstance(step, QueryExpansion | DatabaseAugmentation | KReciprocal):
            raise InputError(
                "reranking must be a list of QueryExpansion, DatabaseAugmentation or KReciprocal objects, got "
                f"{type(step).__name__}"
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
    if k_reciprocal and index is not None:
        raise InputError(f"reranking: KReciprocal searches by itself, got index={index!r}; leave one of them out")
    whole = [name for name in include if name in _WHOLE_RANKING]
    if whole and (k_reciprocal or index is not None):
        other = "KReciprocal" if k_reciprocal else f"index={index!r}"
        raise InputError(
            f"include: {' and '.join(whole)} look at the whole ranking, of which {other} gives the first places only; "
            "take map@r, or search exactly"
        )


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
