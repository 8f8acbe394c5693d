"""One thread of faiss in every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of faiss spin between its many short k-means, and on a busy machine that takes most of the time."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)
