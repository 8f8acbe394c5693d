"""Queries with their nearest neighbours as pictures, and the table of an evaluation before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lightning_dml.labels import UNLABELLED
from lightning_dml.retrieval import knn
from lightning_dml.retrieval.search import SimilarityName

# Blue and orange stay apart for colour-blind eyes; a miss is dashed as well.
HIT, MISS = "#0072b2", "#d55e00"

Picture = NDArray[Any]
"""(H, W) or (H, W, 3), uint8 or float in 0..1."""

MISSING: Picture = np.full((1, 1, 3), 220, np.uint8)
"""A grey picture, for an image that is not there."""


def retrieval_figure(
    embeddings: Tensor,
    labels: Tensor,
    indices: Tensor,
    is_query: Tensor,
    is_gallery: Tensor,
    *,
    picture: Callable[[int], Picture],
    queries: int,
    neighbours: int,
    metric: SimilarityName,
    seed: int = 0,
) -> Figure | None:
    """Randomly drawn queries, each with its nearest neighbours, hits and misses framed.

    Args:
        embeddings: (N, D) float.
        labels: (N,) integers; an unlabelled neighbour is a miss.
        indices: (N,) sample indices. Rows of the same index are one image, which is shown once.
        is_query: (N,) bool.
        is_gallery: (N,) bool.
        picture: gives the image of a sample index.
        queries: most rows of the figure.
        neighbours: most nearest neighbours in a row.
        metric: similarity of the search.
        seed: of the choice of queries.

    Returns:
        The figure; None without a query or without a neighbour to show.
    """
    # A padded sampler repeats images: each is shown once.
    _, places = np.unique(indices.numpy(), return_index=True)
    unique = torch.from_numpy(places)
    embeddings, labels, indices = embeddings[unique], labels[unique], indices[unique]
    rows = torch.nonzero(is_query[unique])[:, 0]
    gallery = torch.nonzero(is_gallery[unique])[:, 0]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:queries]
    rows = rows[torch.from_numpy(np.sort(chosen))]
    columns = min(neighbours, len(gallery) - int(bool(torch.isin(rows, gallery).any())))
    if len(rows) == 0 or columns < 1:
        return None
    _, nearest = knn(
        embeddings[rows],
        embeddings[gallery],
        columns,
        metric=metric,
        query_indices=indices[rows],
        gallery_indices=indices[gallery],
    )
    figure = Figure(figsize=(0.9 * (columns + 1.2), 0.9 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False)
    for line, query, near in zip(grid, rows, gallery[nearest], strict=True):
        _show(line[0], picture(int(indices[query])), None)
        for axes, neighbour in zip(line[1:], near, strict=True):
            hit = bool(labels[neighbour] == labels[query]) and int(labels[query]) != UNLABELLED
            _show(axes, picture(int(indices[neighbour])), hit)
    grid[0][0].set_title("query", fontsize=9)
    for rank, axes in enumerate(grid[0][1:], start=1):
        axes.set_title(str(rank), fontsize=9)
    figure.suptitle(
        "Random queries and their nearest neighbours, by rank\nsolid blue: same class    dashed orange: another",
        fontsize=9,
    )
    return figure


def retrieval_table(rows: Sequence[tuple[str, dict[str, float], float]], ks: Sequence[int]) -> str:
    """A text table of evaluations, one a line: Recall@K and MAP@R in percent, and seconds.

    Args:
        rows: a name, the values by `recall@K` and `map@r`, and seconds.
        ks: the K of the Recall@K columns.
    """
    header = ["", *(f"Recall@{k}" for k in ks), "MAP@R", "seconds"]
    body = [
        [name, *(f"{100 * values[f'recall@{k}']:.1f}" for k in ks), f"{100 * values['map@r']:.1f}", f"{seconds:.0f}"]
        for name, values, seconds in rows
    ]
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(line, widths, strict=True) for line in (header, *body))
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_picture(image: Tensor) -> Picture:
    """An image tensor (C, H, W) as a picture, its values stretched to 0..1."""
    image = image.float()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    stretched: Picture = image.permute(1, 2, 0).squeeze(-1).numpy()
    return stretched


def _show(axes: Axes, picture: Picture, hit: bool | None) -> None:
    """Draws a picture, framed as a hit or a miss; None leaves the frame out."""
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(hit is not None)
        spine.set_color(HIT if hit else MISS)
        spine.set_linewidth(2.5)
        spine.set_linestyle("solid" if hit else (0, (2, 1.2)))
