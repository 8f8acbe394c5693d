"""Bounds of rounding: how far apart two ways to the same number may lie, whatever the processor.

Processors add in other orders (8 or 16 numbers at a time on x86, 4 on ARM), fuse a multiplication with an addition or
do not, and have other last digits of `exp` and `log`; so do other block sizes and numbers of threads on one processor.
Two results are equal to the last bit where the same instructions ran on the same numbers, and where no operation
rounds: `whole_rows` are data for that. Everywhere else a test states a bound, and takes it from here.

The derivation. With the unit roundoff u = eps / 2, a sum of n terms that is computed in floating point is off by at
most gamma_n sum |x_i| with gamma_n = n u / (1 - n u), in any order, with the products fused or not (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, sections 3.1 and 4.2). Two computed results lie apart by at most
twice that, which is nearly n eps sum |x_i|. Errors of stages that follow one another add up: gamma_m and then gamma_n
is at most gamma_(m + n). So `rounding` takes the longest chain of operations that a number goes through. The products
in the dot product of two unit rows have magnitudes that sum to at most 1 (Cauchy and Schwarz).

What follows for the tolerances that need no call: the default of `torch.testing.assert_close` in float32, 1e-5 at
magnitude 1, covers any chain of 80 operations, and 1e-9 in float64 any chain of a million.

A bound does not help at a step: a threshold of a miner, a tie of two neighbours, the nearest of two centroids. There
the data must keep away from the step by more than the bound, which `gap` measures.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(chain: int, magnitude: float | Tensor = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Bound on how far two computed results lie apart.

    Args:
        chain: the most operations, one after another, that a number goes through: of a sum its terms.
        magnitude: sum of the absolute values of the terms, or the largest such sum of a tensor of results.
        dtype: in which both were computed, or the coarser of the two.

    Examples:
        >>> rounding(128) < 1.6e-5 < rounding(128, 2.0)
        True
    """
    share = chain * torch.finfo(dtype).eps / 2
    assert share < 0.1, "a chain this long leaves no digit to compare"
    return 2 * share / (1 - share) * float(magnitude)


def largest(*tensors: Tensor) -> float:
    """The largest absolute value, at least 1: the scale of results that are made of similarities.

    Examples:
        >>> largest(torch.tensor([0.5, -3.0])), largest(torch.zeros(2))
        (3.0, 1.0)
    """
    return max(1.0, *(float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel()))


def gap(values: Tensor) -> float:
    """The least distance between two values of one row, which must exceed the bound where their order matters.

    Examples:
        >>> gap(torch.tensor([[0.0, 4.0, 1.0], [5.0, 9.0, 2.0]]))
        1.0
    """
    return float(values.double().sort(dim=-1).values.diff(dim=-1).abs().min())


def whole_rows(count: int, dim: int, most: int, seed: int = 0) -> Tensor:
    """Rows (count, dim) of whole numbers from -`most` to `most`, whose products no order of float32 rounds.

    Inner products, and squared distances as sums of products, are whole numbers of at most 4 dim most^2. Below 2^24
    float32 holds each of them, and each intermediate sum, exactly.
    """
    assert 4 * dim * most**2 < 2**24, "float32 would round the products of such rows"
    return torch.randint(-most, most + 1, (count, dim), generator=torch.Generator().manual_seed(seed)).float()
