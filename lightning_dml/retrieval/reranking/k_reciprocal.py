"""Re-ranking by k-reciprocal encoding: items are alike whose mutual nearest neighbours are the same.

Source: Zhong, Zheng, Cao, Li, Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017
(arXiv 1701.08398). Sets of neighbours are kept as sparse rows, so memory grows with items times neighbours, and the
distances of a block of queries are all that is in memory at any time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_dml.checks import check_count, check_embeddings, check_finite, check_not_empty, check_number
from lightning_dml.distributed import map_rows
from lightning_dml.errors import InputError
from lightning_dml.retrieval.exclusion import Exclusions, key_pairs, matching_pairs
from lightning_dml.retrieval.reranking.sparse_rows import BLOCK_PAIRS, SparseRows, parts, repeated
from lightning_dml.retrieval.reranking.step import RerankingStep
from lightning_dml.retrieval.search import nearest, similarities, unit_rows

# Numbers of each array that a block of rows works on: 16 MiB of float32, of which there are about four at a time.
_BLOCK_ENTRIES = 2**22
# Share of all items from which on a neighbour that they have in common is added as a dense row, not pair by pair.
_LONG_COLUMN = 1 / 16
# Largest distances below this are rounding: float32 similarities around 1 are about 1e-7 apart.
_LEAST_SCALE = 1e-6


class KReciprocal(RerankingStep):
    """k-reciprocal encoding of a set of items, after which they can be searched by the re-ranked distance.

    That distance is (1 - weight) * Jaccard distance of the two items' k-reciprocal sets + weight * squared
    Euclidean distance of their unit rows, the latter divided by the query's largest one to any item.

    Args:
        k1: neighbours among which reciprocal ones are sought, at least 1; an item counts as its own on top.
        k2: nearest items, itself included, over which an item's encoding is averaged; 1 leaves it as it is.
        weight: lambda of the paper, the share of the original distance, from 0 to 1.

    Raises:
        InputError: `k1` < 1, `k2` < 1, or `weight` outside of [0, 1].
    """

    def __init__(self, k1: int = 20, k2: int = 6, weight: float = 0.3) -> None:
        check_count("k1", k1)
        check_count("k2", k2)
        check_number("weight", weight, "the share of the original distance", least=0, most=1)
        self.k1 = k1
        self.k2 = k2
        self.weight = weight

    def encode(self, embeddings: Tensor) -> KReciprocalEncoding:
        """Encodes every item; a collective: the ranks share the work and all get the same encoding.

        Every item's neighbours begin with the item itself. The order of others that are equally near is up to the
        search.

        Args:
            embeddings: (M, D) unit rows, float32 or float16, on the CPU, the same on every rank; each item once,
                whether it is a query, in the gallery, or both. A row of zeros has the distance 2 to all others.

        Returns:
            The encoding, whose `nearest` searches.

        Raises:
            InputError: wrong shape or dtype, no items, or rows that hold NaN or infinity.
        """
        check_embeddings("embeddings", embeddings)
        check_not_empty("embeddings", embeddings)
        check_finite("embeddings", embeddings)
        neighbours, largest = _neighbours(embeddings, max(self.k1 + 1, self.k2))
        graph = _ReciprocalGraph.of(neighbours, self.k1)

        def encoded(rows: Tensor) -> tuple[Tensor, ...]:
            counts, members = graph.expanded(rows)
            owners = repeated(torch.arange(len(rows)), counts)
            items = repeated(rows, counts)
            distances = (2 - 2 * _pair_similarities(embeddings, items, members)).clamp_min_(0)
            weights = torch.exp(-distances.masked_fill_(members == items, 0) / largest[items])
            totals = torch.zeros(len(rows)).index_add_(0, owners, weights)
            return counts, members.int(), weights / totals[owners]

        encoding = SparseRows.of(*map_rows(len(embeddings), encoded, graph.block))
        if self.k2 > 1:
            encoding = encoding.averaged(neighbours[:, : self.k2])
        return KReciprocalEncoding(embeddings, largest, self.weight, encoding, encoding.transposed())


@dataclass(frozen=True)
class KReciprocalEncoding:
    """Items with their k-reciprocal encodings, made by `KReciprocal.encode`.

    Attributes:
        embeddings: (M, D) float32 or float16.
        largest: (M,) float32, each item's largest squared distance to any item.
        weight: share of the original distance.
        rows: an item's encoding, weights of its k-reciprocal neighbours that add up to 1.
        columns: the same by neighbour: which items have it in their encoding.
    """

    embeddings: Tensor
    largest: Tensor
    weight: float
    rows: SparseRows
    columns: SparseRows

    def nearest(self, queries: Tensor, gallery: Tensor, k: int, exclude: Exclusions = ()) -> tuple[Tensor, Tensor]:
        """The `k` gallery items of least re-ranked distance for each query, exactly.

        Args:
            queries: (Nq,) int64 positions among the encoded items.
            gallery: (Ng,) int64 positions among the encoded items, none of them twice.
            k: neighbours wanted, at least 1.
            exclude: pairs of query keys (Nq,) and gallery keys (Ng,), int64; an item with the key of the query, if
                that is not negative, is left out.

        Returns:
            values: (Nq, k) float32, minus the distance, best first; -inf in places without a candidate.
            positions: (Nq, k) int64 into `gallery`; -1 in places without a candidate.

        Raises:
            InputError: `k` < 1, no gallery, or an item that is in it twice.
        """
        check_count("k", k)
        place = self._places(gallery)
        whole = torch.equal(gallery, torch.arange(len(self.embeddings)))
        items = self.embeddings if whole else self.embeddings[gallery]
        values = torch.full((len(queries), k), float("-inf"))
        positions = torch.full((len(queries), k), -1)
        block = min(_BLOCK_ENTRIES // len(gallery), BLOCK_PAIRS // self.rows.longest)
        for rows in torch.split(torch.arange(len(queries)), max(1, block)):
            # All distances of the block: the items that share neighbours with a query are many and lie scattered,
            # so that collecting their rows would cost about as much as the product with the whole gallery.
            distances = self._original(queries[rows], items)
            distances -= self._shared(queries[rows], place, len(gallery))
            for query_keys, gallery_keys in exclude:
                distances[matching_pairs(query_keys[rows], gallery_keys)] = float("inf")
            best = distances.topk(min(k, len(gallery)), dim=1, largest=False)
            columns = best.values.shape[1]
            values[rows, :columns] = -best.values
            positions[rows, :columns] = best.indices.masked_fill(best.values.isinf(), -1)
        return values, positions

    def _places(self, gallery: Tensor) -> Tensor:
        """Place of each item in the gallery, (M,) int64; one past its end for those that are not in it."""
        check_not_empty("gallery", gallery)
        own = torch.arange(len(gallery))
        place = torch.full((len(self.embeddings),), len(gallery)).scatter_(0, gallery, own)
        again = place[gallery] != own
        if again.any():
            raise InputError(f"gallery holds item {int(gallery[again][0])} twice; name each item once")
        return place

    def _original(self, queries: Tensor, items: Tensor) -> Tensor:
        """Distances (1 - weight) + weight * scaled distance, which hold between items without a common neighbour."""
        scale = (2 * self.weight / self.largest[queries])[:, None]
        scaled = self.embeddings[queries].float() * scale
        distances = torch.empty(len(queries), len(items))
        part = max(1, _BLOCK_ENTRIES // items.shape[1])
        for start in range(0, len(items), part):
            block = items[start : start + part].float()
            distances[:, start : start + part] = similarities(scaled, block, "inner_product")
        return torch.sub(scale, distances, out=distances).clamp_min_(0).add_(1 - self.weight)

    def _shared(self, queries: Tensor, place: Tensor, count: int) -> Tensor:
        """Jaccard similarity of each query and gallery item times (1 - weight), (n, count) float32."""
        # Items that are not in the gallery have the place `count`: a spare column, cut off at the end.
        sums = torch.zeros(len(queries), count + 1)
        neighbours, weights = self.rows.entries(queries)
        owners = repeated(torch.arange(len(queries)), self.rows.counts(queries))
        lengths = self.columns.counts(neighbours)
        # Items of a collapsed model may all share their neighbours: pair by pair, that would look like a hang.
        long = lengths > _LONG_COLUMN * len(place)
        for column in torch.unique(neighbours[long]):
            items, theirs = self.columns.entries(column[None])
            everyone = torch.zeros(count + 1).index_copy_(0, place[items], theirs)
            holders = neighbours == column
            sums.index_add_(0, owners[holders], torch.minimum(weights[holders, None], everyone))
        short = (~long).nonzero().flatten()
        for part in (short[places] for places in parts(lengths[short], BLOCK_PAIRS)):
            items, theirs = self.columns.entries(neighbours[part])
            ours = repeated(weights[part], lengths[part])
            cells = place.index_select(0, items).add_(repeated(owners[part] * (count + 1), lengths[part]))
            sums.view(-1).index_add_(0, cells, torch.minimum(ours, theirs))
        # Two encodings that add up to 1 each have 2 - (sum of minima) as the sum of their maxima.
        return sums.div_(2 - sums).mul_(1 - self.weight)[:, :count]


def k_reciprocal_nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    query_indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` gallery rows of each query that are nearest after k-reciprocal re-ranking; see `KReciprocal`.

    Args:
        queries: (Nq, D) float32 on the CPU; rows are normalised here.
        gallery: (Ng, D) float32 on the CPU.
        k: neighbours wanted, at least 1.
        k1: neighbours among which reciprocal ones are sought.
        k2: nearest items over which encodings are averaged.
        weight: share of the original distance.
        query_indices: (Nq,) integers that say which item each query is; a gallery row with the same index is that
            item, and is not found. Negative means that it is no other's. None: all rows are items of their own.
        gallery_indices: (Ng,) integers, given together with `query_indices`; none but negative ones twice.

    Returns:
        values: (Nq, k) float32, minus the re-ranked distance, best first; -inf in places without a candidate.
        positions: (Nq, k) int64 rows of `gallery`; -1 in places without a candidate.

    Raises:
        InputError: wrong shapes, dtypes or settings, nothing to search, or one of the indices without the other.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> items = torch.arange(4)
        >>> k_reciprocal_nearest(rows, rows, 1, k1=1, k2=1, query_indices=items, gallery_indices=items)[1].tolist()
        [[1], [0], [3], [2]]
    """
    check_embeddings("queries", queries)
    check_embeddings("gallery", gallery, queries.shape[1])
    exclude = key_pairs("indices", query_indices, gallery_indices, queries, gallery)
    rows = torch.cat([queries.detach().float(), gallery.detach().float()])
    items, first = torch.arange(len(rows)), torch.arange(len(rows))
    if exclude:
        indices = torch.cat(exclude[0])
        indices = torch.where(indices < 0, -1 - items, indices)  # a number of its own for everyone without one
        unique, items = torch.unique(indices, return_inverse=True)
        first = torch.full_like(unique, len(rows)).scatter_reduce_(0, items, first, "amin")
    encoding = KReciprocal(k1, k2, weight).encode(unit_rows(rows[first]))
    return encoding.nearest(items[: len(queries)], items[len(queries) :], k, exclude)


@dataclass(frozen=True)
class _ReciprocalGraph:
    """Lists of neighbours and which of those are mutual, for k1 neighbours and for half as many.

    Attributes:
        lists, mutual: (M, k1 + 1) int64 neighbours, itself first, and bool.
        short_lists, short_mutual: the same for half of k1.
    """

    lists: Tensor
    mutual: Tensor
    short_lists: Tensor
    short_mutual: Tensor

    @classmethod
    def of(cls, neighbours: Tensor, k1: int) -> _ReciprocalGraph:
        """Makes the graph from lists of neighbours, (M, at least k1 + 1 or M)."""
        # Half of an odd k1 is rounded to even, as in the authors' release.
        lists, short = neighbours[:, : k1 + 1], neighbours[:, : int(np.around(k1 / 2)) + 1]
        return cls(lists, _mutual(lists), short, _mutual(short))

    @property
    def block(self) -> int:
        """Number of rows that may be expanded at a time."""
        return max(1, BLOCK_PAIRS // (self.lists.shape[1] * (self.short_lists.shape[1] + 1)))

    def expanded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sets R* of some rows: the size of each, (n,), and the members, ascending, one row after the other."""
        none = len(self.lists)
        mutual = self.mutual[rows]
        own = self.lists[rows].masked_fill(~mutual, none).sort(dim=1).values
        theirs = self.short_lists[self.lists[rows]]
        valid = self.short_mutual[self.lists[rows]]
        place = torch.searchsorted(own, theirs.flatten(1)).clamp_max_(own.shape[1] - 1)
        known = (own.gather(1, place) == theirs.flatten(1)).view_as(theirs) & valid
        # More than two thirds, in whole numbers.
        joins = mutual & (3 * known.sum(dim=2) > 2 * valid.sum(dim=2))
        joined = theirs.masked_fill_(~(valid & joins[:, :, None]), none)
        members = torch.cat([own, joined.flatten(1)], dim=1).sort(dim=1).values
        new = members < none
        new[:, 1:] &= members[:, 1:] != members[:, :-1]
        return new.sum(dim=1), members[new]


def _neighbours(embeddings: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Nearest items of each item (M, at most `width`), itself first, and its largest squared distance to any (M,)."""
    count, others = len(embeddings), min(width, len(embeddings)) - 1
    keys = torch.arange(count)

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        own = embeddings[rows].float()
        _, positions = nearest(own, embeddings, max(1, others), "inner_product", [(rows, keys)])
        opposite, _ = nearest(-own, embeddings, 1, "inner_product")
        return torch.cat([rows[:, None], positions[:, :others]], dim=1), 2 + 2 * opposite[:, 0]

    neighbours, largest = map_rows(count, search, max(1, _BLOCK_ENTRIES // embeddings.shape[1]))
    return neighbours, largest.clamp_min(_LEAST_SCALE)


def _mutual(lists: Tensor) -> Tensor:
    """True where an item is in the list of its neighbour as well; bool of the shape of `lists`."""
    rows = torch.split(torch.arange(len(lists)), max(1, BLOCK_PAIRS // lists.shape[1] ** 2))
    return torch.cat([(lists[lists[block]] == block[:, None, None]).any(dim=2) for block in rows])


def _pair_similarities(embeddings: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the items `left` with the items `right`, both (n,) int64; (n,) float32."""
    products = torch.empty(len(left))
    for pairs in torch.split(torch.arange(len(left)), max(1, _BLOCK_ENTRIES // embeddings.shape[1])):
        products[pairs] = (embeddings[left[pairs]].float() * embeddings[right[pairs]].float()).sum(dim=1)
    return products
