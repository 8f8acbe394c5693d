"""Embedding memory: the bank, the momentum encoder that feeds it, and the adaptation that keeps it fresh."""

from lightning_dml.memory.adaptation import MomentAdaptation
from lightning_dml.memory.bank import MemoryBank
from lightning_dml.memory.momentum import MomentumEncoder

__all__ = ["MemoryBank", "MomentAdaptation", "MomentumEncoder"]
