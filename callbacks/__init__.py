"""Callbacks: the memory bank of a training, and reports."""

from lightning_dml.callbacks.memory_bank import MemoryBankCallback
from lightning_dml.callbacks.retrieval_report import RetrievalReport

__all__ = ["MemoryBankCallback", "RetrievalReport"]
