"""The feed of a memory bank in a training: gathers the keys of all ranks, adapts the bank to them and writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.checks import check_choice, check_count, check_number
from lightning_dml.errors import InputError
from lightning_dml.memory.adaptation import MomentAdaptation
from lightning_dml.memory.bank import MemoryBank
from lightning_dml.memory.momentum import check_momentum
from lightning_dml.memory.slots import DTYPES, check_batch, check_policy


@dataclass(frozen=True)
class BankSchedule:
    """The weight of the bank and the momentum of its encoder over the optimizer steps.

    Attributes:
        start_step: step at which the bank starts.
        weight: factor of the loss against the bank after the warm-up.
        warmup_steps: length of the linear rise of the weight from 0.
        momentum: coefficient of the momentum encoder at `start_step`; None without one.
        momentum_end: coefficient at the last step; None keeps it.

    Raises:
        InputError: for a value out of range.
    """

    start_step: int
    weight: float
    warmup_steps: int
    momentum: float | None
    momentum_end: float | None

    def __post_init__(self) -> None:
        check_count("start_step", self.start_step, 0)
        check_count("warmup_steps", self.warmup_steps, 0)
        check_number("weight", self.weight, least=0, hint="0 leaves the bank out of the loss")
        momentum, end = self.momentum, self.momentum_end
        if momentum is not None:
            check_momentum(momentum, hint="None takes online keys")
        if end is not None and (momentum is None or not momentum <= end <= 1):
            raise InputError(f"momentum_end must lie between momentum and 1, got {end} with momentum={momentum}")

    def weight_at(self, step: int) -> float:
        """Factor of the loss against the bank."""
        if step < self.start_step:
            return 0.0
        risen = (step - self.start_step) / self.warmup_steps if self.warmup_steps else 1.0
        return self.weight * min(1.0, risen)

    def momentum_at(self, step: int, last_step: float) -> float:
        """Coefficient of the momentum encoder's move after `step`."""
        assert self.momentum is not None
        if self.momentum_end is None:
            return self.momentum
        done = min(1.0, max(0.0, (step - self.start_step) / max(1.0, last_step - self.start_step)))
        return self.momentum_end - (self.momentum_end - self.momentum) * (math.cos(math.pi * done) + 1) / 2


class BankFeed:
    """A memory bank that is made when its first rows come and that every rank writes alike.

    Args:
        dtype: name of the dtype of the stored embeddings.
        policy: `queue` or `samples`.
        average: coefficient of a sample's moving average in its slot.
        adaptation: `moments` or `kalman` keeps stored rows at the moments of those that come; None leaves them.
        sharded: keep on each rank its share only.

    Attributes:
        bank: the bank; None before its first rows.
        entries: slots of a bank that is yet to be made.

    Raises:
        InputError: for an unknown name, or an average out of range or without slots of the samples' own.
    """

    def __init__(self, dtype: str, policy: str, average: float, adaptation: str | None, sharded: bool) -> None:
        check_choice("memory dtype", dtype, tuple(DTYPES))
        check_policy(policy, average)
        check_choice("adaptation", adaptation, (None, "moments", "kalman"))
        self.dtype = DTYPES[dtype]
        self.policy = policy
        self.average = average
        self.adaptation = None if adaptation is None else MomentAdaptation(kalman=adaptation == "kalman")
        self.sharded = sharded
        self.bank: MemoryBank | None = None
        self.entries = 0
        self._saved: dict[str, Any] | None = None

    def write(
        self,
        keys: Tensor,
        labels: Tensor,
        indices: Tensor,
        step: int,
        mask: Tensor | None = None,
        gathered: bool = False,
    ) -> None:
        """Adapts the stored rows to the keys of all ranks and writes these.

        Args:
            keys: (n, D) float keys of this rank.
            labels: (n,) integer labels.
            indices: (n,) integer sample indices.
            step: the optimizer step.
            mask: (n,) bool; rows where it is False stay out.
            gathered: True where every rank gives the same rows, those of all ranks.

        Raises:
            InputError: if a column does not fit the keys, or the bank holds rows of another dimension.
        """
        check_batch(None, keys, labels, indices, mask, names=("label", "index", "enqueue"))
        if mask is not None:
            keys, labels, indices = keys[mask], labels[mask], indices[mask]
        keys, identity = keys.to(self.dtype), torch.stack((labels.long(), indices.long()), dim=1)
        if not gathered:
            counts = distributed.row_counts(len(keys), keys.device)
            keys, identity = distributed.gather_rows(keys, counts), distributed.gather_rows(identity, counts)
        if self.bank is None:
            self.bank = self._make(keys.shape[1], keys.device)
        elif self.bank.dim != keys.shape[1]:
            raise InputError(
                f"the memory bank that was loaded has {self.bank.dim} columns and the keys have {keys.shape[1]}: start "
                "without that checkpoint or bank_file, or with the embedder that made it"
            )
        if self.adaptation is not None:
            self.adaptation(self.bank, keys, identity[:, 0])
        self.bank.enqueue(keys, identity[:, 0], identity[:, 1], step)

    def start(self, entries: int, device: torch.device) -> None:
        """Sets the slots of the bank, now that they are known, and makes the one that was loaded.

        With another size or policy than before, the newest rows that fit are kept; of a bank in shares none.
        """
        self.entries = entries
        saved, self._saved = self._saved, None
        if saved is None and self.bank is not None and (self.bank.size, self.bank.policy) != (entries, self.policy):
            saved = None if self.sharded else self.bank.state_dict()
            self.bank = None
        if saved is not None:
            self.bank = self._make(int(saved["dim"]), device)
            self.bank.load_state_dict(saved)

    def clear(self) -> None:
        """Forgets the bank and the smoothed moments."""
        self.bank = self._saved = None
        if self.adaptation is not None:
            self.adaptation.reset()

    def state_dict(self) -> dict[str, Any]:
        """State of the bank and the adaptation; a collective where the bank is sharded."""
        return {
            # A bank that was loaded and not made yet: the fit that it was loaded for had ended already.
            "bank": self._saved if self.bank is None else self.bank.state_dict(),
            "adaptation": None if self.adaptation is None else self.adaptation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state; `start` makes its bank."""
        self.clear()
        self._saved = state["bank"]
        if self.adaptation is not None and state.get("adaptation") is not None:
            self.adaptation.load_state_dict(state["adaptation"])

    def _make(self, dim: int, device: torch.device) -> MemoryBank:
        share = (distributed.rank(), distributed.world_size()) if self.sharded else (0, 1)
        return MemoryBank(self.entries, dim, self.dtype, device, self.policy, self.average, share)
