"""Seeds made of several numbers."""

from __future__ import annotations

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """A seed in [0, 2**63) made from numbers that are not negative; other numbers give another seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
