"""Work that is shared out over real processes: order, errors, and ranks that keep in step however long it takes."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dml.distributed import map_rows, on_first_rank
from tests.helpers import run_ranks

Numbers = list[Any]


def features(rows: Tensor) -> tuple[Tensor, ...]:
    """Results of every kind: of several dtypes and shapes, and a ragged one, row r having r % 3 values."""
    counts = rows % 3
    return (
        rows.double() / 7,
        torch.stack([rows, rows**2], dim=1),
        rows % 2 == 0,
        rows.to(torch.float16)[:, None, None],
        counts,
        rows.repeat_interleave(counts),
    )


def expected_features(count: int) -> Numbers:
    """The same by a loop over the rows."""
    return [
        [row / 7 for row in range(count)],
        [[row, row**2] for row in range(count)],
        [row % 2 == 0 for row in range(count)],
        [[[float(row)]] for row in range(count)],
        [row % 3 for row in range(count)],
        [row for row in range(count) for _ in range(row % 3)],
    ]


CASES = [(count, block) for count in (0, 1, 2, 3, 7, 10, 23) for block in (1, 2, 5, 100)]


def map_features(count: int, block: int) -> tuple[Numbers, Numbers, list[list[int]]]:
    """The results as lists, their kinds, and the rows that this rank worked on, block by block."""
    blocks: list[list[int]] = []

    def recording(rows: Tensor) -> tuple[Tensor, ...]:
        assert rows.dtype == torch.int64
        blocks.append(rows.tolist())
        return features(rows)

    results = map_rows(count, recording, block)
    kinds = [(str(result.dtype), str(result.device), result.ndim) for result in results]
    return [result.tolist() for result in results], kinds, blocks


def flat(parts: list[list[int]]) -> list[int]:
    """All numbers of all parts in order."""
    return [number for part in parts for number in part]


def on_rank(rank: int, ranks: int) -> list[Any]:
    """All cases in one process group, as starting the processes takes the longest."""
    return [map_features(count, block) for count, block in CASES]


KINDS = [(f"torch.{name}", "cpu", ndim) for name, ndim in (("float64", 1), ("int64", 2), ("bool", 1))]
KINDS += [("torch.float16", "cpu", 3), ("torch.int64", "cpu", 1), ("torch.int64", "cpu", 1)]


@pytest.mark.parametrize(("count", "block"), CASES)
def test_one_process_maps_all_rows_by_blocks(count: int, block: int) -> None:
    """A block limits the memory of one process as well."""
    results, kinds, blocks = map_features(count, block)
    assert results == expected_features(count) and kinds == KINDS
    assert flat(blocks) == list(range(count))
    assert max(map(len, blocks)) <= block and (len(blocks) == -(-count // block) or count == 0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_the_results_of_all_rows_in_their_order(ranks: int) -> None:
    """Values per query are matched with labels by position; a gap or a swap would not raise."""
    by_rank = run_ranks(ranks, on_rank)
    for number, (count, block) in enumerate(CASES):
        shares: list[list[int]] = []
        for results, kinds, blocks in (cases[number] for cases in by_rank):
            assert results == expected_features(count) and kinds == KINDS
            assert max(map(len, blocks)) <= block
            shares.append(flat(blocks))
        assert flat(shares) == list(range(count))  # contiguous shares, none worked on twice
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


class BrokenError(Exception):
    """The error that the tests raise."""


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The error of a call, and a sign that the ranks are still in step afterwards."""
    try:
        call()
    except Exception as error:
        raised = type(error).__name__, str(error)
    else:
        raised = "", ""
    total = torch.ones(())
    dist.all_reduce(total)
    assert int(total) == dist.get_world_size()
    return raised


def failing(culprits: list[int], at: int) -> Callable[[Tensor], tuple[Tensor]]:
    """A function that breaks on some ranks, on the block of that number."""
    blocks = iter(range(100))

    def function(rows: Tensor) -> tuple[Tensor]:
        if next(blocks) == at and dist.get_rank() in culprits:
            raise BrokenError(f"rows {rows.tolist()}")
        return (rows,)

    return function


def first_fails(at: int) -> Callable[[Callable[[], None]], Tensor]:
    """A function that breaks on the first rank after so many beats."""

    def function(beat: Callable[[], None]) -> Tensor:
        for _ in range(at):
            beat()
        raise BrokenError("no result")

    return function


def errors_on_rank(_rank: int, ranks: int) -> list[tuple[str, str]]:
    """Failures of one rank, of two, early and late, where a rank has no rows, and of the first rank alone."""
    last = ranks - 1
    return [
        outcome(lambda: map_rows(12, failing([last], 0), 2)),
        outcome(lambda: map_rows(12, failing([0], 1), 2)),
        outcome(lambda: map_rows(12, failing([0, last], 1), 2)),
        outcome(lambda: map_rows(1, failing([last], 0), 2)),
        outcome(lambda: on_first_rank(first_fails(0))),
        outcome(lambda: on_first_rank(first_fails(3))),
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_error_of_one_rank_ends_all(ranks: int) -> None:
    """Ranks that wait for one that has failed hang until the time-out, and then show an error that says nothing."""
    by_rank = run_ranks(ranks, errors_on_rank, timeout=20)
    last = ranks - 1
    half = 12 // ranks
    rows = {0: "rows [2, 3]", last: f"rows [{12 - half}, {13 - half}]"}

    def others(culprit: int) -> tuple[str, str]:
        return "RuntimeError", f"rank {culprit} failed at this point; its own error says why"

    for rank, raised in enumerate(by_rank):
        assert raised[0] == (("BrokenError", rows[last]) if rank == last else others(last))
        assert raised[1] == (("BrokenError", rows[0]) if rank == 0 else others(0))
        late = {0: rows[0], last: f"rows [{14 - half}, {15 - half}]"}
        assert raised[2] == (("BrokenError", late[rank]) if rank in late else others(0))
        assert raised[3] == (("BrokenError", "rows []") if rank == last else others(last))
        assert raised[4] == raised[5] == (("BrokenError", "no result") if rank == 0 else others(0))


def test_an_error_in_one_process_is_its_own() -> None:
    """Without a process group nothing stands between the error and who called."""

    def broken(_: Any) -> Any:
        raise BrokenError("here")

    with pytest.raises(BrokenError, match="here"):
        map_rows(3, broken, 2)
    with pytest.raises(BrokenError, match="here"):
        on_first_rank(broken)


TIMEOUT = 3.0
NAPS, NAP = 8, 0.7  # together nearly twice the time-out, each well within it


def slow_share(rank: int, _ranks: int) -> tuple[float, list[int], list[float], str]:
    """A share that is slow on rank 0 only, work of the first rank alone, and the error of a plain wait."""
    begun = time.monotonic()

    def slow(rows: Tensor) -> tuple[Tensor]:
        if rank == 0:
            time.sleep(NAP)
        return (rows,)

    (rows,) = map_rows(2 * NAPS, slow, 1)
    seconds = time.monotonic() - begun

    def first(beat: Callable[[], None]) -> Tensor:
        assert rank == 0
        for _ in range(NAPS):
            time.sleep(NAP)
            beat()
        return torch.tensor([0.25, 0.5], dtype=torch.float64)

    result = on_first_rank(first)
    assert result.dtype == torch.float64 and result.device.type == "cpu"

    # The same without meeting after each block: the other rank waits for the whole share in one collective. In a
    # group of its own, because it is of no use afterwards.
    plain: Any = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    begun = time.monotonic()
    if rank == 0:
        time.sleep(NAPS * NAP)
    try:
        dist.all_reduce(torch.ones(()), group=plain)
        message = ""
    except RuntimeError as error:
        message = str(error)
    time.sleep(max(0.0, NAPS * NAP + 0.5 - (time.monotonic() - begun)))
    return seconds, rows.tolist(), result.tolist(), message


@pytest.mark.slow
def test_a_share_may_take_longer_than_the_time_out() -> None:
    """The search of a large gallery takes longer on one rank than another waits for a collective."""
    by_rank = run_ranks(2, slow_share, timeout=TIMEOUT)
    for seconds, rows, result, _ in by_rank:
        assert seconds > TIMEOUT + 1
        assert rows == list(range(2 * NAPS)) and result == [0.25, 0.5]
    assert "timed out" in by_rank[1][3].lower(), by_rank[1][3]


def first_only(rank: int, _ranks: int) -> list[Numbers]:
    """Results of several kinds that rank 0 alone computes, with and without beats."""
    calls = []

    def function(beat: Callable[[], None], result: Tensor, beats: int) -> Tensor:
        calls.append(rank)
        for _ in range(beats):
            beat()
        return result

    kinds = [torch.arange(6).reshape(2, 3), torch.empty(0, 4), torch.tensor(2.5, dtype=torch.float64)]
    results = [on_first_rank(partial(function, result=kind, beats=beats)) for beats, kind in enumerate(kinds)]
    assert calls == ([0, 0, 0] if rank == 0 else [])
    return [[result.tolist(), str(result.dtype), list(result.shape)] for result in results]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_the_result_of_the_first(ranks: int) -> None:
    """K-means need not come out the same on two machines, and NMI must."""
    right = [
        [[[0, 1, 2], [3, 4, 5]], "torch.int64", [2, 3]],
        [[], "torch.float32", [0, 4]],
        [2.5, "torch.float64", []],
    ]
    by_rank = run_ranks(ranks, first_only) if ranks > 1 else [first_only(0, 1)]
    assert by_rank == [right] * ranks
