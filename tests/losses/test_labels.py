"""Which pairs there are, against two loops: any labels, any indices, any block."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.losses.labels import PairLabels

LABELS = st.sampled_from([-5, -2, -1, 0, 1, 2, 2**24, 2**24 + 1, 2**40])
INDICES = st.sampled_from([-7, -2, -1, 0, 1, 2, 2**24 + 1, 2**62])


def tensor(numbers: list[int]) -> Tensor:
    """The numbers as an int64 tensor."""
    return torch.tensor(numbers, dtype=torch.int64)


@given(data=st.data(), height=st.integers(1, 4), width=st.integers(1, 5))
def test_masks_equal_two_loops(data: st.DataObject, height: int, width: int) -> None:
    """A pair too many or too few trains something else; -1 is no label, and a sample is no pair of itself."""
    labels = data.draw(st.lists(LABELS, max_size=6))
    indices = data.draw(st.lists(INDICES, min_size=len(labels), max_size=len(labels)))
    before = data.draw(st.lists(st.tuples(LABELS, INDICES), max_size=4))
    own_column = len(before) if data.draw(st.booleans()) else None
    references = [*before, *zip(labels, indices, strict=True)] if own_column is not None else before
    with_indices = data.draw(st.booleans())
    pairs = PairLabels(
        tensor(labels),
        tensor([label for label, _ in references]),
        tensor(indices) if with_indices else None,
        tensor([index for _, index in references]) if with_indices else None,
        own_column,
    )
    positive = torch.zeros(len(labels), len(references), dtype=torch.bool)
    negative = positive.clone()
    for i, label in enumerate(labels):
        for j, (other, index) in enumerate(references):
            itself = own_column is not None and j == own_column + i
            copy = with_indices and indices[i] >= 0 and indices[i] == index
            if -1 not in (label, other) and not itself and not copy:
                (positive if label == other else negative)[i, j] = True
    for top in range(0, len(labels), height):
        for left in range(0, len(references), width):
            rows = slice(top, min(top + height, len(labels)))
            columns = slice(left, min(left + width, len(references)))
            ours = pairs.masks(rows, columns)
            assert torch.equal(ours[0], positive[rows, columns])
            assert torch.equal(ours[1], negative[rows, columns])


def test_narrow_types_count_as_well() -> None:
    """Data sets keep labels in a byte, where -1 would be 255."""
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        numbers = torch.tensor([1, 2, 1]).to(dtype)
        positive, negative = PairLabels(numbers, torch.tensor([1, 2])).masks(slice(0, 3), slice(0, 2))
        assert positive.tolist() == [[True, False], [False, True], [True, False]]
        assert torch.equal(negative, ~positive)
