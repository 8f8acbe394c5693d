"""200 steps of uneven batches on two and three real processes: one bank, that of one process, whole or in shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.fit_uneven import STEPS, fit
from tests.test_two_ranks import ROOT, TORCHRUN, assert_same, run

MOMENTUM = {"momentum": 0.9}
ONLINE = {"momentum": None, "loss": "ms"}  # sharded, rows of similarities are exchanged
SAMPLES = {"momentum": None, "policy": "samples", "average": 0.5, "adaptation": "moments"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "runs"),
    [(2, {"momentum": MOMENTUM, "samples": SAMPLES, "online": ONLINE}), (3, {"online": ONLINE})],
    ids=["2", "3"],
)
def test_ranks_keep_one_bank_through_uneven_batches(tmp_path: Path, ranks: int, runs: dict[str, Any]) -> None:
    """Every rank must hold the bank of one process, and a bank in shares must train the same weights."""
    both = runs | {f"{name}-sharded": {**settings, "sharded": True} for name, settings in runs.items()}
    run(
        *TORCHRUN[:-1],
        *(str(ranks), str(ROOT / "tests/scripts/fit_uneven.py"), str(tmp_path), json.dumps(both)),
        folder=tmp_path,
    )
    for name, settings in runs.items():
        fit(tmp_path / "alone.pt", settings, ranks, None)
        alone = torch.load(tmp_path / "alone.pt", weights_only=True)
        replicated, sharded = (
            [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            for kind in (name, f"{name}-sharded")
        )
        for each in replicated[1:]:
            assert_same(each["bank"], replicated[0]["bank"], tolerance=0)
        for each in (*replicated, *sharded):
            assert each["steps"] == STEPS
            assert_same(each["weights"], alone["weights"], tolerance=1e-6)
        for first in (replicated[0], sharded[0]):
            ours, right = first["bank"].pop("embeddings"), alone["bank"]["embeddings"]
            torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)
            assert_same(first["bank"], {part: alone["bank"][part] for part in first["bank"]}, tolerance=0)
