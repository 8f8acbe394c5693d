"""Rankings of a block of queries, with their ties, and every metric of those rankings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_dml.retrieval.exclusion import combined_keys, match_counts, matching_pairs
from lightning_dml.retrieval.functional import map_at_r, ndcg_at_k, precision_at_k, r_precision, recall_at_k
from lightning_dml.retrieval.ranks import average_precision, reciprocal_rank
from lightning_dml.retrieval.search import BLOCK_ENTRIES, SearchName, check_products, similarities
from lightning_dml.retrieval.ties import RESOLUTION, Ties, tie_runs, tied_with_next, with_last_run

# Positives of a query up to which their ranks are counted one after the other; for more, the whole row is sorted.
_COUNTED_POSITIVES = 48
# Similarities that are compared with a bound at a time: 2 MiB of float32, which a core's cache holds.
_COMPARED_ENTRIES = 2**19
# Entries whose lengths are computed at a time: 16 MiB of float64.
_LENGTH_ENTRIES = 2**21


@dataclass(frozen=True)
class Items:
    """One side of a search, on one device.

    Attributes:
        embeddings: (N, D) float32; a gallery may be float16.
        classes: (N,) int64 from 0 on; -1 for an item that matches nothing.
        keys: (N,) int64 from 0 on; items with equal keys do not find each other.
    """

    embeddings: Tensor
    classes: Tensor
    keys: Tensor

    def __len__(self) -> int:
        """Number of items."""
        return len(self.classes)

    def take(self, rows: Tensor) -> Items:
        """The items of `rows`, as `part` gives them, in float32."""
        rows = rows.to(self.classes.device)
        part = self.part(rows)
        return replace(part, embeddings=part.embeddings.float())

    def part(self, rows: Tensor) -> Items:
        """The items of `rows`, ascending int64 positions, each once; views where they lie together."""
        if len(rows) and int(rows[-1] - rows[0]) + 1 == len(rows):
            where: slice | Tensor = slice(int(rows[0]), int(rows[-1]) + 1)
        else:
            where = rows
        return Items(self.embeddings[where], self.classes[where], self.keys[where])

    def to(self, device: torch.device) -> Items:
        """The items on another device."""
        return Items(self.embeddings.to(device), self.classes.to(device), self.keys.to(device))

    def lengths(self) -> Tensor:
        """Euclidean norms of the embeddings, (N,) float32."""
        # In float64, as squares of long rows leave float32; in blocks, as the conversion is a copy.
        blocks = torch.split(self.embeddings, max(1, _LENGTH_ENTRIES // self.embeddings.shape[1]))
        return torch.cat([block.double().square_().sum(dim=1).sqrt_().float() for block in blocks])


Search = Callable[[Tensor, Items, int], tuple[Tensor, Tensor]]
"""Numbers (n,) int64 of queries, those queries, and k -> values and gallery positions (n, k) as of `nearest`."""


def count_relevant(items: Items, queries: Tensor, gallery: Tensor) -> Tensor:
    """R of each query: items of its class in the gallery that it may find; (Nq,) int64.

    Args:
        items: all of them.
        queries: (Nq,) int64 rows of the queries.
        gallery: (Ng,) int64 rows of the gallery.
    """
    both = combined_keys(items.classes, items.keys)
    same_class = match_counts(items.classes[queries], items.classes[gallery])
    return same_class - match_counts(both[queries], both[gallery])


@dataclass(frozen=True)
class Ranking:
    """The first k places of some queries' rankings.

    Attributes:
        hits: (Nq, k) bool in rank order.
        mixed: (n,) int64, the queries in whose runs of tied neighbours hits stand beside others.
        ties: the runs of those queries.
    """

    hits: Tensor
    mixed: Tensor
    ties: Ties


def rank_block(
    rows: Tensor,
    queries: Items,
    gallery: Items,
    k: int,
    metric: SearchName,
    search: Search,
    lengths: Tensor | None,
    exhaustive: bool = True,
) -> Ranking:
    """The rankings of the queries `rows`.

    Args:
        rows: (n,) int64, the numbers of the queries, for `search`.
        queries: those queries.
        gallery: what is searched.
        k: places, at most the length of the gallery.
        metric: of the values that `search` gives.
        search: for one place more than k, which shows whether a run of ties goes on.
        lengths: (Ng,) norms of the gallery, which the rounding of the values is proportional to; None where values
            are around 1.
        exhaustive: whether `search` looks at the whole gallery, so that such a run can be followed through it.
            Otherwise the neighbours that it gives are all there is.
    """
    values, positions = search(rows, queries, k + 1)
    hits = (gallery.classes[positions] == queries.classes[:, None]) & (positions >= 0) & (queries.classes >= 0)[:, None]
    scale = _scale(queries, positions, metric, lengths)
    tied = tied_with_next(values, scale)
    goes_on = tied[:, -1] & exhaustive
    mixed = ((tied & (hits[:, 1:] != hits[:, :-1])).any(dim=1) | goes_on).nonzero().flatten()
    ties = tie_runs(hits[mixed], tied[mixed])
    open_runs = goes_on[mixed].nonzero().flatten()
    if len(open_runs):
        which = mixed[open_runs]
        sign = -1 if metric == "l2" else 1
        floor = sign * values[which, -1] - RESOLUTION * scale.expand_as(values)[which, -1]
        size, positives = _counts_from(floor, queries.take(which), gallery, metric)
        start = ties.start[open_runs, -1]
        before = hits[which].long().cumsum(dim=1) - hits[which].long()
        # Rounding may differ between the searches, and no run is shorter than what was seen of it.
        size = torch.maximum(size - start, ties.size[open_runs, -1])
        positives = positives - before.gather(1, start[:, None]).flatten()
        positives = torch.minimum(torch.maximum(positives, ties.positives[open_runs, -1]), size)
        ties = with_last_run(ties, open_runs, size, positives)
    return Ranking(hits[:, :k], mixed, Ties(*(column[:, :k] for column in ties)))


def _scale(queries: Items, positions: Tensor, metric: SearchName, lengths: Tensor | None) -> Tensor:
    """Scale of each value, which its rounding is proportional to."""
    if lengths is None:
        return torch.ones(1, 1, device=positions.device)
    return _scale_of_pairs(queries.lengths()[:, None], lengths[positions], metric)


def _scale_of_pairs(query_lengths: Tensor, gallery_lengths: Tensor, metric: SearchName) -> Tensor:
    if metric == "inner_product":
        return query_lengths * gallery_lengths
    return (query_lengths + gallery_lengths).square_()


def _counts_from(floor: Tensor, queries: Items, gallery: Items, metric: SearchName) -> tuple[Tensor, Tensor]:
    """Numbers of gallery items, and of those of the query's class, that are at least as similar as `floor`."""
    sizes, positives = [], []
    everyone = torch.arange(len(queries), device=floor.device)
    for rows in torch.split(everyone, max(1, BLOCK_ENTRIES // len(gallery))):
        block = queries.take(rows)
        table = _allowed_similarities(block, gallery, metric)
        sizes.append(_passing(table, floor[rows, None], torch.ge).flatten())
        same, columns = matching_pairs(block.classes, gallery.classes)
        counts = torch.zeros(len(rows), dtype=torch.int64, device=floor.device)
        positives.append(counts.index_add_(0, same, (table[same, columns] >= floor[rows[same]]).long()))
    return torch.cat(sizes), torch.cat(positives)


def _allowed_similarities(queries: Items, gallery: Items, metric: SearchName) -> Tensor:
    """All similarities (n, Ng), minus infinity where a query must not find the item."""
    table = similarities(queries.embeddings, gallery.embeddings, metric)
    # A sum over a row is finite unless an entry is not, or the sum itself overflows.
    suspects = ~table.sum(dim=1).isfinite()
    if suspects.any():
        check_products(table[suspects].isfinite().all(dim=1))
    table[matching_pairs(queries.keys, gallery.keys)] = float("-inf")
    return table


def list_metrics(ks: Sequence[int], include: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """The metrics among `include` that need the first places only, as functions of (hits, relevant, ties)."""
    functions: dict[str, Callable[..., Tensor]] = {}
    at_k = {"recall": _recall, "precision": _precision, "ndcg": _ndcg}
    for name in include:
        if name in at_k:
            functions.update({f"{name}@{k}": partial(at_k[name], k=k) for k in ks})
        elif name == "precision@1":
            functions[name] = partial(_precision, k=1)
        elif name in ("map@r", "r_precision"):
            functions[name] = map_at_r if name == "map@r" else r_precision
    return functions


def _recall(hits: Tensor, _relevant: Tensor, ties: Ties | None = None, *, k: int) -> Tensor:
    return recall_at_k(hits, min(k, hits.shape[1]), ties)


def _precision(hits: Tensor, _relevant: Tensor, ties: Ties | None = None, *, k: int) -> Tensor:
    # A gallery of fewer than k items leaves places empty, and an empty place is no hit.
    places = min(k, hits.shape[1])
    return precision_at_k(hits, places, ties) * (places / k)


def _ndcg(hits: Tensor, relevant: Tensor, ties: Ties | None = None, *, k: int) -> Tensor:
    return ndcg_at_k(hits, relevant, min(k, hits.shape[1]), ties)


def list_values(ranking: Ranking, relevant: Tensor, functions: Sequence[Callable[..., Tensor]]) -> Tensor:
    """Values of all functions for all queries, (Nq, functions) float64 on the CPU."""
    columns = [function(ranking.hits, relevant) for function in functions]
    if len(ranking.mixed):
        hits, counts = ranking.hits[ranking.mixed], relevant[ranking.mixed]
        for column, function in zip(columns, functions, strict=True):
            column[ranking.mixed] = function(hits, counts, ranking.ties)
    return torch.stack(columns, dim=1).cpu()


RANK_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"map": average_precision, "mrr": reciprocal_rank}
"""The metrics that need the ranks of all positives, as functions of (ranks, tied)."""


def positive_ranks(queries: Items, gallery: Items, metric: SearchName, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each positive in the whole gallery, and how many items are tied with it; see `ranks`.

    Args:
        queries: few enough for all their similarities.
        gallery: what is searched.
        metric: how near a query and an item are.
        lengths: (Ng,) norms of the gallery.

    Returns:
        ranks, tied: (Nq, most positives, one at least) int64.
    """
    table = _allowed_similarities(queries, gallery, metric)
    rows, columns = matching_pairs(queries.classes, gallery.classes)
    allowed = queries.keys[rows] != gallery.keys[columns]
    rows, columns = rows[allowed], columns[allowed]
    counts = torch.bincount(rows, minlength=len(queries))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(dim=0) - counts)[rows]
    most = max(1, int(counts.max())) if len(counts) else 1
    mine = table.new_full((len(queries), most), float("-inf"))
    mine[rows, place] = table[rows, columns]
    tolerance = torch.zeros_like(mine)
    tolerance[rows, place] = RESOLUTION * _scale_of_pairs(queries.lengths()[rows], lengths[columns], metric)
    mine, order = mine.sort(dim=1, descending=True)
    tolerance = tolerance.gather(1, order)
    # Positives that are tied with each other are one run, from the upper bound of the first to the lower of the last:
    # with bounds of their own their runs would overlap, and places be counted twice.
    present = torch.arange(most, device=rows.device) < counts[:, None]
    reach = torch.maximum(tolerance[:, 1:], tolerance[:, :-1])
    runs = tie_runs(present, present[:, 1:] & (mine[:, :-1] <= mine[:, 1:] + reach))
    upper = (mine + tolerance).gather(1, runs.start)
    lower = (mine - tolerance).gather(1, runs.start + runs.size - 1)
    above, reached = _counts_around(table, upper, lower)
    return torch.where(present, above + 1, 0), torch.where(present, reached - above, 0)


def _counts_around(table: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of the entries of each row that are above each of `upper`, and that reach each of `lower`; int64."""
    if upper.shape[1] <= _COUNTED_POSITIVES:
        return _passing(table, upper, torch.gt), _passing(table, lower, torch.ge)
    ascending = table.sort(dim=1).values
    total = table.shape[1]
    above = total - torch.searchsorted(ascending, upper.contiguous(), right=True)
    return above, total - torch.searchsorted(ascending, lower.contiguous())


def _passing(table: Tensor, bounds: Tensor, passes: Callable[..., Tensor]) -> Tensor:
    """Counts of the entries of each row of `table` (n, m) that pass each of the bounds (n, b); (n, b) int64."""
    counts = torch.empty(bounds.shape, dtype=torch.int64, device=table.device)
    # Sums of bools take ten times as long as those of floats that stay in the cache; float32 counts up to 2^24.
    rows = max(1, _COMPARED_ENTRIES // table.shape[1])
    total = torch.float32 if table.shape[1] <= 2**24 else torch.float64
    flags = torch.empty(min(rows, len(table)), table.shape[1], device=table.device)
    for start in range(0, len(table), rows):
        block = slice(start, start + rows)
        part = table[block]
        for place in range(bounds.shape[1]):
            passed = passes(part, bounds[block, place, None], out=flags[: len(part)])
            counts[block, place] = passed.sum(dim=1, dtype=total).long()
    return counts
