"""Embedding memory: the bank and the momentum encoder that feeds it."""

from lightning_dml.memory.bank import MemoryBank
from lightning_dml.memory.momentum import MomentumEncoder

__all__ = ["MemoryBank", "MomentumEncoder"]
