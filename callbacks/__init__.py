"""Lightning callbacks: the memory bank in training, its drift, the weights of pairs, and reports."""

from lightning_dml.callbacks.drift_monitor import DriftMonitor
from lightning_dml.callbacks.memory_bank import MemoryBankCallback
from lightning_dml.callbacks.reproducible_steps import ReproducibleSteps
from lightning_dml.callbacks.retrieval_report import RetrievalReport
from lightning_dml.callbacks.step_end_signals import StepEndSignals
from lightning_dml.callbacks.weight_curve_logger import WeightCurveLogger

__all__ = [
    "DriftMonitor",
    "MemoryBankCallback",
    "ReproducibleSteps",
    "RetrievalReport",
    "StepEndSignals",
    "WeightCurveLogger",
]
