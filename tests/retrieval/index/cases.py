"""Rows and indexes that several tests of ApproximateIndex share."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

from lightning_dml.retrieval.index.approximate import ApproximateIndex

METRICS = ("inner_product", "cosine", "l2")


def rows(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Gaussian rows that differ by seed alone."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def state(index: ApproximateIndex) -> bytes:
    """All that faiss keeps of an index."""
    return bytes(faiss.serialize_index(index._index).tobytes())


def broken_rows() -> Tensor:
    """NaN and infinity in different rows, to be counted as two."""
    broken = rows(100)
    broken[4, 1], broken[7, 0] = float("nan"), float("-inf")
    return broken
