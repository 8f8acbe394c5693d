"""Positive pairs, negative pairs and those that are neither, by labels and sample indices."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_dml.labels import UNLABELLED

_NOTHING = -2  # never equal to the index of an unnumbered reference, which is -1
_TABLE = 2**24  # largest label or index that a look-up table is made for


@dataclass(frozen=True)
class PairLabels:
    """Labels and sample indices, which decide what pairs are positive, negative or none.

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
    _same_label: _Matches = field(init=False, repr=False)
    _same_sample: _Matches | None = field(init=False, repr=False, default=None)
    _unlabelled: tuple[Tensor, Tensor] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        labelled = self.anchors != UNLABELLED, self.references != UNLABELLED
        # On an accelerator asking would be a synchronisation that costs more than the mask.
        if self.anchors.is_cuda or not (bool(labelled[0].all()) and bool(labelled[1].all())):
            object.__setattr__(self, "_unlabelled", (~labelled[0], ~labelled[1]))
        object.__setattr__(self, "_same_label", _Matches.of(_signed(self.anchors), _signed(self.references)))
        if self.anchor_indices is not None and self.ref_indices is not None:
            indices = _signed(self.anchor_indices)
            indices = indices.masked_fill(indices < 0, _NOTHING)
            references = _signed(self.ref_indices).clamp_min(-1)
            object.__setattr__(self, "_same_sample", _Matches.of(indices, references, ignored=_NOTHING))

    def masks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Positive and negative masks, (n, m) bool, of the block of anchors `rows` and references `columns`.

        A pair of a sample with itself (its own row, or any reference with the same sample index) is neither
        positive nor negative, and so is a pair with an unlabelled side.
        """
        positive = self._same_label.mask(rows, columns)
        negative = ~positive
        if self.own_column is not None:
            own = torch.arange(rows.start, rows.stop, device=positive.device)
            column = own + (self.own_column - columns.start)
            inside = (column >= 0) & (column < positive.shape[1])
            own, column = own[inside] - rows.start, column[inside]
            positive[own, column] = False
            negative[own, column] = False
        if self._same_sample is not None:
            self._same_sample.clear(rows, columns, positive, negative)
        if self._unlabelled is not None:
            anchors, references = self._unlabelled
            labelled = ~(anchors[rows, None] | references[columns])
            positive &= labelled
            negative &= labelled
        return positive, negative


@dataclass(frozen=True)
class _Matches:
    """Pairs of an anchor and a reference that have a value in common, such as a label.

    Few references match any anchor, and a look-up table finds those in one pass over the references; only they are
    then compared with each anchor. Without a table (on an accelerator, where it would need a synchronisation, or for
    very large values) all are.
    """

    anchors: Tensor
    references: Tensor
    columns: Tensor | None  # ascending; None means all

    @classmethod
    def of(cls, anchors: Tensor, references: Tensor, ignored: int = UNLABELLED) -> _Matches:
        """Prepares the matches; those of anchors with the value `ignored`, below 0, need not be found."""
        if anchors.device.type != "cpu" or not len(anchors) or not len(references):
            return cls(anchors, references, None)
        largest = int(anchors.max())
        if largest > _TABLE or bool(((anchors < 0) & (anchors != ignored)).any()):
            return cls(anchors, references, None)
        # The last entry stays False; values beyond the others look it up.
        table = torch.zeros(max(0, largest + 1) + 1, dtype=torch.bool)
        table[anchors[anchors >= 0].long()] = True
        last = len(table) - 1
        places = references.long()
        columns = table[places.masked_fill((places < 0) | (places > last), last)].nonzero()[:, 0]
        return cls(anchors, references, columns)

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """Mask (n, m), True where anchor and reference match."""
        if self.columns is None:
            return self.anchors[rows, None] == self.references[columns]
        hits = self._hits(columns)
        mask = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)
        return mask.index_copy_(1, hits - columns.start, self.anchors[rows, None] == self.references[hits])

    def clear(self, rows: slice, columns: slice, *masks: Tensor) -> None:
        """Makes each of the masks (n, m) False where anchor and reference match."""
        if self.columns is None:
            differs = self.anchors[rows, None] != self.references[columns]
            for mask in masks:
                mask &= differs
            return
        hits = self._hits(columns)
        row, place = (self.anchors[rows, None] == self.references[hits]).nonzero(as_tuple=True)
        for mask in masks:
            mask[row, hits[place] - columns.start] = False

    def _hits(self, columns: slice) -> Tensor:
        assert self.columns is not None
        bounds = torch.tensor([columns.start, columns.stop])
        first, last = torch.searchsorted(self.columns, bounds).tolist()
        return self.columns[first:last]


def _signed(numbers: Tensor) -> Tensor:
    # torch compares few unsigned types, and not with signed ones.
    return numbers if numbers.dtype in (torch.int32, torch.int64) else numbers.long()
