"""Which pairs are positive, which negative, and which are none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNLABELLED = -1
"""Label of a row that takes part in no pair: an empty or refused slot of a memory bank."""


@dataclass(frozen=True)
class PairLabels:
    """What decides which pairs are positive, negative or none.

    Attributes:
        anchors: (N,) integer labels.
        references: (M,) integer labels.
        anchor_indices: (N,) integer sample indices, or None; negative where unknown.
        ref_indices: (M,) integer sample indices, or None; negative where unknown.
        own_column: column of the first anchor's own row where the references hold the anchors in order
            (in-batch), else None.
    """

    anchors: Tensor
    references: Tensor
    anchor_indices: Tensor | None = None
    ref_indices: Tensor | None = None
    own_column: int | None = None

    def masks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Positive and negative masks, (n, m) bool, of the block of anchors `rows` and references `columns`.

        A pair of a sample with itself (its own row, or any reference with the same sample index) is neither
        positive nor negative, and so is a pair with an unlabelled side.
        """
        anchors, references = self.anchors[rows, None], self.references[columns]
        positive = anchors == references
        negative = ~positive
        if self.own_column is not None:
            own = torch.arange(rows.start, rows.stop, device=anchors.device)
            column = own + (self.own_column - columns.start)
            inside = (column >= 0) & (column < len(references))
            own, column = own[inside] - rows.start, column[inside]
            positive[own, column] = False
            negative[own, column] = False
        if self.anchor_indices is not None and self.ref_indices is not None:
            indices = self.anchor_indices[rows, None]
            copies = (indices == self.ref_indices[columns]) & (indices >= 0)
            positive &= ~copies
            negative &= ~copies
        for labels in (anchors, references):
            # On an accelerator asking would be a synchronisation that costs more than the mask.
            if labels.is_cuda or bool((labels == UNLABELLED).any()):
                labelled = labels != UNLABELLED
                positive &= labelled
                negative &= labelled
        return positive, negative
