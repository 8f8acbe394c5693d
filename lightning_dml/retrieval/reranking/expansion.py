"""Queries and gallery items moved towards their neighbours: query expansion and database-side augmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import (
    check_count,
    check_embeddings,
    check_finite,
    check_integers,
    check_not_empty,
    check_number,
)
from lightning_dml.distributed import map_rows
from lightning_dml.retrieval.exclusion import Exclusions
from lightning_dml.retrieval.reranking.step import RerankingStep
from lightning_dml.retrieval.search import nearest, unit_rows

# Entries of the rows that are expanded at a time: 16 MiB of float32, and as much again for their neighbours.
_BLOCK_ENTRIES = 2**22


class QueryExpansion(RerankingStep):
    """Alpha query expansion: a query becomes the weighted sum of itself and its nearest gallery items.

    q' is the unit vector along q + sum of max(s, 0)^alpha g over the `k` nearest gallery items g, whose cosine
    similarity with q is s. `alpha` = 0 weights all of them alike, which is average query expansion.

    Sources: Radenovic, Tolias, Chum, Fine-tuning CNN Image Retrieval with No Human Annotation, 2018
    (arXiv 1711.02512); for alpha = 0 Chum et al., Total Recall, ICCV 2007.

    Args:
        k: gallery items that enter, at least 1. A query that has fewer candidates uses those.
        alpha: exponent of the similarity, at least 0.

    Raises:
        InputError: `k` < 1, or `alpha` negative or not finite.
    """

    def __init__(self, k: int = 10, alpha: float = 3.0) -> None:
        check_count("k", k, hint="leave the re-ranking out for none")
        check_number("alpha", alpha, least=0, hint="0 weights all alike")
        self.k = k
        self.alpha = alpha

    def apply(self, queries: Tensor, gallery: Tensor, exclude: Exclusions = ()) -> Tensor:
        """Expands queries by their nearest gallery items.

        Which of several items that tie for the k-th place enter is up to the search, as for any k neighbours.

        Args:
            queries: (Nq, D) unit rows, float32 or float16, on the CPU.
            gallery: (Ng, D) unit rows, float32 or float16, on the CPU; half precision is converted block by block.
            exclude: pairs of query keys (Nq,) and gallery keys (Ng,), int64; an item with the key of the query, if
                that is not negative, is none of its neighbours.

        Returns:
            (Nq, D) float32 unit rows. Rows of zeros, which resemble nothing, stay zeros unless `alpha` is 0.

        Raises:
            InputError: wrong shapes or dtypes, an empty gallery, or rows that hold NaN or infinity.

        Examples:
            >>> gallery = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
            >>> QueryExpansion(k=1, alpha=0.0).apply(torch.tensor([[0.8, 0.6]]), gallery)
            tensor([[0.7071, 0.7071]])
        """
        check_embeddings("queries", queries)
        check_finite("queries", queries)
        _check_gallery(gallery, queries.shape[1])
        blocks = []
        for rows in torch.split(torch.arange(len(queries)), _block_rows(gallery)):
            of_block = [(query_keys[rows], gallery_keys) for query_keys, gallery_keys in exclude]
            blocks.append(self.expanded(queries[rows].float(), gallery, of_block))
        return torch.cat(blocks)

    def expanded(self, queries: Tensor, gallery: Tensor, exclude: Exclusions) -> Tensor:
        """The same as `apply` for one block of float32 queries, without checks."""
        similarities, positions = nearest(queries, gallery, self.k, "inner_product", exclude)
        # Missing neighbours are told by their positions: 0 ** 0 would give them a weight.
        weights = similarities.clamp_min(0).pow(self.alpha).masked_fill_(positions < 0, 0)
        total = queries.clone()
        for weight, position in zip(weights.T, positions.clamp_min(0).T, strict=True):
            total += weight[:, None] * gallery[position].float()
        return unit_rows(total)


class DatabaseAugmentation(RerankingStep):
    """Database-side augmentation: every gallery item becomes the weighted sum of itself and its neighbours.

    The weights are those of `QueryExpansion`, and all items are computed from the original gallery.

    Source: Turcot and Lowe, Better Matching with Fewer Features, ICCV Workshops 2009; the weights of Radenovic,
    Tolias, Chum, 2018 (arXiv 1711.02512).

    Args:
        k: neighbours that enter, at least 1; the item itself is not counted.
        alpha: exponent of the similarity, at least 0.

    Raises:
        InputError: `k` < 1, or `alpha` negative or not finite.
    """

    def __init__(self, k: int = 10, alpha: float = 3.0) -> None:
        self.k = k
        self.alpha = alpha
        self._expansion = QueryExpansion(k, alpha)

    def apply(self, gallery: Tensor, keys: Tensor | None = None) -> Tensor:
        """Augments a gallery; a collective: the ranks share the work and all get the same rows.

        Args:
            gallery: (Ng, D) unit rows, float32 or float16, on the CPU, the same on every rank.
            keys: (Ng,) integers; rows with equal keys are one item and not neighbours of each other, a negative key
                is like no other, so that such a row is its own nearest neighbour. None: every row is an item.

        Returns:
            (Ng, D) unit rows of the dtype of `gallery`.

        Raises:
            InputError: wrong shapes or dtypes, an empty gallery, or rows that hold NaN or infinity.

        Examples:
            >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
            >>> DatabaseAugmentation(k=1, alpha=0.0).apply(gallery)
            tensor([[0.9487, 0.3162],
                    [0.9487, 0.3162],
                    [0.4472, 0.8944]])
        """
        _check_gallery(gallery)
        if keys is None:
            keys = torch.arange(len(gallery))
        check_integers("keys", keys, len(gallery), "gallery")
        every_key = keys.long()

        def augmented(rows: Tensor) -> tuple[Tensor]:
            moved = self._expansion.expanded(gallery[rows].float(), gallery, [(every_key[rows], every_key)])
            return (moved.to(gallery.dtype),)

        return map_rows(len(gallery), augmented, _block_rows(gallery))[0]


def _check_gallery(gallery: Tensor, dim: int | None = None) -> None:
    check_embeddings("gallery", gallery, dim)
    check_not_empty("gallery", gallery)
    check_finite("gallery", gallery)


def _block_rows(rows: Tensor) -> int:
    return max(1, _BLOCK_ENTRIES // rows.shape[1])
