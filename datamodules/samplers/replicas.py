"""Ranks that a sampler draws for: those of its arguments, or those of the process group."""

from __future__ import annotations

from lightning_dml import distributed
from lightning_dml.checks import check_count


def check_replicas(num_replicas: int | None, rank: int | None) -> None:
    """Checks a number of ranks and a rank that a user may give; None means the process group's.

    Raises:
        InputError: for either out of range.
    """
    if num_replicas is not None:
        check_count("num_replicas", num_replicas, hint="None takes the process group's")
    if rank is not None:
        most = None if num_replicas is None else num_replicas - 1
        check_count("rank", rank, 0, most, hint="it counts from 0 and is less than num_replicas")


def replicas_now(num_replicas: int | None) -> int:
    """The number of ranks, W, at the time of the call."""
    return distributed.world_size() if num_replicas is None else num_replicas


def rank_now(rank: int | None) -> int:
    """The rank whose samples are drawn, at the time of the call."""
    return distributed.rank() if rank is None else rank
