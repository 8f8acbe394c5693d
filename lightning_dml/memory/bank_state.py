"""The state of a bank outside of it: the places of its rows in another bank, its file, and shares put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.files import replacing
from lightning_dml.labels import UNLABELLED
from lightning_dml.memory.slots import blocks, last_of_each, own_count

FORMAT = "lightning_dml.memory_bank"
VERSION = 1
KEYS = ("size", "dim", "pointer", "embeddings", "labels", "indices", "steps", "refused")


class Placement(NamedTuple):
    """Rows of a state with the slots of a bank that they go to, and where the bank stands afterwards.

    Attributes:
        rows: (n,) int64, rows of the state.
        slots: (n,) int64, the slot of each.
        used: slots in use.
        pointer: the slot that a queue writes next.
    """

    rows: Tensor
    slots: Tensor
    used: int
    pointer: int


def check_state(state: dict[str, Any], dim: int | None = None) -> None:
    """Raises InputError unless `state` is a whole bank's, of `dim` columns where given."""
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise InputError(
            f"the saved memory bank lacks {', '.join(missing)}: give what MemoryBank.state_dict() returned"
        )
    if dim is not None and state["dim"] != dim:
        raise InputError(
            f"the saved memory bank holds embeddings of {state['dim']} columns and this one of {dim}: "
            "load it with the embedder that made it, or start with an empty bank"
        )
    rows = len(state["labels"])
    if state["embeddings"].shape != (rows, state["dim"]) or not len(state["indices"]) == len(state["steps"]) == rows:
        raise InputError(
            f"the saved memory bank has embeddings of shape {tuple(state['embeddings'].shape)} for {rows} labels: of a "
            "bank that is spread over ranks, rank 0 has the whole state"
        )


def place(state: dict[str, Any], size: int, policy: str) -> Placement:
    """Slots for the rows of a state in a bank of `size` slots; states without a policy are those of queues."""
    labels, indices, steps = (state[name].cpu() for name in ("labels", "indices", "steps"))
    rows = torch.arange(len(labels))
    if state.get("policy", "queue") == "samples":
        rows = rows[labels != UNLABELLED]
        rows = rows[steps[rows].argsort(stable=True)]
    elif policy == "queue" and state["size"] == size:
        return Placement(rows, rows, len(rows), int(state["pointer"]))
    elif len(rows) == state["size"]:
        rows = rows.roll(-int(state["pointer"]))  # oldest first
    if policy == "queue":
        rows = rows[-size:]
        return Placement(rows, torch.arange(len(rows)), len(rows), len(rows) % size)
    rows = rows[(labels[rows] != UNLABELLED) & (indices[rows] >= 0) & (indices[rows] < size)]
    rows = rows[last_of_each(indices[rows])]
    return Placement(rows, indices[rows], size if len(rows) else 0, 0)


def check_ranks(share: tuple[int, int]) -> None:
    """Raises InputError unless this process is the rank of its share in a group of as many ranks."""
    here = (distributed.rank(), distributed.world_size())
    if share != here:
        raise InputError(
            f"the memory bank is share {share[0]} of {share[1]} and this process is rank {here[0]} of {here[1]}: what "
            "is known only to all shares together needs one process for each, with the process group up"
        )


def gather_shares(embeddings: Tensor, count: int, rank: int, ranks: int) -> Tensor:
    """Embeddings of all shares (count, dim) in the order of their slots, on the CPU of rank 0; (0, dim) elsewhere.

    Args:
        embeddings: (own rows, dim), those of slots rank, rank + ranks, ... below `count`.
        count: rows of all ranks together.
        rank: this process's rank.
        ranks: the number of ranks, all of which must call.
    """
    dim = embeddings.shape[1]
    whole = torch.empty((count if rank == 0 else 0, dim), dtype=embeddings.dtype)
    for block in blocks(own_count(count, 0, ranks), dim * embeddings.element_size()):  # rank 0 has the most rows
        part = embeddings.new_zeros((block.stop - block.start, dim))
        own = embeddings[block]
        part[: len(own)] = own
        sent = part.view(torch.uint8)  # bytes pass through every backend, whatever the dtype
        parts = [torch.empty_like(sent) for _ in range(ranks)] if rank == 0 else None
        dist.gather(sent, parts, dst=0)
        if parts is not None:
            rows = torch.stack([its_bytes.view(part.dtype) for its_bytes in parts], dim=1).flatten(0, 1)
            start = block.start * ranks
            whole[start : start + len(rows)] = rows[: count - start].cpu()
    return whole


def write_file(path: Path, state: dict[str, Any]) -> None:
    """Writes a state to a bank file, whole or not at all.

    Raises:
        UnwritableFile: if the system refuses to write.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    with replacing(path) as aside, open(aside, "wb") as file:
        try:
            # To a file and not to a path, whose name torch would write into it: equal banks make equal files.
            torch.save(content, file)
        except RuntimeError as error:
            # torch 2.14 covers the error of a full disk with one about positions in its archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_file(path: Path) -> dict[str, Any]:
    """The state in a bank file, on the CPU.

    Raises:
        InputError: if there is no file, or it is not a bank's, is damaged, or is of another version.
    """
    if not path.is_file():
        raise InputError(f"there is no memory bank file {path}; give one that MemoryBank.save wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes raise any error
        raise InputError(
            f"{path} is not a memory bank file, or was cut off ({type(error).__name__}); give one that MemoryBank.save "
            "wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a memory bank file; give one that MemoryBank.save wrote")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} is a memory bank file of version {content.get('version')}, and this release reads version "
            f"{VERSION}: install the release that wrote it, or fill a bank anew"
        )
    return {key: value for key, value in content.items() if key not in ("format", "version")}
