"""Steps of uneven batches on two and three real processes: one bank, that of one process, whole or in shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, TORCHRUN, assert_same, run
from tests.scripts.fit_uneven import STEPS, fit

MOMENTUM = {"momentum": 0.9}
LONG = {**MOMENTUM, "steps": 200}
ONLINE = {"momentum": None, "loss": "ms"}  # sharded, rows of similarities are exchanged
SAMPLES = {"momentum": None, "policy": "samples", "average": 0.5, "adaptation": "moments"}

End = dict[str, Any]


def on_ranks(folder: Path, ranks: int, runs: dict[str, Any]) -> dict[str, list[End]]:
    """The outcome on each rank of a torchrun, by run."""
    script = str(ROOT / "tests/scripts/fit_uneven.py")
    run(*TORCHRUN[:-1], str(ranks), script, str(folder), json.dumps(runs), folder=folder)
    return {name: [outcome(folder, name, rank) for rank in range(ranks)] for name in runs}


def alone(folder: Path, name: str, settings: dict[str, Any], parts: int) -> End:
    """The outcome in one process, which gets the batches of all ranks."""
    fit(folder, name, settings, parts, None)
    return outcome(folder, name, 0)


def outcome(folder: Path, name: str, rank: int) -> End:
    """The file that a process wrote."""
    end: End = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
    return end


def assert_same_bank(ours: dict[str, Any], right: dict[str, Any]) -> None:
    """The same rows in the same slots; embeddings but for rounding that the steps before have amplified."""
    ours, right = dict(ours), dict(right)
    torch.testing.assert_close(ours.pop("embeddings"), right.pop("embeddings"), rtol=0, atol=1e-6)
    assert_same(ours, right, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "runs"),
    [(2, {"momentum": LONG, "samples": SAMPLES, "online": ONLINE}), (3, {"online": ONLINE})],
    ids=["2", "3"],
)
def test_ranks_keep_one_bank_through_uneven_batches(tmp_path: Path, ranks: int, runs: dict[str, Any]) -> None:
    """Every rank must hold the bank of one process, and a bank in shares must train the same weights."""
    sharded = {f"{name}-sharded": {**settings, "sharded": True} for name, settings in runs.items()}
    ends = on_ranks(tmp_path, ranks, runs | sharded)
    for name, settings in runs.items():
        right = alone(tmp_path, "alone", settings, ranks)
        first, *others = ends[name]
        for end in others:
            assert_same(end["bank"], first["bank"], tolerance=0)
        for end in (*ends[name], *ends[f"{name}-sharded"]):
            assert end["steps"] == settings.get("steps", STEPS)
            assert_same(end["weights"], right["weights"], tolerance=1e-6)
        assert_same_bank(first["bank"], right["bank"])
        assert_same_bank(ends[f"{name}-sharded"][0]["bank"], right["bank"])


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """A cluster gives other machines after a requeue; bank and training must be those of a run that never stopped."""
    sharded = {**MOMENTUM, "sharded": True}
    alone(tmp_path, "one", MOMENTUM, 2)
    resumed = {**sharded, "epochs": 2, "resumed": "one"}
    ends = on_ranks(tmp_path, 2, {"two": sharded, "one-then-two": resumed})
    right = alone(tmp_path, "whole", {**MOMENTUM, "epochs": 2}, 2)
    two_then_one = alone(tmp_path, "two-then-one", {**sharded, "epochs": 2, "resumed": "two"}, 2)
    for end in (ends["one-then-two"][0], two_then_one):
        assert end["steps"] == 2 * STEPS
        assert_same(end["weights"], right["weights"], tolerance=1e-6)
        assert_same_bank(end["bank"], right["bank"])
