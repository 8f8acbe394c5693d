"""Batches and banks that several tests of the memory share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dml import MemoryBank


def batch(start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that carry their number, so that a mixed-up row shows."""
    values = torch.arange(start, start + count)
    return torch.stack((values, -values), dim=1).float(), values % 5, values


def random_bank(policy: str = "queue", dtype: torch.dtype = torch.float32, **options: Any) -> MemoryBank:
    """50 unit rows of 4 columns, of which two are refused and one has no label."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(50, 4, generator=generator) + 0.5, dim=1)
    labels = torch.arange(50) % 7
    rows[[3, 20], 1], labels[30] = torch.nan, -1
    bank = MemoryBank(60, 4, dtype, policy=policy, **options)
    bank.enqueue(rows, labels, torch.arange(50), step=4)
    return bank
