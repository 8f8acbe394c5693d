"""The logger of pair weights on two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as others
from torch.utils.data import DataLoader

from lightning_dml.callbacks import WeightCurveLogger
from lightning_dml.losses import (
    ContrastiveLoss,
    MultiSimilarityLoss,
)
from tests.callbacks.logger_cases import fit
from tests.helpers import run_ranks
from tests.scripts.fit_uneven import UnevenBatches
from tests.tiny import TinyData, tiny_module


def on_ranks(rank: int, ranks: int, root: str) -> list[list[dict[str, float]]]:
    """The figures of a training on batches of uneven size, with a whole bank and with one in shares."""
    histories = []
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    data = TinyData()
    data.setup("fit")
    assert data.train_set is not None
    losses = [MultiSimilarityLoss(), ContrastiveLoss(0.3, reduction="pairs"), others.NTXentLoss()]
    for loss, sharded, figures in zip(losses, (True, False, False), (True, False, False), strict=True):
        logger = WeightCurveLogger(3, figure_every_n_steps=6, references=17, figures=figures)
        loader = DataLoader(data.train_set, batch_sampler=UnevenBatches(7, 2, None if ranks == 1 else rank))
        slow = tiny_module(loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5))
        fit(
            logger,
            slow,
            7,
            {"size": 31, "sharded": sharded},
            loader,
            precision="64-true",
            default_root_dir=root,
            **options,
        )
        histories.append(logger.history)
    return histories


@pytest.mark.slow
def test_two_ranks_see_what_one_process_sees(tmp_path: Path) -> None:
    """A figure that differs between ranks stops trainings that watch it; one that differs from one GPU's misleads."""
    alone = on_ranks(0, 1, str(tmp_path / "one"))
    first, second = run_ranks(2, on_ranks, str(tmp_path / "two"))
    assert first == second
    for ours, right in zip(first, alone, strict=True):
        assert [figures["step"] for figures in ours] == [figures["step"] for figures in right] == [3, 6]
        for figures, expected in zip(ours, right, strict=True):
            assert figures == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert expected["pairs/memory/negative_force"] > 0
        assert right[0]["pairs/batch/negative_force"] + right[1]["pairs/batch/negative_force"] > 0
    for name in ("one", "two"):
        stems = sorted(path.stem for path in (tmp_path / name).glob("weight_curves/*.png"))
        assert stems == ["over_time", "step_000006_batch", "step_000006_memory"]
    assert not list((tmp_path / "two").rglob("*.part"))
