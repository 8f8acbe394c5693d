"""Statistics of the rows of a bank: moments, a map of all rows, and a summary."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.labels import UNLABELLED
from lightning_dml.memory.slots import blocks, unit_rows


def moment_sums(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Count, sums and sums of squares of the labelled rows, as one float64 tensor (1 + 2 dim,) that ranks can add."""
    dim = embeddings.shape[1]
    sums = embeddings.new_zeros(1 + 2 * dim, dtype=torch.float64)
    for block in blocks(len(embeddings), dim * sums.element_size()):
        rows, used = embeddings[block].double(), (labels[block] != UNLABELLED).double()
        sums[0] += used.sum()
        sums[1 : 1 + dim] += used @ rows
        sums[1 + dim :] += used @ rows.square()
    return sums


def moments_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor n), each (dim,) float32, from `moment_sums`; zeros where nothing was."""
    count = sums[0].clamp_min(1)
    mean, square = (sums[1:] / count).chunk(2)
    return mean.float(), (square - mean.square()).clamp_min(0).sqrt().float()


def transform_rows(embeddings: Tensor, labels: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Maps labelled rows to normalise(row * scale + shift) in place; a row that would lose its direction stays."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    scale, shift = scale.to(embeddings.device, wide), shift.to(embeddings.device, wide)
    for block in blocks(len(embeddings), embeddings.shape[1] * wide.itemsize):
        rows = embeddings[block].to(wide)
        moved = unit_rows(rows * scale + shift, otherwise=rows)
        embeddings[block] = torch.where((labels[block] != UNLABELLED)[:, None], moved, rows).to(embeddings.dtype)


def summarise(labels: Tensor, indices: Tensor, steps: Tensor, step: int | None) -> dict[str, float]:
    """Shares and counts of a bank's slots, (size,) int64 each; ages where `step` and a row's step are known."""
    used = labels != UNLABELLED
    rows = int(used.sum())
    known = indices[used & (indices >= 0)]
    summary = {
        "filled": rows / len(labels),
        "rows": float(rows),
        "classes": float(len(set(labels[used].tolist()))),
        "samples": float(len(set(known.tolist()))),
    }
    dated = steps[used & (steps >= 0)]
    if step is not None and len(dated):
        ages = step - dated
        summary |= {"age_mean": float(ages.double().mean()), "age_max": float(ages.max())}
    return summary
