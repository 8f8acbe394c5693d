"""Clusters of embeddings and their agreement with the labels: seeded k-means, and exact NMI and AMI.

Both scores treat every value as a class or a cluster, negative ones too: the caller leaves distractors out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dml.checks import check_count, check_embeddings, check_finite, check_integers, check_not_empty
from lightning_dml.retrieval.search import check_on_cpu

# Terms of the expected mutual information in memory at a time: 2 MiB of float64 for each intermediate.
_BLOCK_ENTRIES = 2**18

# Table entries whose probability is surely below exp(-80), about 2e-35, are left out: far below float64's rounding.
_NEGLIGIBLE = 80.0


@torch.no_grad()
def kmeans_labels(
    embeddings: Tensor,
    clusters: int,
    seed: int = 0,
    iterations: int = 20,
    after_iteration: Callable[[], None] | None = None,
) -> Tensor:
    """The cluster of each row by k-means (Lloyd's algorithm, in faiss) from random rows as first centroids.

    faiss runs one iteration at a time, which gives the centroids of one longer run bit for bit. Every row takes part
    in every iteration, where faiss by default draws at most 256 rows per cluster. `seed` alone draws the first
    centroids; global random states have no part in it. As in all k-means from random rows, the end may be a local
    optimum.

    What faiss gets are the distinct rows, sorted by value, weighted by how often each occurs, scaled and centred: so
    the answer does not depend on the order of the rows, and equal rows always share a cluster. Last digits that another
    processor rounds otherwise leave the first centroids where they are, but may lead to another optimum where a row is
    as near to two centroids. A collapsed model has one cluster, where rounding would otherwise deal its rows out. With
    as many clusters as distinct rows, or more, each distinct row is a cluster and the rest are empty.

    Under DDP let rank 0 call this and let `after_iteration` join a small collective that the other ranks run
    `iterations` times; none of them then has to wait longer than an iteration.

    Args:
        embeddings: (N, D) floating point on the CPU; computed in float32. Unit rows cluster by cosine.
        clusters: how many, from 1 to N.
        seed: 0 or more.
        iterations: at least 1.
        after_iteration: called after each iteration, exactly `iterations` times whatever the rows are; the last
            assignment of rows to centroids comes after the last call.

    Returns:
        (N,) int64 cluster numbers in [0, clusters); a number may be without rows.

    Raises:
        InputError: `embeddings` is no finite matrix of at least one row on the CPU, or a number is out of range.

    Examples:
        >>> rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.9], [0.9, 0.0]])
        >>> first, second, third, fourth = kmeans_labels(rows, 2).tolist()
        >>> first == third, second == fourth, first == second
        (True, True, False)
    """
    rows = _check_rows(embeddings)
    check_count("clusters", clusters, 1, len(rows), "the number of rows is the most: embed more items for more")
    check_count("seed", seed, 0, 2**63 - 1, "torch takes no larger one")
    check_count("iterations", iterations, 1, 2**31 - 1, "faiss takes no more; 20 is usual")
    points, point_of_row, weights = _distinct_rows(rows)
    if after_iteration is None:
        after_iteration = _nothing
    if clusters >= len(points):
        for _ in range(iterations):
            after_iteration()
        return point_of_row
    solver = faiss.Kmeans(
        points.shape[1], clusters, niter=1, min_points_per_centroid=1, max_points_per_centroid=len(points)
    )
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randperm(len(points), generator=generator)[:clusters].numpy()]
    for _ in range(iterations):
        solver.train(points, weights=weights, init_centroids=centroids)
        centroids = solver.centroids
        after_iteration()
    _, cluster_of_point = solver.assign(points)
    return torch.from_numpy(cluster_of_point)[point_of_row]


def normalized_mutual_information(labels: Tensor, clusters: Tensor) -> float:
    """NMI: mutual information of two partitions over the arithmetic mean of their entropies.

    NMI = I(U; V) / ((H(U) + H(V)) / 2), with, for classes of a_i items, clusters of b_j items and n_ij in both,
    I = sum_ij n_ij/N log(N n_ij / (a_i b_j)) and H(U) = -sum_i a_i/N log(a_i/N).
    It rises with the number of clusters even for random ones; `adjusted_mutual_information` does not.
    As in scikit-learn, equal partitions have 1, also those of a single cluster, and a single cluster against any other
    partition has 0. Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, section 16.3.

    Args:
        labels: (N,) integers of any size or sign, N >= 1.
        clusters: (N,) integers likewise.

    Returns:
        A number in [0, 1], computed in float64.

    Raises:
        InputError: one is no vector of integers, their lengths differ, or they are empty.

    Examples:
        >>> labels = torch.tensor([7, 7, -3, -3])
        >>> normalized_mutual_information(labels, torch.tensor([1, 1, 0, 0]))
        1.0
        >>> round(normalized_mutual_information(labels, torch.tensor([0, 1, 2, 3])), 4)
        0.6667
    """
    table = _contingency(labels, clusters)
    if table.is_identity():
        return 1.0
    return table.information / ((_entropy(table.class_sizes) + _entropy(table.cluster_sizes)) / 2)


def adjusted_mutual_information(labels: Tensor, clusters: Tensor) -> float:
    """AMI: mutual information above chance, over the most that it could be above it; random clusters have 0.

    AMI = (I - E[I]) / ((H(U) + H(V)) / 2 - E[I]), where E[I] is the mean of I (see `normalized_mutual_information`)
    over all pairs of partitions with these sizes. It is computed exactly (to float64's rounding), in memory that
    grows with N and not with classes x clusters. As in scikit-learn, equal partitions have 1, also those of a single
    cluster or of single items. A partition of one cluster, or of single items, has 0 against any other: its I
    is the same for all partitions of given sizes.
    Source: Vinh, Epps and Bailey, Information Theoretic Measures for Clusterings Comparison, JMLR 11, 2010.

    Args:
        labels: (N,) integers of any size or sign, N >= 1.
        clusters: (N,) integers likewise.

    Returns:
        A number up to 1, computed in float64; below 0 where the agreement is less than chance.

    Raises:
        InputError: one is no vector of integers, their lengths differ, or they are empty.

    Examples:
        >>> labels = torch.tensor([7, 7, -3, -3])
        >>> adjusted_mutual_information(labels, torch.tensor([1, 1, 0, 0]))
        1.0
        >>> round(adjusted_mutual_information(labels, torch.tensor([0, 1, 0, 1])), 4)
        -0.5
    """
    table = _contingency(labels, clusters)
    if table.is_identity():
        return 1.0
    if {table.class_sizes.numel(), table.cluster_sizes.numel()} & {1, table.total}:
        return 0.0
    expected = _expected_information(table.class_sizes, table.cluster_sizes, table.total)
    most = (_entropy(table.class_sizes) + _entropy(table.cluster_sizes)) / 2
    return (table.information - expected) / (most - expected)


class _Contingency(NamedTuple):
    """Sizes of the classes (C,), of the clusters (K,) and of their overlaps that are not empty, int64."""

    class_sizes: Tensor
    cluster_sizes: Tensor
    overlaps: Tensor
    information: float
    total: int

    def is_identity(self) -> bool:
        """True where the two are one partition under two sets of names."""
        return self.class_sizes.numel() == self.cluster_sizes.numel() == self.overlaps.numel()


def _contingency(labels: Tensor, clusters: Tensor) -> _Contingency:
    total = labels.numel()
    check_integers("labels", labels, total, "clusters")
    check_integers("clusters", clusters, total, "labels")
    check_not_empty("labels", labels)
    _, class_of, class_sizes = torch.unique(labels.cpu().long(), return_inverse=True, return_counts=True)
    _, cluster_of, cluster_sizes = torch.unique(clusters.cpu().long(), return_inverse=True, return_counts=True)
    columns = len(cluster_sizes)
    cells, overlaps = torch.unique(class_of * columns + cluster_of, return_counts=True)
    by_chance = class_sizes[cells // columns] * cluster_sizes[cells % columns]
    terms = overlaps.double() / total * torch.log((overlaps * total).double() / by_chance)
    return _Contingency(class_sizes, cluster_sizes, overlaps, max(0.0, float(terms.sum())), total)


def _entropy(sizes: Tensor) -> float:
    shares = sizes.double() / sizes.sum()
    return float(-(shares * shares.log()).sum())


def _expected_information(class_sizes: Tensor, cluster_sizes: Tensor, total: int) -> float:
    """Mean of I over all pairs of partitions with these sizes, all as likely: Vinh et al. (2010), hypergeometric model.

    An overlap n of a class of a and a cluster of b items is hypergeometric, so only the distinct pairs (a, b) matter:
    at most 2 N, since sizes that all differ sum to N. Each pair is one row of a block, n runs along it.
    """
    (a, a_times), (b, b_times) = (torch.unique(sizes, return_counts=True) for sizes in (class_sizes, cluster_sizes))
    times = (a_times[:, None] * b_times).flatten()
    a, b = a.repeat_interleave(len(b)), b.repeat(len(a))
    mean = (a * b).double() / total
    # Bernstein's bound, which holds for draws without replacement too (Hoeffding 1963, section 6): an overlap is
    # further than this from its mean with a probability of at most 2 exp(-_NEGLIGIBLE).
    reach = _NEGLIGIBLE / 3 + (_NEGLIGIBLE**2 / 9 + 2 * _NEGLIGIBLE * mean).sqrt()
    first = torch.maximum((a + b - total).clamp_min(0), (mean - reach).ceil().long())
    last = torch.minimum(torch.minimum(a, b), (mean + reach).floor().long())
    # Longest rows first, so that the rows of a block are of about the same length.
    order = (last - first).argsort(descending=True)
    expected, start = 0.0, 0
    while start < len(order):
        width = int(last[order[start]] - first[order[start]]) + 1
        pairs = order[start : start + max(1, _BLOCK_ENTRIES // width)]
        n = first[pairs, None].double() + torch.arange(width)
        chances = _overlap_chances(n, a[pairs, None], b[pairs, None], last[pairs, None], total)
        means = (chances * torch.special.xlogy(n, n / mean[pairs, None])).sum(dim=1)
        expected += float((means * times[pairs]).sum())
        start += len(pairs)
    return expected / total


def _overlap_chances(n: Tensor, a: Tensor, b: Tensor, last: Tensor, total: int) -> Tensor:
    """Hypergeometric probabilities (pairs, width) of the overlaps `n`; 0 beyond `last`.

    From the ratios of neighbours and a sum of 1, not from log-factorials: these are so large that rounding them
    alone puts the expected information off by 1e-9 to 1e-8 at N = 60,000.
    """
    ratios = (a - n + 1) * (b - n + 1) / (n * (total - a - b + n))
    steps = torch.where(n <= last, ratios.log(), -math.inf)
    steps[:, 0] = 0
    return torch.softmax(steps.cumsum(dim=1), dim=1)


def _nothing() -> None:
    """The call after each iteration where the caller gives none."""


def _distinct_rows(rows: Tensor) -> tuple[NDArray[np.float32], Tensor, NDArray[np.float32]]:
    """Distinct rows (M, D), scaled and centred; the number of each row's one (N,); the count of each (M,)."""
    # + 0.0 makes -0.0 the same bytes as 0.0.
    values = (rows + 0.0).numpy()
    # Sorted by value, first column first: a last digit that another processor, or another batch size, rounds the other
    # way then leaves nearly all rows in their places, and so the first centroids. Numbers whose bytes sort like the
    # floats have the sign bit turned, of negative ones all bits, and the highest byte first.
    keys = values.view(np.uint32)
    keys = (keys ^ np.where(keys >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))).astype(">u4")
    as_bytes = keys.view(np.dtype((np.void, values.itemsize * values.shape[1]))).ravel()
    _, example, point_of_row, counts = np.unique(as_bytes, return_index=True, return_inverse=True, return_counts=True)
    points = values[example]
    # Neither moves a border between clusters. Squares then stay within float32 and keep their digits far from 0.
    points /= max(float(np.abs(points).max()), float(np.finfo(np.float32).tiny))
    points -= (counts @ points.astype(np.float64) / len(rows)).astype(np.float32)
    return points, torch.from_numpy(point_of_row.reshape(-1)), counts.astype(np.float32)


def _check_rows(embeddings: Tensor) -> Tensor:
    """The embeddings as contiguous float32, once they are known to be right."""
    check_embeddings("embeddings", embeddings)
    check_on_cpu("embeddings", embeddings)
    check_not_empty("embeddings", embeddings)
    rows = embeddings.float().contiguous()
    check_finite("embeddings", rows)
    return rows
