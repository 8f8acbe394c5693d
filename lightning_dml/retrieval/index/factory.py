"""Factory strings of faiss: the indexes that they make, and their demands on metric, dimensions and rows."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import faiss

from lightning_dml.errors import InputError
from lightning_dml.retrieval.search import SearchName


class UnknownFactory(InputError):
    """A factory that faiss does not know, whatever the dimensions."""


EXAMPLES = "such as 'IVF1024,Flat', 'HNSW32', 'SQ8' or 'OPQ16,IVF1024,PQ16'"
# Rows for each centroid of a k-means: faiss warns below the first and uses no more than the second.
FEWEST_PER_CENTROID, MOST_PER_CENTROID = 39, 256


class Clustering(NamedTuple):
    """A k-means that training runs.

    Attributes:
        makes: its outcome in words, for messages.
        centroids: how many.
        settings: its faiss.ClusteringParameters, inside the index.
    """

    makes: str
    centroids: int
    settings: Any


def untrained_index(factory: str, dim: int, metric: SearchName) -> Any:
    """The faiss index of a factory string, empty.

    Raises:
        UnknownFactory: an InputError; if faiss does not know the string.
        InputError: if it does not fit the dimensions or the metric.
    """
    if not isinstance(factory, str) or not factory:
        raise UnknownFactory(f"factory must be a faiss factory string {EXAMPLES}, got {factory!r}")
    try:
        index = faiss.index_factory(dim, factory, faiss_metric(metric))
    except Exception as error:  # faiss raises RuntimeError, its parser of numbers others
        if _is_about_pieces(error):
            raise _uneven(factory, dim) from error
        if metric == "inner_product" and _searches_by_l2(factory, dim):
            raise _only_l2(factory) from error
        raise UnknownFactory(
            f"factory {factory!r} is no faiss factory string for {dim} dimensions ({reason(error)}); write one "
            f"{EXAMPLES}"
        ) from error
    if index.metric_type != faiss_metric(metric):  # some are made for inner products and search by l2
        raise _only_l2(factory)
    for part in index_parts(index):
        if isinstance(part, (faiss.IndexIDMap, faiss.IndexIDMap2, faiss.Index2Layer)):
            raise InputError(f"factory {factory!r} has no search by row; write one {EXAMPLES}")
        if isinstance(part, faiss.IndexIVF) and part.nlist < 1:
            raise InputError(f"factory {factory!r} has {part.nlist} lists; write one {EXAMPLES}")
        if isinstance(part, faiss.OPQMatrix) and part.d_out % part.M:
            raise _uneven(factory, dim)
    return index


def faiss_metric(metric: SearchName) -> int:
    """The number that faiss gives a metric."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def reason(error: Exception) -> str:
    """The message of faiss without the place in its source code; see `_is_about_pieces`."""
    text = re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", str(error), flags=re.DOTALL)
    return re.sub(r"^Error: '.*?' failed: ?(?=\S)", "", text).strip()


def _is_about_pieces(error: Exception) -> bool:
    """True for a product quantiser whose number of pieces does not divide the dimensions.

    Here and in `reason` alone the text of faiss's errors is read: it has one class for all of them. This is the text
    of 1.15.1: "Error in void faiss::ProductQuantizer::set_derived_values() at .../ProductQuantizer.cpp:64: Error:
    '!(d % M == 0)' failed: The dimension of the vector (d) should be a multiple of the number of subquantizers (M)".
    """
    return "number of subquantizers" in str(error)


def index_parts(index: Any) -> Iterator[Any]:
    """The index and all that it is made of: transforms, coarse quantiser, codes, refinement."""
    yield index
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        if isinstance(part := getattr(index, name, None), faiss.Index):
            yield from index_parts(faiss.downcast_index(part))
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # not the list that faiss's stubs say
        yield from (faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size()))


def clusterings(index: Any) -> list[Clustering]:
    """All k-means that the training of an index runs, that of an OPQ rotation only if it is lent a quantiser."""
    kmeans = []
    for part in index_parts(index):
        # The lists of a multi-index have no centroids: they are the combinations of those of a product quantiser.
        if isinstance(part, faiss.IndexIVF) and not isinstance(
            faiss.downcast_index(part.quantizer), faiss.MultiIndexQuantizer
        ):
            kmeans.append(Clustering(f"{part.nlist} lists", int(part.nlist), part.cp))
        if (product := getattr(part, "pq", None)) is not None:
            kmeans.append(Clustering(f"2**{product.nbits} codes", int(product.ksub), product.cp))
        if (residual := getattr(part, "rq", None)) is not None:
            bits = int(faiss.vector_to_array(residual.nbits).max())
            kmeans.append(Clustering(f"2**{bits} codes", 2**bits, residual.cp))
    return kmeans


def check_training_rows(factory: str, kmeans: Sequence[Clustering], rows: int, available: int) -> None:
    """Raises InputError where a k-means has more centroids than rows; warns where it has few rows for each.

    Args:
        factory: for the messages.
        kmeans: those of the index, as `clusterings` lists them.
        rows: to train on.
        available: rows of the gallery.
    """
    for makes, centroids, _ in kmeans:
        if rows < centroids:
            more = "raise train_rows" if available >= centroids else "give more rows"
            simpler = (
                f"take fewer lists, such as IVF{max(1, rows // FEWEST_PER_CENTROID)}"
                if makes.endswith("lists")
                else "take fewer bits for each code, such as 4 in PQ8x4, or SQ8, which has no codes to train"
            )
            raise InputError(
                f"factory {factory!r} learns {makes} and needs at least {centroids} training rows, got {rows}: "
                f"{more}, or {simpler}"
            )
    nothing = Clustering("nothing", 0, None)
    makes, centroids, _ = max(kmeans, key=lambda clustering: clustering.centroids, default=nothing)
    if rows < FEWEST_PER_CENTROID * centroids:
        warnings.warn(
            f"factory {factory!r} learns {makes} from {rows} training rows; below {FEWEST_PER_CENTROID} for each, "
            f"{FEWEST_PER_CENTROID * centroids} in all, they fit the sample rather than the gallery",
            stacklevel=4,  # the caller of ApproximateIndex
        )


def set_parameters(index: Any, factory: str, parameters: str) -> dict[str, str]:
    """Sets search parameters from a string that faiss.ParameterSpace reads, such as "nprobe=16,k_factor_rf=4".

    Returns:
        Names and values, as they were written.

    Raises:
        InputError: if the index has no such parameter, or a value is no number of at least 1.
    """
    pairs = _parsed(parameters)
    space = faiss.ParameterSpace()
    try:
        for name, value in pairs.items():
            space.set_index_parameter(index, name, float(value))
    except RuntimeError as error:
        space.initialize(index)
        names = [space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())]
        raise InputError(
            f"parameters: index {factory!r} has no parameter {name!r}, got {parameters!r}; it has "
            f"{', '.join(names) or 'none'}"
        ) from error
    return pairs


def _parsed(parameters: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in parameters.split(","))):
        name, _, value = (text.strip() for text in pair.partition("="))
        try:
            valid = bool(name) and 1 <= float(value) < math.inf
        except ValueError:
            valid = False
        # faiss itself takes nprobe=0, and reads nprobe=-1 as the largest number there is.
        if not valid:
            raise InputError(
                "parameters must be names with numbers of at least 1, such as 'nprobe=16' or "
                f"'efSearch=64,k_factor_rf=4', got {parameters!r}"
            )
        pairs[name] = value
    return pairs


def _searches_by_l2(factory: str, dim: int) -> bool:
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_L2) is not None
    except Exception:  # as in untrained_index
        return False


def _only_l2(factory: str) -> InputError:
    return InputError(
        f"factory {factory!r} cannot search by inner product or cosine; take metric='l2', which ranks unit rows as "
        f"cosine does, or another factory {EXAMPLES}"
    )


def _uneven(factory: str, dim: int) -> InputError:
    divisors = [str(pieces) for pieces in range(1, dim + 1) if dim % pieces == 0]
    return InputError(
        f"factory {factory!r} cuts rows into a number of pieces that does not divide their dimensions, which are {dim} "
        f"before any transform; the number after PQ or OPQ must be one of {', '.join(divisors)} (or divide what a "
        "transform makes of them)"
    )
