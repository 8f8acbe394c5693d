"""Pairs of a batch and a bank, counted one at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pairs_by_loop(
    bank: dict[str, Any], embeddings: Tensor, labels: Tensor, indices: Tensor, hard_above: float
) -> tuple[float, float]:
    """Shares of hard negatives and of rows with a positive, one pair at a time."""
    hard = negatives = with_positive = labelled = 0
    for row, label, index in zip(embeddings, labels.tolist(), indices.tolist(), strict=True):
        found = False
        if label == -1:
            continue
        labelled += 1
        for key, its_label, its_index in zip(
            bank["embeddings"], bank["labels"].tolist(), bank["indices"].tolist(), strict=True
        ):
            if its_label == -1 or (index == its_index and index >= 0):
                continue
            if label == its_label:
                found = True
            else:
                negatives += 1
                hard += float(row @ key) > hard_above
        with_positive += found
    return hard / negatives, with_positive / labelled
