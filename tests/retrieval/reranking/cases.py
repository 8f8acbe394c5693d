"""Slow and plain re-ranking, which several tests compare with."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.tolerances import gap, rounding

Matrix = npt.NDArray[np.float64]


def slow_expansion(
    queries: Matrix, gallery: Matrix, k: int, alpha: float, query_keys: list[int], gallery_keys: list[int]
) -> Matrix:
    """The definition, item by item."""
    expanded = []
    for query, key in zip(queries, query_keys, strict=True):
        candidates = [item for item, other in zip(gallery, gallery_keys, strict=True) if key < 0 or key != other]
        candidates.sort(key=lambda item: -float(query @ item))
        total = query.copy()
        for item in candidates[:k]:
            total += max(float(query @ item), 0.0) ** alpha * item
        expanded.append(total / np.sqrt((total**2).sum()))
    return np.array(expanded)


def slow_distances(rows: Tensor, k1: int, k2: int, weight: float) -> Matrix:
    """Final distances of all pairs, dense and in the order of the paper's sections."""
    x = rows.double().numpy()
    count = len(x)
    original = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    largest = original.max(axis=1)
    lists = [[i, *(j for j in np.argsort(original[i]).tolist() if j != i)] for i in range(count)]
    original /= largest[:, None]

    @cache
    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in lists[i][: k + 1] if i in lists[j][: k + 1]}

    encodings = np.zeros((count, count))
    for i in range(count):
        close = reciprocal(i, k1)
        robust = set(close)
        for j in close:
            theirs = reciprocal(j, round(k1 / 2))
            if len(theirs & close) > 2 / 3 * len(theirs):
                robust |= theirs
        for j in robust:
            encodings[i, j] = np.exp(-original[i, j])
        encodings[i] /= encodings[i].sum()
    encodings = np.array([encodings[lists[i][:k2]].mean(axis=0) for i in range(count)])

    pairs = encodings[:, None], encodings[None]
    jaccard = 1 - np.minimum(*pairs).sum(axis=2) / np.maximum(*pairs).sum(axis=2)
    final: Matrix = (1 - weight) * jaccard + weight * original
    return final


def clear(rows: Tensor) -> bool:
    """True where rounding cannot exchange two neighbours of a row, which would change the sets of neighbours.

    A squared distance of unit rows is 2 - 2 s, and so has twice the rounding of their similarity s.
    """
    distances = torch.cdist(rows.double(), rows.double()).square()
    return gap(distances) > 2 * rounding(rows.shape[1] + 3)
