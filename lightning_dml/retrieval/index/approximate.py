"""Approximate nearest neighbours in galleries of many millions: a faiss index that is built once and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import faiss
import numpy as np
import torch
from torch import Tensor

from lightning_dml.checks import (
    check_choice,
    check_count,
    check_embeddings,
    check_finite,
    check_integers,
    check_not_empty,
)
from lightning_dml.errors import InputError
from lightning_dml.retrieval.exclusion import Exclusions
from lightning_dml.retrieval.index.factory import (
    EXAMPLES,
    FEWEST_PER_CENTROID,
    MOST_PER_CENTROID,
    check_training_rows,
    clusterings,
    index_parts,
    reason,
    set_parameters,
    untrained_index,
)
from lightning_dml.retrieval.index.file import read_index, write_index
from lightning_dml.retrieval.search import (
    SimilarityName,
    check_on_cpu,
    check_products,
    nearest,
    search_excluding,
    search_metric,
    unit_rows,
    worst_value,
)

# Entries of the gallery that are prepared at a time: 64 MiB of float32.
_BLOCK_ENTRIES = 2**24
# What faiss trains product quantisers and OPQ rotations on at most; enough for the ranges of a scalar quantiser too.
_USUAL_TRAIN_ROWS = 2**16


class ApproximateIndex:
    """A faiss index over a gallery, described by a factory string; built once, searched many times.

    The rows are not kept beyond what the index itself stores. It trains on a sample and adds the gallery in blocks, so
    a float16 gallery is never converted as a whole (except for an NSG graph, which faiss builds in one go). The same
    gallery, seed and number of threads give the same index. Source of the factory strings and parameters: the faiss
    wiki, "The index factory" and "Index IO, cloning and hyper parameter tuning".

    Args:
        gallery: (Ng, D) floating point on the CPU; float32 and float16 are usual.
        factory: what faiss builds, such as "IVF4096,Flat", "HNSW32", "OPQ16,IVF1024,PQ16" or "SQ8".
        metric: "inner_product", "cosine" (rows are normalised first) or "l2".
        parameters: search parameters, such as "nprobe=16" or "efSearch=64,k_factor_rf=4"; a build parameter such as
            "efConstruction=80" acts here only. Values are at least 1.
        seed: of the training sample and of every k-means.
        train_rows: rows to train on, drawn without replacement; all rows where there are fewer. By default as many as
            faiss would use: 256 for each centroid of the largest k-means, and no fewer than 65,536.
        graph_threads: threads that link a graph (HNSW, NSG). More than one is faster, but the graph, and with it the
            neighbours found, then depends on their timing. The small graph of a coarse quantiser ("IVF65536_HNSW32")
            is always linked by all threads.

    Raises:
        InputError: a factory string or parameter that faiss does not know, or that fits neither the metric, nor the
            dimensions, nor the number of rows; a gallery that is empty, not on the CPU, or holds NaN or infinity.

    Examples:
        >>> gallery = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> index = ApproximateIndex(gallery, "IVF4,Flat", metric="cosine", parameters="nprobe=4")
        >>> index
        ApproximateIndex('IVF4,Flat', metric='cosine', parameters='nprobe=4', rows=500, dimensions=8)
        >>> values, positions = index.search(gallery[:3], 1)
        >>> positions.flatten().tolist()
        [0, 1, 2]
        >>> index.recall(gallery[:20], 5, gallery)
        1.0
    """

    def __init__(
        self,
        gallery: Tensor,
        factory: str,
        metric: SimilarityName = "inner_product",
        parameters: str = "",
        seed: int = 0,
        train_rows: int | None = None,
        graph_threads: int = 1,
    ) -> None:
        """Trains the index on a sample of the gallery and adds all of its rows."""
        check_choice("metric", metric, get_args(SimilarityName))
        check_count("seed", seed, 0)
        check_count("graph_threads", graph_threads)
        if train_rows is not None:
            check_count("train_rows", train_rows)
        _check_gallery(gallery)
        self.factory = factory
        self.metric = metric
        self._kind = search_metric(metric)
        self.dim = gallery.shape[1]
        self._parameters: dict[str, str] = {}
        self._index = untrained_index(factory, self.dim, self._kind)
        self.parameters = parameters
        self._build(gallery, seed, train_rows, graph_threads)

    def __len__(self) -> int:
        """Number of gallery rows."""
        return int(self._index.ntotal)

    def __repr__(self) -> str:
        """Settings and size."""
        return (
            f"ApproximateIndex({self.factory!r}, metric={self.metric!r}, parameters={self.parameters!r}, "
            f"rows={len(self)}, dimensions={self.dim})"
        )

    @property
    def parameters(self) -> str:
        """The search parameters set so far; setting some, as in `index.parameters = "nprobe=32"`, keeps the others.

        Raises:
            InputError: on setting one that the index does not have, or a value that is no number of at least 1.
        """
        return ",".join(f"{name}={value}" for name, value in self._parameters.items())

    @parameters.setter
    def parameters(self, parameters: str) -> None:
        # Tried on an empty one, so that a wrong name leaves no half of them behind.
        set_parameters(untrained_index(self.factory, self.dim, self._kind), self.factory, parameters)
        self._parameters.update(set_parameters(self._index, self.factory, parameters))

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, exclude: Exclusions = ()) -> tuple[Tensor, Tensor]:
        """The `k` nearest gallery rows of each query that the index finds, best first; it runs on the CPU.

        Args:
            queries: (Nq, D) floating point on any device; none are fine.
            k: neighbours wanted, at least 1.
            exclude: pairs of query keys (Nq,) and gallery keys (Ng,), integers; a gallery item whose key equals that
                of the query, and is not negative, is left out.

        Returns:
            values: (Nq, k) float32 on the device of the queries: similarities descending, or for "l2" squared
                distances ascending, as the index estimates them: only those that store whole rows are exact, and LSH
                counts differing bits. The worst possible value where the index found fewer.
            positions: (Nq, k) int64 rows of the gallery; -1 where the index found fewer.

        Raises:
            InputError: wrong shapes, dtypes or lengths, `k` < 1, or queries that hold NaN or infinity or whose
                products overflow.
        """
        prepared, keys = self._checked(queries, k, exclude)
        values, positions = search_excluding(self._search, prepared, k, self._kind, keys)
        return values.to(queries.device), positions.to(queries.device)

    @torch.no_grad()
    def recall(self, queries: Tensor, k: int, gallery: Tensor, exclude: Exclusions = ()) -> float:
        """The share of the exact `k` nearest neighbours of all queries that the index finds.

        A found row counts by its exact similarity: it is right if that is not below the k-th best by more than
        float32 rounding, so among equally near rows any will do (Aumueller et al. 2018, arXiv 1807.05614, section 2).

        Args:
            queries: (Nq, D) floating point, at least one.
            k: neighbours wanted, at least 1; of a query with fewer candidates, all of those are.
            gallery: (Ng, D) on the CPU, the rows that the index was built from, in the same order.
            exclude: as in `search`.

        Returns:
            From 0 to 1.

        Raises:
            InputError: as for `search`, or a gallery of another size, no query, or nothing but excluded items.
        """
        prepared, keys = self._checked(queries, k, exclude)
        _check_gallery(gallery)
        if gallery.shape != (len(self), self.dim):
            raise InputError(
                f"gallery has shape {tuple(gallery.shape)} and the index holds {(len(self), self.dim)}; give the rows "
                "that it was built from"
            )
        check_finite("gallery", gallery)
        exact = self._exact(prepared, k, gallery, keys)
        positions = search_excluding(self._search, prepared, k, self._kind, keys)[1]
        wanted = int((exact >= 0).sum())
        if wanted == 0:
            raise InputError(f"{len(queries)} queries have no candidate in the gallery; give others, or exclude less")
        right = 0
        for rows in torch.split(torch.arange(len(prepared)), max(1, _BLOCK_ENTRIES // (4 * k * self.dim))):
            best, scale = self._similarities(prepared[rows], gallery, exact[rows])
            got, _ = self._similarities(prepared[rows], gallery, positions[rows])
            last = best.masked_fill(exact[rows] < 0, math.inf).amin(dim=1)
            rounding = math.sqrt(self.dim) * torch.finfo(torch.float32).eps * scale
            right += int(((got >= (last - rounding)[:, None]) & (positions[rows] >= 0)).sum())
        return right / wanted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes index and settings to one file, whole or not at all: a failed save leaves an older file as it was.

        Raises:
            UnwritableFile: an InputError and an OSError; if the file cannot be written.
        """
        settings = {"factory": self.factory, "metric": self.metric, "parameters": self.parameters}
        write_index(Path(path), {**settings, "dim": self.dim, "count": len(self)}, self._index)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ApproximateIndex:
        """The index in a file that `save` wrote.

        Raises:
            InputError: if there is no file, or it is not such a file, was cut off or is damaged.
        """
        settings, index = read_index(Path(path))
        loaded = cls.__new__(cls)
        loaded.factory, loaded.metric, loaded.dim = settings["factory"], settings["metric"], settings["dim"]
        loaded._kind = search_metric(loaded.metric)
        loaded._index, loaded._parameters = index, {}
        # Not all of them are kept in what faiss writes.
        loaded.parameters = settings["parameters"]
        return loaded

    def _build(self, gallery: Tensor, seed: int, train_rows: int | None, graph_threads: int) -> None:
        index, parts = self._index, list(index_parts(self._index))
        rotations = [part for part in parts if isinstance(part, faiss.OPQMatrix)]
        # Those that the rotations make themselves can be given neither seed nor silence; the list keeps ours alive.
        lent = [faiss.ProductQuantizer(rotation.d_out, rotation.M, 8) for rotation in rotations]
        for rotation, quantizer in zip(rotations, lent, strict=True):
            rotation.pq = quantizer
        kmeans = clusterings(index)
        usual = max([_USUAL_TRAIN_ROWS, *(MOST_PER_CENTROID * clustering.centroids for clustering in kmeans)])
        rows = min(len(gallery), train_rows or usual)
        if not index.is_trained:
            check_training_rows(self.factory, kmeans, rows, len(gallery))
        check_finite("gallery", gallery)
        for clustering in kmeans:
            clustering.settings.seed = seed % 2**31
            # We have warned; faiss would for every k-means of many.
            if rows < FEWEST_PER_CENTROID * clustering.centroids:
                clustering.settings.min_points_per_centroid = 1
        # The graph of a coarse quantiser is linked in training, and adding leaves it alone.
        lists = any(isinstance(part, faiss.IndexIVF) for part in parts)
        graphs = [] if lists else [part for part in parts if isinstance(part, (faiss.IndexHNSW, faiss.IndexNSG))]
        whole = any(isinstance(graph, faiss.IndexNSG) for graph in graphs)
        try:
            if not index.is_trained:
                numbers = np.random.default_rng(seed).choice(len(gallery), rows, replace=False, shuffle=False)
                sample = gallery if rows == len(gallery) else gallery[torch.from_numpy(np.sort(numbers))]
                index.train(self._prepared(sample).numpy())
            with _threads(graph_threads if graphs else faiss.omp_get_max_threads()):
                for _, block in self._blocks(gallery, len(gallery) if whole else None):
                    index.add(block.numpy())
        except RuntimeError as error:
            raise InputError(
                f"factory {self.factory!r} cannot be built from {len(gallery)} rows of {self.dim} dimensions, trained "
                f"on {rows}: {reason(error)}; give more rows or take a simpler factory, {EXAMPLES}"
            ) from error
        for rotation in rotations:
            rotation.pq = None

    def _prepared(self, rows: Tensor) -> Tensor:
        rows = rows.detach().cpu().float()
        return (unit_rows(rows) if self.metric == "cosine" else rows).contiguous()

    def _blocks(self, gallery: Tensor, block: int | None = None) -> Iterator[tuple[int, Tensor]]:
        block = block or max(1, _BLOCK_ENTRIES // self.dim)
        for start in range(0, len(gallery), block):
            yield start, self._prepared(gallery[start : start + block])

    def _checked(self, queries: Tensor, k: int, exclude: Exclusions) -> tuple[Tensor, Exclusions]:
        """Queries as the index takes them and the keys beside them, once they are known to be right."""
        check_embeddings("queries", queries, self.dim)
        check_count("k", k)
        for query_keys, gallery_keys in exclude:
            check_integers("exclude, query keys", query_keys, len(queries), "queries")
            check_integers("exclude, gallery keys", gallery_keys, len(self), "the gallery")
        check_finite("queries", queries)
        return self._prepared(queries), [(ours.cpu().long(), theirs.cpu().long()) for ours, theirs in exclude]

    def _search(self, queries: Tensor, width: int) -> tuple[Tensor, Tensor]:
        answer = self._index.search(queries.numpy(), min(width, len(self)))
        values, positions = torch.from_numpy(answer[0]), torch.from_numpy(answer[1])
        nothing = positions < 0
        check_products((torch.isfinite(values) | nothing).all(dim=1))
        if self.metric == "l2":
            values.clamp_min_(0)  # a distance to a compressed row is a sum that may round to below nothing
        return values.masked_fill_(nothing, worst_value(self._kind)), positions

    def _exact(self, queries: Tensor, k: int, gallery: Tensor, exclude: Exclusions) -> Tensor:
        """Positions of the exact nearest (Nq, k), by a search block by block."""
        values = queries.new_empty((len(queries), 0))
        positions = torch.empty((len(queries), 0), dtype=torch.int64)
        for start, rows in self._blocks(gallery):
            within = [(ours, theirs[start : start + len(rows)]) for ours, theirs in exclude]
            part = nearest(queries, rows, k, self._kind, within)
            values = torch.cat([values, part[0]], dim=1)
            positions = torch.cat([positions, torch.where(part[1] < 0, -1, part[1] + start)], dim=1)
            best = values.topk(k, dim=1, largest=self._kind != "l2")
            values, positions = best.values, positions.gather(1, best.indices)
        return positions

    def _similarities(self, queries: Tensor, gallery: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (n, k) float64 to these rows, larger is nearer, and the scale of their rounding, (n,)."""
        rows = self._prepared(gallery[positions.clamp_min(0).flatten()]).double().view(*positions.shape, self.dim)
        queries = queries.double()
        longest, lengths = rows.norm(dim=2).amax(dim=1), queries.norm(dim=1)
        if self.metric == "l2":
            return (rows - queries[:, None]).square().sum(dim=2).neg(), (longest + lengths).square()
        return (rows * queries[:, None]).sum(dim=2), longest * lengths


def _check_gallery(gallery: Tensor) -> None:
    check_embeddings("gallery", gallery)
    check_on_cpu("gallery", gallery)
    check_not_empty("gallery", gallery)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
