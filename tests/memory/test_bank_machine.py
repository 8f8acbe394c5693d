"""The bank against a Python deque and a dict, whole and spread over ranks, under any sequence of calls."""

from __future__ import annotations

import io
import math
from collections import deque
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_dml import MemoryBank

SIZE = 7
SHARES = [(rank, ranks) for ranks in (1, 2, 3) for rank in range(ranks)]
BOUNDS = settings(max_examples=40, stateful_step_count=20, deadline=None)
KINDS = st.sampled_from(["good", "good", "good", "nan", "masked", "unlabelled"])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Writes and reads a state, as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_shares_interleave(banks: list[MemoryBank]) -> None:
    """Every share's views are each ranks-th row of the first bank, which is whole."""
    whole = banks[0]
    for bank in banks:
        rank, ranks = bank.share
        assert (bank.store.count, bank.size, len(bank)) == (len(whole), whole.size, len(whole.labels[rank::ranks]))
        for name in ("embeddings", "labels", "indices", "steps"):
            assert torch.equal(getattr(bank, name), getattr(whole, name)[rank::ranks]), (bank.share, name)
        assert int(bank.store.labelled) == int((whole.labels != -1).sum())
        assert int(bank.refused) == int(whole.refused)


class QueueMachine(RuleBasedStateMachine):
    """Does to banks and to a deque of (number, label, index, step) the same things; rows are (number, -number)."""

    def __init__(self) -> None:
        super().__init__()
        self.banks = [MemoryBank(SIZE, 2, share=share) for share in SHARES]
        self.model: deque[tuple[int, int, int, int]] = deque(maxlen=SIZE)
        self.refused = 0
        self.next = 0

    @rule(kinds=st.lists(KINDS, max_size=3 * SIZE), step=st.none() | st.integers(0, 100))
    def enqueue(self, kinds: list[str], step: int | None) -> None:
        """Adds more rows than fit, too: the ring wraps around within one call."""
        numbers = torch.arange(self.next, self.next + len(kinds))
        self.next += len(kinds)
        rows, labels = torch.stack((numbers, -numbers), dim=1).float(), numbers % 5
        rows[[kind == "nan" for kind in kinds], 0] = torch.nan
        labels[[kind == "unlabelled" for kind in kinds]] = -1
        mask = torch.tensor([kind != "masked" for kind in kinds], dtype=torch.bool)
        for bank in self.banks:
            bank.enqueue(rows, labels, numbers, step, mask=None if mask.all() else mask)
        entries = [
            (0, -1, -1, -1 if step is None else step)
            if kind == "nan"
            else (number, label, number, -1 if step is None else step)
            for number, label, kind in zip(numbers.tolist(), labels.tolist(), kinds, strict=True)
            if kind != "masked"
        ]
        self.model.extend(entries)
        came = [kind for kind in kinds if kind != "masked"]
        self.refused += came[-self.banks[0].size :].count("nan")

    @rule()
    def reset(self) -> None:
        """Empties all."""
        for bank in self.banks:
            bank.reset()
        self.model.clear()
        self.refused = 0

    @rule(size=st.just(None) | st.integers(1, 2 * SIZE))
    def load(self, size: int | None) -> None:
        """Resuming, with another size too, must keep the newest keys and go on overwriting the oldest."""
        state = through_a_file(self.banks[0].state_dict())
        self.banks = [MemoryBank(size or self.banks[0].size, 2, share=share) for share in SHARES]
        for bank in self.banks:
            bank.load_state_dict(state)
        self.model = deque(self.model, maxlen=self.banks[0].size)

    @invariant()
    def same_rows(self) -> None:
        """A label that belongs to another embedding would make false positives in the loss."""
        bank = self.banks[0]
        first = bank.state_dict()["pointer"] if len(bank) == bank.size else 0
        columns = (bank.embeddings[:, 0].long(), bank.labels, bank.indices, bank.steps)
        assert list(zip(*(column.roll(-first).tolist() for column in columns), strict=True)) == list(self.model)
        assert torch.equal(bank.embeddings[:, 1], -bank.embeddings[:, 0])
        assert int(bank.refused) == self.refused

    @invariant()
    def shares_are_the_whole(self) -> None:
        """Ranks whose shares differ from the one bank would train on other references than one process."""
        assert_shares_interleave(self.banks)


QueueMachine.TestCase.settings = BOUNDS
TestQueueMachine = QueueMachine.TestCase


class SamplesMachine(RuleBasedStateMachine):
    """Does to banks and to a dict from index to (direction, label, step) the same things, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.average = 0.0
        self.size = SIZE
        self.banks: list[MemoryBank] = []
        self.model: dict[int, tuple[tuple[float, float], int, int]] = {}
        self.written = False
        self.refused = 0

    def new_banks(self) -> list[MemoryBank]:
        """Empty banks of the present size, whole and shares."""
        return [
            MemoryBank(self.size, 2, torch.float64, policy="samples", average=self.average, share=share)
            for share in SHARES
        ]

    @initialize(average=st.sampled_from([0.0, 0.5, 0.9]))
    def begin(self, average: float) -> None:
        """Half and half makes sums of opposite rows that have no direction."""
        self.average = average
        self.banks = self.new_banks()

    @rule(
        rows=st.lists(st.tuples(st.integers(0, 2 * SIZE), st.integers(0, 7), st.integers(-5, 3), KINDS), max_size=12),
        step=st.none() | st.integers(0, 100),
    )
    def enqueue(self, rows: list[tuple[int, int, int, str]], step: int | None) -> None:
        """Brings several rows of a sample in one batch, too."""
        indices = [index % self.size for index, *_ in rows]
        directions = [(math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)) for _, turn, _, _ in rows]
        labels = [-1 if kind == "unlabelled" else label for _, _, label, kind in rows]
        kinds = [kind for *_, kind in rows]
        embeddings = torch.tensor(directions, dtype=torch.float64).reshape(-1, 2)
        embeddings[[kind == "nan" for kind in kinds], 1] = torch.inf
        mask = torch.tensor([kind != "masked" for kind in kinds], dtype=torch.bool)
        for bank in self.banks:
            columns = (torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64))
            bank.enqueue(embeddings, *columns, step, None if mask.all() else mask)
        before = dict(self.model)
        for index, direction, label, kind in zip(indices, directions, labels, kinds, strict=True):
            if kind == "masked" or label == -1:
                continue
            if kind == "nan":
                self.refused += 1
                continue
            moved = self.moved(before[index][0], direction) if index in before else direction
            self.model[index] = (moved, label, -1 if step is None else step)
        self.written |= bool(rows)

    def moved(self, old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
        """The moving average in plain arithmetic; with average 0 it is the new row."""
        x, y = (self.average * v + (1 - self.average) * f for v, f in zip(old, new, strict=True))
        length = math.hypot(x, y)
        return (x / length, y / length) if length > 1e-6 else new

    @rule()
    def reset(self) -> None:
        """Empties all."""
        for bank in self.banks:
            bank.reset()
        self.model, self.written, self.refused = {}, False, 0

    @rule(size=st.just(None) | st.integers(1, 2 * SIZE))
    def load(self, size: int | None) -> None:
        """Resuming with another size keeps the samples that have a slot."""
        state = through_a_file(self.banks[0].state_dict())
        self.size = size or self.size
        self.banks = self.new_banks()
        for bank in self.banks:
            bank.load_state_dict(state)
        self.model = {index: entry for index, entry in self.model.items() if index < self.size}
        self.written = bool(self.model)

    @invariant()
    def same_rows(self) -> None:
        """A sample in another's slot would be taken for the anchor itself, and left out or counted wrongly."""
        if not self.banks:
            return
        bank = self.banks[0]
        assert len(bank) == (self.size if self.written else 0)
        for slot in range(len(bank)):
            direction, label, step = self.model.get(slot, (None, -1, -1))
            assert (int(bank.labels[slot]), int(bank.steps[slot])) == (label, step)
            assert int(bank.indices[slot]) == (slot if direction else -1)
            if direction:
                torch.testing.assert_close(bank.embeddings[slot].tolist(), list(direction), rtol=0, atol=1e-6)
        assert int(bank.store.labelled) == len(self.model)
        assert int(bank.refused) == self.refused

    @invariant()
    def shares_are_the_whole(self) -> None:
        """Ranks whose shares differ from the one bank would train on other references than one process."""
        if self.banks:
            assert_shares_interleave(self.banks)


SamplesMachine.TestCase.settings = BOUNDS
TestSamplesMachine = SamplesMachine.TestCase
