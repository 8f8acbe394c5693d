"""The bank's input and refusals, the cost of its writes, and its statistics; sequences are in test_bank_machine.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dml import MemoryBank
from lightning_dml.errors import InputError
from lightning_dml.memory import slots
from lightning_dml.memory.slot_store import SlotStore
from tests.memory.cases import batch, random_bank
from tests.tolerances import rounding


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `look` with the results of every tensor operation, as an interrupt might come between any two."""

    def __init__(self, look: Callable[[list[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, then looks."""
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, (list, tuple)) else [result]
        self.look([output for output in several if isinstance(output, Tensor)])
        return result


def largest_new_tensor(bank: MemoryBank, call: Callable[[], object]) -> int:
    """Bytes of the largest storage that `call` makes, the bank's own left out."""
    own = {column.untyped_storage().data_ptr() for column in (bank.embeddings, bank.labels, bank.indices, bank.steps)}
    sizes = [0]

    def look(results: list[Tensor]) -> None:
        storages = [result.untyped_storage() for result in results]
        sizes.extend(storage.nbytes() for storage in storages if storage.data_ptr() not in own)

    with Watch(look):
        call()
    return max(sizes)


@pytest.mark.parametrize("policy", ["queue", "samples"])
@pytest.mark.parametrize("share", [(0, 1), (1, 3)])
def test_a_write_costs_the_batch_and_not_the_bank(policy: str, share: tuple[int, int]) -> None:
    """A copy of a large bank at each step would double its memory and slow the training down."""
    average = 0.5 if policy == "samples" else 0.0
    bank = MemoryBank(10_000, 2, policy=policy, average=average, share=share)
    bank.enqueue(*batch(0, 9_990))
    before = bank.embeddings.data_ptr()
    assert largest_new_tensor(bank, lambda: bank.enqueue(*batch(9_970, 30))) <= 30 * 2 * 8
    assert bank.embeddings.data_ptr() == before == bank.store.embeddings.data_ptr()
    assert bank.labels.untyped_storage().data_ptr() == bank.store.labels.data_ptr()


@pytest.mark.parametrize("policy", ["queue", "samples"])
def test_a_write_does_not_wait_for_an_accelerator(policy: str) -> None:
    """A host that reads a value back at each step stalls the GPU; meta tensors have none to read."""
    for share in ((0, 1), (1, 3)):
        bank = MemoryBank(5, 2, device="meta", policy=policy, average=0.5 * (policy == "samples"), share=share)
        bank._trusted = True  # the first enqueue looks at the indices
        mask = torch.ones(4, dtype=torch.bool, device="meta") if policy == "samples" else None
        for _ in range(3):
            rows, labels, indices = (column.to("meta") for column in batch(0, 4))
            bank.enqueue(rows, labels, indices, step=1, mask=mask)
        bank.transform(torch.ones(2, device="meta"), torch.ones(2, device="meta"))
        assert bank.store.count == 5


@pytest.mark.parametrize("policy", ["queue", "samples"])
def test_an_interrupted_write_leaves_no_label_at_a_foreign_row(policy: str) -> None:
    """A checkpoint written in a signal handler may come between any two operations."""
    bank = MemoryBank(8, 2, policy=policy)
    bank.enqueue(*batch(0, 6))
    labelled_rows = []

    def look(results: list[Tensor]) -> None:
        used = bank.labels != -1
        assert torch.equal(bank.embeddings[used, 0].long(), bank.indices[used])
        assert torch.equal(bank.labels[used], bank.indices[used] % 5)
        labelled_rows.append(int(used.sum()))

    with Watch(look):
        bank.enqueue(*batch(6, 5) if policy == "queue" else batch(2, 4))
    assert min(labelled_rows) < 6  # it did look in the middle of the write


def test_label_zero_in_the_last_slot_is_full_all_the_same() -> None:
    """XBM's released code tells by that label whether the bank is full, and is wrong here."""
    bank = MemoryBank(2, 1)
    bank.enqueue(torch.ones(2, 1), torch.tensor([1, 0]))
    bank.enqueue(torch.ones(1, 1), torch.tensor([1]))
    assert len(bank) == 2


@pytest.mark.parametrize("policy", ["queue", "samples"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("enqueued", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_enqueued_does_not_recast_the_bank(policy: str, stored: torch.dtype, enqueued: torch.dtype) -> None:
    """A single half-precision batch must not lower the precision of all keys."""
    bank = MemoryBank(4, 2, dtype=stored, policy=policy, average=0.5 * (policy == "samples"))
    for _ in range(2):
        bank.enqueue(torch.eye(2, dtype=enqueued), torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 1]))
    assert bank.embeddings.dtype == stored and bank.labels.dtype == torch.int64
    assert torch.equal(bank.embeddings[:2], torch.eye(2, dtype=stored))


def test_rows_that_are_not_finite_are_refused() -> None:
    """One NaN key would make every later loss NaN; a queue keeps it as a row without label."""
    bank = MemoryBank(4, 2)
    rows = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.0, float("inf")]])
    bank.enqueue(rows, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    assert bank.labels.tolist() == [1, -1, -1]
    assert bank.indices.tolist() == [4, -1, -1]
    assert torch.isfinite(bank.embeddings).all()
    assert int(bank.refused) == 2 and int(bank.store.labelled) == 1


def test_what_overflows_the_stored_dtype_is_refused() -> None:
    """A finite float32 row may be infinite in float16, where the bank keeps it."""
    bank = MemoryBank(2, 1, dtype=torch.float16)
    bank.enqueue(torch.tensor([[1e6], [1.0]]), torch.tensor([1, 2]))
    assert bank.labels.tolist() == [-1, 2]


def test_gradients_do_not_enter() -> None:
    """Keys with a graph would keep all past activations in memory."""
    for policy in ("queue", "samples"):
        bank = MemoryBank(2, 2, policy=policy)
        bank.enqueue(torch.ones(1, 2, requires_grad=True) * 2, torch.tensor([0]), torch.tensor([1]))
        assert not bank.embeddings.requires_grad


@pytest.mark.parametrize("policy", ["queue", "samples"])
def test_an_empty_batch_changes_nothing(policy: str) -> None:
    """The last shard of an uneven epoch may be empty."""
    bank = MemoryBank(4, 2, policy=policy)
    bank.enqueue(*batch(0, 0))
    assert (len(bank), bank.store.count) == (0, 0) and bank.embeddings.shape == (0, 2)
    bank.enqueue(*batch(0, 3))
    before = bank.state_dict()
    bank.enqueue(*batch(0, 0), mask=torch.zeros(0, dtype=torch.bool))
    assert all(np.array_equal(before[name], value) for name, value in bank.state_dict().items())


def test_an_accelerator_refuses_foreign_indices_without_looking() -> None:
    """Raising would make the host wait at each step; writing would hit another sample's slot."""
    bank = MemoryBank(3, 2, policy="samples")
    bank._trusted = True  # as after the first enqueue on an accelerator
    rows, labels, _ = batch(1, 4)
    bank.enqueue(rows, labels, torch.tensor([-1, 2, 3, 10**12]), step=0)
    assert bank.labels.tolist() == [-1, -1, 2] and bank.indices.tolist() == [-1, -1, 2]
    assert int(bank.refused) == 3


def test_the_cpu_looks_at_every_batch() -> None:
    """The host need not wait there, so a wrong index shows at the batch that brought it."""
    bank = MemoryBank(3, 2, policy="samples")
    bank.enqueue(*batch(0, 3))
    with pytest.raises(InputError, match="got 3"):
        bank.enqueue(*batch(2, 2))
    assert bank.indices.tolist() == [0, 1, 2]


def test_no_two_rows_are_written_to_one_slot() -> None:
    """On a GPU such writes race, and runs of the same seed would differ; the spare slot gets equal values."""
    store = SlotStore(5, 2, torch.float32, None, share=(1, 2))
    own, at = store.own_slots(torch.tensor([1, 3, 1, 5, 0]), torch.tensor([False, True, True, False, True]))
    assert own.tolist() == [False, True, True, False, False] and at.tolist() == [2, 1, 0, 2, 2]


def test_rows_that_take_part_in_nothing_need_no_index() -> None:
    """A padded batch has label -1 and index -1 in its padding, and that is no error."""
    bank = MemoryBank(3, 2, policy="samples")
    rows = batch(1, 3)[0]
    bank.enqueue(rows, torch.tensor([1, -1, 3]), torch.tensor([0, -1, 9]), mask=torch.tensor([True, True, False]))
    assert bank.labels.tolist() == [1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_moving_average_is_formed_in_float32(dtype: torch.dtype) -> None:
    """In half precision three roundings a step, instead of one, would wander off from the average."""
    bank = MemoryBank(40, 8, dtype, policy="samples", average=0.9)
    old, new = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    for rows in (old, new):
        bank.enqueue(rows, torch.arange(40), torch.arange(40))
    expected = 0.9 * old.to(dtype).double().numpy() + 0.1 * new.double().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # One rounding to half precision: half a unit in the last place, and that of float32 in a chain of two products,
    # the eight squares of a length and a division, which may turn a number that lies between two the other way.
    # Three roundings to half precision would be off by three times as much in some of the 320 numbers.
    unit = torch.finfo(dtype).eps / 2
    right = torch.from_numpy(expected)
    bound = unit * right.abs() + torch.finfo(dtype).smallest_normal * unit + rounding(12)
    assert bool(((bank.embeddings.double() - right).abs() <= bound).all())


def test_the_weight_is_the_owners() -> None:
    """A schedule must not start anew because the bank was emptied, moved or loaded."""
    bank = MemoryBank(3, 2)
    assert bank.weight == 1.0
    bank.weight = 0.25
    bank.reset()
    bank.load_state_dict(MemoryBank(3, 2).state_dict())
    assert bank.to("cpu") is bank and bank.weight == 0.25
    assert "weight" not in bank.state_dict()


@pytest.mark.parametrize("policy", ["queue", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moments_are_those_of_the_labelled_rows(policy: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Empty and refused slots are zeros and would draw the mean towards the middle of the sphere."""
    monkeypatch.setattr(slots, "BLOCK_BYTES", 7 * 4 * 8)
    bank = random_bank(policy, dtype)
    rows = bank.embeddings[bank.labels != -1].double().numpy()
    assert len(rows) == 47
    mean, std = bank.moments()
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, rows.std(axis=0), rtol=1e-6)


def test_moments_of_an_empty_bank_are_zeros() -> None:
    """Adaptation may run before the first row came in, and NaN would spoil the bank."""
    mean, std = MemoryBank(3, 2).moments()
    assert mean.tolist() == std.tolist() == [0, 0]


@pytest.mark.parametrize("policy", ["queue", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_transform_is_the_map_of_each_labelled_row(policy: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """A row that the map forgets, or maps twice at a block's edge, is at odds with all others."""
    monkeypatch.setattr(slots, "BLOCK_BYTES", 7 * 4 * 8)
    bank = random_bank(policy, dtype)
    before, used = bank.embeddings.clone(), (bank.labels != -1).numpy()
    scale, shift = torch.tensor([2.0, 0.5, 1.0, -1.0]), torch.tensor([0.1, -0.2, 0.3, 0.0])
    bank.transform(scale, shift)
    expected = before.double().numpy() * scale.double().numpy() + shift.double().numpy()
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    expected /= lengths
    # A product and a sum of at most 2 + 0.3, whose rounding the division by a length enlarges, four squares, a root and
    # the division; a bank in float16 rounds the result once more. Both factors are given in float32.
    tolerance = rounding(8, 2.3 / lengths[used].min(), torch.promote_types(dtype, torch.float32))
    tolerance += torch.finfo(dtype).eps / 2 if dtype == torch.float16 else 0
    away = np.abs(bank.embeddings.double().numpy() - expected)[used]
    assert away.max() <= tolerance
    assert torch.equal(bank.embeddings[~used], before[~used])


def test_transform_keeps_rows_that_would_lose_their_direction() -> None:
    """A division by a length of zero would put NaN into the bank, past the check of what enters."""
    bank = MemoryBank(3, 2)
    bank.enqueue(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    bank.transform(torch.ones(2), torch.tensor([-1.0, 0.0]))
    assert bank.embeddings[0].tolist() == [1, 0]
    before = bank.embeddings.clone()
    bank.transform(torch.full((2,), torch.nan), torch.zeros(()))
    assert torch.equal(bank.embeddings, before)


def test_moments_and_transform_make_no_second_bank() -> None:
    """Both run at every step next to a bank that was made as large as the memory allows."""
    bank = MemoryBank(100_000, 32)
    bank.enqueue(torch.ones(100_000, 32), torch.zeros(100_000, dtype=torch.int64))
    assert bank.embeddings.nbytes > 12e6
    assert largest_new_tensor(bank, bank.moments) <= 4 * 2**20
    assert largest_new_tensor(bank, lambda: bank.transform(torch.ones(32), torch.ones(32))) <= 4 * 2**20


def test_the_summary_counts_what_is_there() -> None:
    """A user whose loss is zero looks here; refused rows must not be counted as rows."""
    bank = MemoryBank(8, 2)
    assert bank.summary(step=3) == {"filled": 0, "rows": 0, "classes": 0, "samples": 0, "refused": 0}
    rows, labels, indices = batch(0, 6)
    rows[1] = torch.nan
    bank.enqueue(rows, labels, indices, step=10)
    bank.enqueue(rows[:1], torch.tensor([-7]))  # any label but -1 is one; neither index nor step
    bank.enqueue(rows[2:3], labels[2:3], indices[2:3], step=16)
    counts = {"filled": 7 / 8, "rows": 7, "classes": 5, "samples": 5, "refused": 1}
    assert bank.summary() == counts
    assert bank.summary(20) == pytest.approx({**counts, "age_mean": (5 * 10 + 4) / 6, "age_max": 10})
    assert all(isinstance(value, float) for value in bank.summary(20).values())
    assert repr(bank) == "MemoryBank(size=8, dim=2, rows=8, dtype=torch.float32)"


def samples() -> MemoryBank:
    """A small bank of the other policy."""
    return MemoryBank(2, 2, policy="samples")


ONE = torch.ones(1, 2)
LABEL = torch.tensor([0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryBank(0, 2), "size.*0"),
        (lambda: MemoryBank(2, 0), "dim.*0"),
        (lambda: MemoryBank(2, 2, dtype=torch.int64), "dtype.*int64"),
        (lambda: MemoryBank(2, 2, policy="stack"), "policy.*queue, samples.*'stack'"),
        (lambda: MemoryBank(2, 2, policy="samples", average=1.0), "average.*less than 1.*1.0"),
        (lambda: MemoryBank(2, 2, policy="samples", average=float("nan")), "average.*nan"),
        (lambda: MemoryBank(2, 2, average=0.5), "average 0.5.*'samples'"),
        (lambda: MemoryBank(2, 2, share=(2, 2)), r"share.*\(2, 2\)"),
        (lambda: MemoryBank(2, 2, share=(-1, 2)), r"share.*\(-1, 2\)"),
        (lambda: MemoryBank(2, 2).enqueue(torch.ones(1, 3), LABEL), r"\(N, 2\).*\(1, 3\)"),
        (lambda: MemoryBank(2, 2).enqueue(ONE.long(), LABEL), "floating point.*int64"),
        (lambda: MemoryBank(2, 2).enqueue(ONE, torch.tensor([0.5])), "labels must be integers"),
        (lambda: MemoryBank(2, 2).enqueue(ONE, torch.tensor([0, 1])), r"labels.*\(1,\).*\(2,\)"),
        (lambda: MemoryBank(2, 2).enqueue(ONE, LABEL, torch.tensor([0, 1])), r"indices.*\(1,\).*\(2,\)"),
        (lambda: MemoryBank(2, 2).enqueue(ONE, LABEL, mask=LABEL), "mask must be bool, got torch.int64"),
        (lambda: MemoryBank(2, 2).enqueue(ONE, LABEL, mask=torch.ones(2).bool()), r"mask.*\(1,\).*\(2,\)"),
        (lambda: samples().enqueue(ONE, LABEL), "indices must be given.*'samples'"),
        (lambda: samples().enqueue(ONE, LABEL, torch.tensor([2])), r"indices.*\[0, 2\).*got 2"),
        (lambda: samples().enqueue(ONE, LABEL, torch.tensor([-1])), "got -1"),
        (lambda: samples().transform(torch.ones(3), torch.ones(2)), r"scale.*\(2,\).*\(3,\)"),
        (lambda: samples().transform(torch.ones(2), torch.ones(1)), r"shift.*\(2,\).*\(1,\)"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """Keys of another dimension or count are refused before they overwrite good ones."""
    with pytest.raises(InputError, match=words):
        call()
