"""The ring buffer against a Python deque, and its state."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_dml import MemoryBank
from lightning_dml.errors import InputError

SIZE = 7


def batch(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that carry their number, so that a mixed-up row shows."""
    values = torch.arange(start, start + count)
    return torch.stack((values, -values), dim=1).float(), values % 5, values


class BankMachine(RuleBasedStateMachine):
    """Does to a bank and to a deque the same things."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = MemoryBank(SIZE, 2)
        self.model: deque[tuple[int, int, int]] = deque(maxlen=SIZE)
        self.next = 0

    @rule(count=st.integers(0, 3 * SIZE), step=st.integers(0, 100))
    def enqueue(self, count: int, step: int) -> None:
        """Adds more rows than fit, too: the ring wraps around within one call."""
        self.bank.enqueue(*batch(self.next, count), step=step)
        self.model.extend((value, value % 5, step) for value in range(self.next, self.next + count))
        self.next += count

    @rule()
    def reset(self) -> None:
        """Empties both."""
        self.bank.reset()
        self.model.clear()

    @rule()
    def save_and_load(self) -> None:
        """Goes through a file, as a checkpoint does."""
        file = io.BytesIO()
        torch.save(self.bank.state_dict(), file)
        file.seek(0)
        self.bank = MemoryBank(SIZE, 2)
        self.bank.load_state_dict(torch.load(file, weights_only=True))

    @precondition(lambda self: len(self.bank) > 0)
    @rule(size=st.integers(1, 2 * SIZE))
    def another_size_keeps_the_newest(self, size: int) -> None:
        """Resuming with another size must keep the newest keys and go on overwriting the oldest."""
        other = MemoryBank(size, 2)
        other.load_state_dict(self.bank.state_dict())
        assert sorted(other.indices.tolist()) == sorted(value for value, _, _ in list(self.model)[-size:])
        other.enqueue(*batch(10**6, 1))  # gives the oldest row's slot away
        kept = [value for value, _, _ in self.model][-size:]
        if len(kept) == size:
            kept = kept[1:]
        assert sorted(other.indices.tolist()) == sorted([*kept, 10**6])

    @invariant()
    def same_rows(self) -> None:
        """A label that belongs to another embedding would make false positives in the loss."""
        bank = self.bank
        rows = zip(bank.indices.tolist(), bank.labels.tolist(), bank.steps.tolist(), strict=True)
        assert sorted(rows) == sorted(self.model)
        assert len(bank) == len(self.model)
        assert torch.equal(bank.embeddings[:, 0], bank.indices.float())
        assert torch.equal(bank.embeddings[:, 1], -bank.indices.float())


BankMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBankMachine = BankMachine.TestCase


def test_views_share_the_storage() -> None:
    """A copy at each step would double the memory of a large bank."""
    bank = MemoryBank(4, 2)
    bank.enqueue(*batch(0, 2))
    assert bank.embeddings.data_ptr() == bank._store.embeddings.data_ptr()
    assert bank.embeddings.shape == (2, 2)


def test_label_zero_in_the_last_slot_is_full_all_the_same() -> None:
    """XBM's released code tells by that label whether the bank is full, and is wrong here."""
    bank = MemoryBank(2, 1)
    bank.enqueue(torch.ones(2, 1), torch.tensor([1, 0]))
    bank.enqueue(torch.ones(1, 1), torch.tensor([1]))
    assert len(bank) == 2


def test_what_is_enqueued_does_not_recast_the_bank() -> None:
    """A single half-precision batch must not lower the precision of all keys."""
    bank = MemoryBank(4, 2, dtype=torch.float32)
    bank.enqueue(torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([3], dtype=torch.int32))
    assert bank.embeddings.dtype == torch.float32 and bank.labels.dtype == torch.int64


def test_rows_that_are_not_finite_are_refused() -> None:
    """One NaN key would make every later loss NaN; it is kept as a row without label."""
    bank = MemoryBank(4, 2)
    rows = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.0, float("inf")]])
    bank.enqueue(rows, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    assert bank.labels.tolist() == [1, -1, -1]
    assert bank.indices.tolist() == [4, -1, -1]
    assert torch.isfinite(bank.embeddings).all()
    assert int(bank.refused) == 2


def test_gradients_do_not_enter() -> None:
    """Keys with a graph would keep all past activations in memory."""
    bank = MemoryBank(2, 2)
    bank.enqueue(torch.ones(1, 2, requires_grad=True) * 2, torch.tensor([0]))
    assert not bank.embeddings.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryBank(0, 2), "size.*0"),
        (lambda: MemoryBank(2, 0), "dim.*0"),
        (lambda: MemoryBank(2, 2, dtype=torch.int64), "dtype.*int64"),
        (lambda: MemoryBank(2, 2).enqueue(torch.ones(1, 3), torch.tensor([0])), r"\(n, 2\).*\(1, 3\)"),
        (lambda: MemoryBank(2, 2).enqueue(torch.ones(1, 2), torch.tensor([0.5])), "labels must be integers"),
        (lambda: MemoryBank(2, 2).enqueue(torch.ones(1, 2), torch.tensor([0, 1])), r"labels.*\(1,\).*\(2,\)"),
        (
            lambda: MemoryBank(2, 2).enqueue(torch.ones(1, 2), torch.tensor([0]), torch.tensor([0, 1])),
            r"indices.*\(1,\).*\(2,\)",
        ),
        (lambda: MemoryBank(2, 2).load_state_dict(MemoryBank(2, 3).state_dict()), "3 columns.*2"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """Keys of another dimension or count are refused before they overwrite good ones."""
    with pytest.raises(InputError, match=words):
        call()
