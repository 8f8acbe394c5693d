"""The study that the tests of workers and ledger run."""

from __future__ import annotations

from typing import Any

STUDY: dict[str, Any] = {
    "base": {"model.value": 0.5, "model.seconds": 0.05},
    "axes": {"model.value": [0.1, 0.2], "model.other": [0, 1]},
    "seeds": [0, 1],
    "metric": "val/recall@1",
}
POINTS = 2 * 2 * 2
