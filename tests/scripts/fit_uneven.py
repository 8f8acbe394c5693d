"""Steps on batches whose size differs from rank to rank and from step to step; each rank writes how it ended.

Called as `fit_uneven.py FOLDER RUNS` on as many ranks as torchrun started: RUNS is JSON, settings of the callback and
of `fit` by name of the run. One launch makes them all, as starting the processes takes longer than the training.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss
from tests.tiny import QUIET, TinyData, tiny_module

STEPS = 60  # several times around a bank of 97


class UnevenBatches:
    """The same samples for every way of cutting: `parts` batches of one to six per step, one of them or all."""

    def __init__(self, steps: int, parts: int, part: int | None) -> None:
        self.steps = steps
        self.parts = parts
        self.part = part

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the samples of the chosen part of each step, of all parts where none is chosen."""
        generator = np.random.default_rng(0)
        for _ in range(self.steps):
            batches = [generator.integers(0, 60, generator.integers(1, 7)).tolist() for _ in range(self.parts)]
            yield list(chain.from_iterable(batches)) if self.part is None else batches[self.part]

    def __len__(self) -> int:
        """Steps."""
        return self.steps


def fit(folder: Path, name: str, settings: dict[str, Any], parts: int, part: int | None) -> None:
    """Fits on one part of every batch, or in one process on all parts; writes `NAME-RANK.pt` and `NAME.ckpt`."""
    torch.set_num_threads(1)
    settings = dict(settings)
    epochs, resumed, steps = settings.pop("epochs", 1), settings.pop("resumed", None), settings.pop("steps", STEPS)
    loss = MultiSimilarityLoss() if settings.pop("loss", "") == "ms" else ContrastiveLoss(0.3)
    # A small rate: hundreds of steps must not amplify what is rounding at the first, and weights still move by 1e-3.
    module = tiny_module(loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5))
    memory = MemoryBankCallback(size=97, **settings)
    data = TinyData()
    data.setup("fit")
    assert data.train_set is not None
    trainer = Trainer(
        max_epochs=epochs,
        limit_val_batches=0,
        precision="64-true",
        devices=1 if part is None else parts,
        strategy="auto" if part is None else "ddp",
        callbacks=[memory],
        **QUIET,
    )
    loader = DataLoader(data.train_set, batch_sampler=UnevenBatches(steps, parts, part))
    checkpoint = None if resumed is None else folder / f"{resumed}.ckpt"
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{name}.ckpt")  # of a bank in shares a collective
    torch.save(
        {
            "weights": {name: tensor.detach() for name, tensor in module.state_dict().items()},
            "bank": memory.state_dict()["bank"],
            "steps": trainer.global_step,
        },
        folder / f"{name}-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name, settings in json.loads(sys.argv[2]).items():
        fit(Path(sys.argv[1]), name, settings, ranks, rank)
    # An interpreter that ends with the group still up may abort in one of its threads.
    dist.barrier()
    dist.destroy_process_group()
