"""A bank's state: into other sizes and policies, through files, and over one, two and three processes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dml import MemoryBank
from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile
from lightning_dml.memory import slots
from tests.helpers import run_ranks
from tests.memory.cases import batch, random_bank


def assert_same_state(ours: dict[str, Any], right: dict[str, Any]) -> None:
    """Compares name by name, dtypes included."""
    assert ours.keys() == right.keys()
    for name, value in right.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
        else:
            assert ours[name] == value, name


def test_states_from_before_policies_load() -> None:
    """Checkpoints of the release before must go on resuming; these are its keys."""
    rows, labels, indices = batch(0, 3)
    old = {
        "size": 3,
        "dim": 2,
        "pointer": 1,
        "embeddings": rows,
        "labels": labels,
        "indices": indices,
        "steps": torch.tensor([9, 7, 8]),
        "refused": torch.tensor(5),
    }
    bank = MemoryBank.from_state_dict(old)
    assert bank.policy == "queue" and int(bank.refused) == 5
    assert_same_state(bank.state_dict(), old)
    bank.enqueue(*batch(10, 1))
    assert bank.indices.tolist() == [0, 10, 2]


def test_a_queue_goes_into_samples_by_index() -> None:
    """A change of the policy keeps the rows: the newest one of each sample that has a slot."""
    queue = MemoryBank(6, 2)
    rows = torch.tensor([[value, 1.0] for value in range(9)])
    indices = torch.tensor([0, 1, 2, 4, -1, 1, 3, 9, 4])  # 0, 1 and 2 give way to the last three; 9 has no slot
    queue.enqueue(rows[:6], torch.arange(6), indices[:6], step=1)
    queue.enqueue(rows[6:], torch.tensor([6, 7, 8]), indices[6:], step=2)
    queue.enqueue(torch.tensor([[torch.nan, 1.0]]), torch.tensor([5]), torch.tensor([3]))  # refused: has no index
    for share in ((0, 1), (0, 2), (1, 2)):
        bank = MemoryBank(5, 2, policy="samples", average=0.5, share=share)
        bank.load_state_dict(queue.state_dict())
        whole = {"labels": [-1, 5, -1, 6, 8], "indices": [-1, 1, -1, 3, 4], "steps": [-1, 1, -1, 2, 2]}
        for name, values in whole.items():
            assert getattr(bank, name).tolist() == values[share[0] :: share[1]], name
        assert bank.embeddings[:, 0].tolist() == [0, 5, 0, 6, 8][share[0] :: share[1]]


def test_samples_go_into_a_queue_by_their_steps() -> None:
    """The queue must overwrite the oldest rows first; rows of unknown age are the oldest."""
    bank = MemoryBank(6, 2, policy="samples")
    for index, step in ((3, 8), (0, 9), (5, 2), (2, None)):
        bank.enqueue(*batch(index, 1), step=step)
    queue = MemoryBank(3, 2)
    queue.load_state_dict(bank.state_dict())
    assert queue.indices.tolist() == [5, 3, 0] and queue.labels.tolist() == [0, 3, 0]
    assert queue.embeddings[:, 0].tolist() == [5, 3, 0] and queue.steps.tolist() == [2, 8, 9]
    queue.enqueue(*batch(7, 1))
    assert queue.indices.tolist() == [7, 3, 0]
    longer = MemoryBank(5, 2)
    longer.load_state_dict(bank.state_dict())
    assert longer.indices.tolist() == [2, 5, 3, 0]
    longer.enqueue(*batch(7, 2))
    assert longer.indices.tolist() == [8, 5, 3, 0, 7]


@pytest.mark.parametrize("policy", ["queue", "samples"])
def test_loading_converts_the_rows(policy: str) -> None:
    """A float32 checkpoint resumed with a bfloat16 bank must stay a bfloat16 bank."""
    saved = random_bank(policy)
    bank = MemoryBank(60, 4, torch.bfloat16, policy=policy)
    bank.load_state_dict(saved.state_dict())
    assert bank.dtype == torch.bfloat16
    assert torch.equal(bank.embeddings, saved.embeddings.bfloat16())


@pytest.mark.parametrize("policy", ["queue", "samples"])
def test_a_state_is_a_copy(policy: str) -> None:
    """A checkpoint that is written in the background must not change with the next step."""
    bank = MemoryBank(4, 2, policy=policy)
    bank.enqueue(*batch(0, 3))
    state = bank.state_dict()
    bank.enqueue(*batch(1, 2))
    bank.transform(torch.ones(2), torch.ones(2))
    assert state["embeddings"][:3, 0].tolist() == [0, 1, 2] and state["labels"].tolist()[:3] == [0, 1, 2]
    assert state["labels"].untyped_storage().nbytes() == state["labels"].nbytes  # and no view of more


@pytest.mark.parametrize("options", [{}, {"policy": "samples", "average": 0.25}, {"dtype": torch.bfloat16}])
def test_a_file_gives_the_bank_back(tmp_path: Path, options: dict[str, Any]) -> None:
    """A bank that was filled once, for hours perhaps, serves many runs."""
    bank = random_bank(**options)
    bank.save(tmp_path / "new" / "bank.pt")
    loaded = MemoryBank.load(str(tmp_path / "new" / "bank.pt"), device="cpu")
    assert (loaded.policy, loaded.average, loaded.dtype) == (bank.policy, bank.average, bank.dtype)
    assert_same_state(loaded.state_dict(), bank.state_dict())


@pytest.mark.parametrize("call", ["torch.save", "os.replace"])
def test_an_interrupted_save_leaves_the_older_file(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    """A failed save must not cost the bank that was there."""
    path, bank = tmp_path / "bank.pt", random_bank()
    bank.save(path)
    bank.reset()

    def half(content: object, target: Any) -> None:
        if call == "torch.save":
            target.write(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(UnwritableFile, match="no space left"):
        patch.setattr(call, half)
        bank.save(path)
    assert len(MemoryBank.load(path)) == 50
    assert [path.name for path in tmp_path.iterdir()] == ["bank.pt"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Torch reports a full disk as a wrong position in its archive, which tells the user nothing."""
    path, bank = tmp_path / "bank.pt", MemoryBank(5000, 16)
    bank.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    bank.enqueue(torch.ones(5000, 16), torch.zeros(5000, dtype=torch.int64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(UnwritableFile, match=r"bank.pt cannot be written \(File too large\): make room there"):
            bank.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(MemoryBank.load(path)) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_without_room_for_a_folder_is_named(tmp_path: Path) -> None:
    """A path below a file is a typing error that the user can put right."""
    (tmp_path / "banks").write_text("a file")
    with pytest.raises(UnwritableFile, match=r"banks/bank.pt cannot be written .*choose another place"):
        random_bank().save(tmp_path / "banks" / "bank.pt")


def test_equal_banks_make_equal_files(tmp_path: Path) -> None:
    """A file that differs at every save cannot be compared or deduplicated by its content."""
    for name in ("one.pt", "other.pt"):
        random_bank().save(tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def _cut_off(path: Path) -> None:
    random_bank().save(path)
    path.write_bytes(path.read_bytes()[:-200])


def _content(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        random_bank().save(path)
        content = torch.load(path, weights_only=True)
        torch.save({**content, **changes}, path)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "no memory bank file .*bank.pt"),
        (lambda path: path.mkdir(), "no memory bank file"),
        (lambda path: path.write_bytes(b""), "not a memory bank file"),
        (lambda path: path.write_bytes(bytes(range(256)) * 8), "not a memory bank file"),
        (_cut_off, "not a memory bank file, or was cut off"),
        (lambda path: torch.save([1, 2], path), "not a memory bank file"),
        (lambda path: torch.save({"state_dict": {}}, path), "not a memory bank file"),
        (_content(version=2), "version 2.*version 1"),
        (_content(labels=torch.zeros(3, dtype=torch.int64)), r"\(50, 4\) for 3 labels"),
        (lambda path: torch.save({"format": "lightning_dml.memory_bank", "version": 1}, path), "lacks size, dim"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, write: Callable[[Path], object], words: str) -> None:
    """The path of a model checkpoint, given by mistake, is named instead of a KeyError from deep inside."""
    write(tmp_path / "bank.pt")
    with pytest.raises(InputError, match=words):
        MemoryBank.load(tmp_path / "bank.pt")


def test_a_state_of_another_dimension_leaves_the_bank_as_it_was() -> None:
    """The rows that are there are worth more than an empty bank and an error."""
    bank = random_bank()
    with pytest.raises(InputError, match=r"3 columns.*4"):
        bank.load_state_dict(MemoryBank(2, 3).state_dict())
    assert len(bank) == 50


def test_a_share_alone_has_no_state_and_no_moments() -> None:
    """One rank's rows, taken for all of them, would resume a run with most of its bank missing."""
    bank = random_bank(share=(1, 2))
    with pytest.raises(InputError, match=r"share 1 of 2.*rank 0 of 1"):
        bank.state_dict()
    with pytest.raises(InputError, match="share 1 of 2"):
        bank.moments()


KINDS = {"queue": torch.float32, "samples": torch.bfloat16}


def _save_and_load(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Saves, in every rank, its share of each kind of bank, loads it again and maps it."""
    slots.BLOCK_BYTES = 64  # several blocks, of which the last is uneven
    results = {}
    for policy, dtype in KINDS.items():
        path = Path(folder) / f"{policy}.pt"
        if ranks == 3:
            random_bank(policy, dtype, share=(rank, ranks)).save(path)
            torch.distributed.barrier()
        bank = MemoryBank.load(path, share=(rank, ranks))
        results[policy] = [[moment.numpy() for moment in bank.moments()], bank.store.count, bank.state_dict()]
        bank.transform(torch.full((4,), 0.5), torch.tensor(0.25))
        results[policy].append(bank.state_dict())
    return results


@pytest.mark.slow
def test_three_ranks_save_what_any_number_loads(tmp_path: Path) -> None:
    """A job that comes back with fewer GPUs must go on with the whole bank, every row in its slot."""
    everything = {ranks: run_ranks(ranks, _save_and_load, str(tmp_path)) for ranks in (3, 2)}
    for policy, dtype in KINDS.items():
        whole = random_bank(policy, dtype)
        assert_same_state(MemoryBank.load(tmp_path / f"{policy}.pt").state_dict(), whole.state_dict())
        mapped = MemoryBank.from_state_dict(whole.state_dict())
        mapped.transform(torch.full((4,), 0.5), torch.tensor(0.25))
        for results in everything.values():
            for rank, (moments, count, state, state_mapped) in enumerate(result[policy] for result in results):
                np.testing.assert_allclose(moments, torch.stack(whole.moments()), rtol=1e-6)
                assert count == len(whole)
                if rank == 0:
                    assert_same_state(state, whole.state_dict())
                    assert_same_state(state_mapped, mapped.state_dict())
                    continue
                assert state["embeddings"].shape == (0, 4) and torch.equal(state["labels"], whole.labels)
                with pytest.raises(InputError, match="rank 0 has the whole state"):
                    MemoryBank.from_state_dict(state)
