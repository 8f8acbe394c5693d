"""The names that the library promises: every one imports, and has a docstring that was written for it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

MODULES = [
    "lightning_dml",
    "lightning_dml.losses",
    "lightning_dml.memory",
    "lightning_dml.modules",
    "lightning_dml.retrieval",
    "lightning_dml.callbacks",
    "lightning_dml.datamodules",
    "lightning_dml.report",
]

SHIPPED = {
    "lightning_dml": ["Embedder", "MetricLearningModule", "MemoryBank", "RetrievalMetrics", "__version__"],
    "lightning_dml.losses": [
        "BinomialDevianceLoss",
        "CircleLoss",
        "Context",
        "ContrastiveLoss",
        "DirectWeightingLoss",
        "FastAPLoss",
        "FromLoss",
        "GeneralPairWeightingLoss",
        "LiftedStructureLoss",
        "MarginLoss",
        "MultiSimilarityLoss",
        "NCALoss",
        "NPairLoss",
        "NTXentLoss",
        "PairWeightingLoss",
        "RankedListLoss",
        "SupConLoss",
        "TripletLoss",
        "TupletMarginLoss",
        "context_free",
        "observed_weights",
        "pair_weights",
        "weight_curve",
    ],
    "lightning_dml.losses.curves": [
        "Constant",
        "Step",
        "Linear",
        "Power",
        "Exponential",
        "Sigmoid",
        "PiecewiseLinear",
    ],
    "lightning_dml.memory": ["MemoryBank", "MomentAdaptation", "MomentumEncoder"],
    "lightning_dml.retrieval": [
        "ApproximateIndex",
        "DatabaseAugmentation",
        "KReciprocal",
        "PerClass",
        "QueryExpansion",
        "RetrievalMetrics",
        "RetrievalResult",
        "adjusted_mutual_information",
        "average_precision",
        "k_reciprocal_nearest",
        "knn",
        "map_at_r",
        "ndcg_at_k",
        "normalized_mutual_information",
        "precision_at_k",
        "r_precision",
        "recall_at_k",
        "reciprocal_rank",
    ],
    "lightning_dml.report": ["DrawnCurve", "curve_figure", "save_curves", "save_training", "training_figure"],
    "lightning_dml.callbacks": [
        "DriftMonitor",
        "MemoryBankCallback",
        "ReproducibleSteps",
        "RetrievalReport",
        "StepEndSignals",
        "WeightCurveLogger",
    ],
    "lightning_dml.datamodules": [
        "CUB200DataModule",
        "Cars196DataModule",
        "FolderDataModule",
        "GlyphsDataModule",
        "INaturalistDataModule",
        "InShopDataModule",
        "PKBatchSampler",
        "SOPDataModule",
        "TableDataModule",
        "VehicleIDDataModule",
    ],
}


def documented(value: Any) -> bool:
    """True for a value with a docstring of its own: none inherited, none that a dataclass or a tuple made up."""
    if isinstance(value, str):
        return True  # a version or another constant, which cannot have one
    if not isinstance(value, ModuleType) and not inspect.isroutine(value) and not inspect.isclass(value):
        return bool(type(value).__doc__ != value.__doc__)
    text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    generated = inspect.isclass(value) and (dataclasses.is_dataclass(value) or issubclass(value, tuple))
    return bool(text.strip()) and not (generated and text.startswith(f"{value.__name__}("))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_importable_and_documented(name: str) -> None:
    """`__all__` holds no name that is absent, twice there or undocumented."""
    module = importlib.import_module(name)
    assert documented(module), f"{name} has no docstring"
    assert module.__all__, f"{name} exports nothing"
    assert len(set(module.__all__)) == len(module.__all__)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    assert [public for public in module.__all__ if not documented(getattr(module, public))] == []


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SHIPPED.items() for name in names])
def test_this_release_ships(module: str, name: str) -> None:
    """The names that the design fixes, as far as this release has them, are where it says."""
    home = importlib.import_module(module)
    assert documented(getattr(home, name))
    assert name in getattr(home, "__all__", [name])


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("lightning_dml", ["faiss", "pytorch_lightning", "timm", "torch"]),
        ("lightning_dml.losses", ["faiss", "pytorch_lightning", "timm"]),
        ("lightning_dml.memory", ["faiss", "pytorch_lightning", "timm"]),
        ("lightning_dml.retrieval", ["pytorch_lightning", "timm"]),
        ("lightning_dml.report", ["faiss", "pytorch_lightning", "timm"]),
    ],
)
def test_importing_a_lower_layer_loads_no_upper_library(module: str, unwanted: list[str]) -> None:
    """Somebody else's project that takes a loss from here does not load Lightning, timm or faiss with it."""
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_checker_tells_a_written_docstring_from_an_inherited_or_generated_one() -> None:
    """`documented` is no test if everything passes it."""

    class Written:
        """Has one."""

    class Inherited(Written):
        pass

    @dataclasses.dataclass
    class Generated:
        size: int

    def bare() -> None: ...

    assert documented(Written)
    assert not documented(Inherited)
    assert not documented(Generated)
    assert not documented(bare)
    assert not documented(ModuleType("bare"))
    assert not documented(3.0)
