"""The base class of all re-ranking steps, so that options and configs can ask for one of them."""

from __future__ import annotations


class RerankingStep:
    """A step of `RetrievalMetrics(reranking=...)`: `QueryExpansion`, `DatabaseAugmentation` or `KReciprocal`."""
