"""The options of `RetrievalMetrics`, checked one by one and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_dml.checks import check_choice, check_count, check_counts
from lightning_dml.errors import InputError
from lightning_dml.retrieval.averaging import AverageName, check_average, check_bootstrap
from lightning_dml.retrieval.index.factory import EXAMPLES, UnknownFactory, set_parameters, untrained_index
from lightning_dml.retrieval.reranking.expansion import DatabaseAugmentation, QueryExpansion
from lightning_dml.retrieval.reranking.k_reciprocal import KReciprocal
from lightning_dml.retrieval.reranking.step import RerankingStep
from lightning_dml.retrieval.search import SimilarityName
from lightning_dml.retrieval.tasks import IgnoreName

MetricName = Literal["recall", "precision", "precision@1", "map@r", "r_precision", "ndcg", "map", "mrr", "nmi", "ami"]
StoredName = Literal["float32", "float16"]

_AT_K = ("recall", "precision", "ndcg")
_WHOLE_RANKING = ("map", "mrr")
_CLUSTERING = ("nmi", "ami")
# A dimension that most product quantisers divide; indexes that do not fit it are looked at when rows are there.
_TRIAL_DIM = 10080


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation that fit each other; `RetrievalMetrics` describes them.

    Raises:
        InputError: for an option out of range, unknown, or at odds with another.
    """

    ks: Sequence[int]
    metric: SimilarityName
    include: Sequence[str]
    average: AverageName
    confidence: float | None
    bootstrap_draws: int
    ignore: IgnoreName
    gallery_draws: int
    seed: int
    dtype: StoredName
    reranking: Sequence[RerankingStep]
    index: str | None
    index_parameters: str

    def __post_init__(self) -> None:
        _check_each(self)
        _check_search(self)
        for name in ("ks", "include", "reranking"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a caller's list may change

    @property
    def names(self) -> list[str]:
        """Keys of the metrics that each query has, in the order of `include`; clustering metrics have none."""
        return list(dict.fromkeys(name for key in self.include for name in self.names_of(key)))

    def names_of(self, metric: str) -> list[str]:
        """Keys of one of the metrics in `include` for a query: one for each K, one, or none for clustering metrics."""
        if metric in _CLUSTERING:
            return []
        return [f"{metric}@{k}" for k in self.ks] if metric in _AT_K else [metric]


def _check_each(options: Options) -> None:
    check_counts("ks", options.ks)
    check_choice("metric", options.metric, get_args(SimilarityName))
    check_choice("ignore", options.ignore, get_args(IgnoreName))
    check_choice("dtype", options.dtype, get_args(StoredName))
    include, known = options.include, get_args(MetricName)
    listed = isinstance(include, Sequence) and not isinstance(include, str)
    if not listed or not include or any(name not in known for name in include):
        raise InputError(
            f"include must be a list of some of {', '.join(known)}, got {include!r}; the K of recall, precision and "
            "ndcg are ks"
        )
    check_average(options.average)
    check_count("seed", options.seed, 0)
    check_count("bootstrap_draws", options.bootstrap_draws)
    if options.confidence is not None:
        check_bootstrap(options.confidence, options.bootstrap_draws, options.seed)
        if set(include) <= set(_CLUSTERING):
            raise InputError(
                f"confidence={options.confidence} is for metrics of queries, and include={include!r} has none"
            )
    check_count("gallery_draws", options.gallery_draws, 0, hint="0 takes the roles")


def _check_search(options: Options) -> None:
    """Raises InputError for re-ranking steps and indexes that do not fit the other options or each other."""
    reranking, index = options.reranking, options.index
    steps = reranking if isinstance(reranking, Sequence) else [None]
    if not all(isinstance(step, QueryExpansion | DatabaseAugmentation | KReciprocal) for step in steps):
        raise InputError(
            f"reranking must be a list of QueryExpansion, DatabaseAugmentation or KReciprocal objects, got {reranking}"
        )
    if (reranking or index is not None) and set(options.include) <= set(_CLUSTERING):
        raise InputError(
            f"include={options.include!r} has no metric of a search, which reranking and index are of; leave these out"
        )
    if reranking and options.metric != "cosine":
        raise InputError(
            f"reranking works on cosine similarities, got metric={options.metric!r}; leave one of them out"
        )
    if len({type(step) for step in reranking}) < len(reranking):
        raise InputError("reranking names one kind of step twice; give each at most once")
    k_reciprocal = any(isinstance(step, KReciprocal) for step in reranking)
    if k_reciprocal and len(reranking) > 1:
        raise InputError("reranking: KReciprocal orders by distances of its own and stands alone; leave the others out")
    if options.index_parameters and index is None:
        raise InputError(
            f"index_parameters={options.index_parameters!r} are those of an index, but index is None; name one"
        )
    if reranking and index is not None:
        raise InputError(
            f"reranking searches exactly in steps of its own, got index={index!r} too; leave one of them out"
        )
    if index is not None:
        _check_index(index, options.index_parameters)
    whole = [name for name in options.include if name in _WHOLE_RANKING]
    if whole and (k_reciprocal or index is not None):
        other = "KReciprocal" if k_reciprocal else f"index={index!r}"
        raise InputError(
            f"include: {' and '.join(whole)} look at the whole ranking, of which {other} gives the first places only; "
            "take map@r, or search exactly"
        )


def _check_index(index: str, parameters: str) -> None:
    """Raises InputError for a string that faiss knows in no dimension; the rest shows when the dimension is known."""
    try:
        trial = untrained_index(index, _TRIAL_DIM, "inner_product")
    except UnknownFactory as error:
        raise InputError(f"index must be a faiss factory string {EXAMPLES}, got {index!r}") from error
    except InputError:
        return
    if parameters:
        set_parameters(trial, index, parameters)
