"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.helpers import ROOT

PATH = ROOT / "examples/subclass.py"


def test_a_foreign_module_uses_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback promises to work with any LightningModule; this is the proof that people read."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("subclass", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=3)
    assert trainer.global_step == 150
    assert len(trainer.lightning_module.memory_bank) == 2048
    assert 0.05 < float(trainer.callback_metrics["val/recall@1"]) <= 1


def test_it_is_short() -> None:
    """An example that does not fit a screen is not read."""
    assert len(PATH.read_text().splitlines()) < 60
