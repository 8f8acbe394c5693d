"""Whole trainings on two real processes against one process with the same global batches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, TORCHRUN, assert_same, run
from tests.scripts.fit_tiny import fit


@pytest.mark.slow
@pytest.mark.parametrize("momentum", ["-1", "0.9"])
def test_two_ranks_train_as_one(tmp_path: Path, momentum: str) -> None:
    """Two GPUs must give the model of one: weights, bank and metrics, and the same on both."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    fit(one, None if momentum == "-1" else float(momentum), ranks=1)
    run(*TORCHRUN, str(ROOT / "tests/scripts/fit_tiny.py"), str(two), momentum, folder=tmp_path)
    alone = torch.load(one / "rank0.pt")
    ranks = [torch.load(two / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["steps"] == alone["steps"] == 12
    assert_same(ranks[0]["bank"], ranks[1]["bank"], tolerance=0)
    assert_same(ranks[0]["metrics"], ranks[1]["metrics"], tolerance=0)
    assert ranks[0]["best"] == ranks[1]["best"]
    assert_same(ranks[0]["weights"], ranks[1]["weights"], tolerance=0)

    assert_same(ranks[0]["weights"], alone["weights"], tolerance=1e-6)
    for part in ("labels", "indices", "steps", "pointer"):
        assert_same({part: ranks[0]["bank"][part]}, {part: alone["bank"][part]}, tolerance=0)
    torch.testing.assert_close(ranks[0]["bank"]["embeddings"], alone["bank"]["embeddings"], rtol=0, atol=1e-6)
    evaluated = {name: value for name, value in alone["metrics"].items() if name.startswith("val/")}
    assert len(evaluated) >= 5
    assert_same({name: ranks[0]["metrics"][name] for name in evaluated}, evaluated, tolerance=0)


SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "3")
TWO = ("--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_the_quickstart_runs_on_two_processes(tmp_path: Path, launcher: str) -> None:
    """Both usual launchers work, and the report comes once, not once per rank."""
    command = [Path(sys.executable).with_name("lightning-dml")] if launcher == "lightning" else [*TORCHRUN, "-m"]
    command = [str(part) for part in command] + ([] if launcher == "lightning" else ["lightning_dml"])
    config = str(ROOT / "configs/quickstart.yaml")
    printed = run(*command, "fit", "--config", config, *SHORT, *TWO, folder=tmp_path)
    assert printed.count("untrained") == 1
    assert printed.count("retrieval.png") == 1
    assert list(tmp_path.glob("runs/quickstart/version_0/checkpoints/best.ckpt"))
