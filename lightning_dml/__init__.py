"""Deep metric learning with embedding memory, for PyTorch Lightning."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dml.memory import MemoryBank
    from lightning_dml.modules import Embedder, MetricLearningModule
    from lightning_dml.retrieval import RetrievalMetrics

try:
    __version__ = version("lightning-dml")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Embedder", "MemoryBank", "MetricLearningModule", "RetrievalMetrics", "__version__"]

_HOMES = {
    "Embedder": "lightning_dml.modules",
    "MemoryBank": "lightning_dml.memory",
    "MetricLearningModule": "lightning_dml.modules",
    "RetrievalMetrics": "lightning_dml.retrieval",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import lightning_dml.losses` in somebody's code pulls in neither Lightning nor timm.
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_dml' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
