"""One fit of the tiny module, on as many ranks as torchrun started; each rank writes what it ended with.

Called as `fit_tiny.py FOLDER MOMENTUM`, where a momentum of -1 stands for online keys.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dml.callbacks import MemoryBankCallback
from tests.tiny import QUIET, TinyData, tiny_module

CLASSES = 8  # of the global batch


def fit(folder: Path, momentum: float | None, ranks: int) -> None:
    """Fits and writes `rank{r}.pt`."""
    torch.set_num_threads(1)
    module = tiny_module()
    memory = MemoryBankCallback(size=50, start_step=2, momentum=momentum)
    saver = ModelCheckpoint(folder, monitor="val/recall@1", mode="max", filename="best")
    trainer = Trainer(
        max_epochs=3,
        precision="64-true",  # so that what differs is a mistake and no rounding that training has amplified
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        callbacks=[memory, saver],
        **{**QUIET, "enable_checkpointing": True},
    )
    trainer.fit(module, TinyData(classes_per_batch=CLASSES // ranks, augment=True))
    assert memory.bank is not None
    torch.save(
        {
            "weights": {name: tensor.detach() for name, tensor in module.state_dict().items()},
            "bank": memory.bank.state_dict(),
            "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
            "steps": trainer.global_step,
            "best": saver.best_model_path,
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    import os

    momentum = float(sys.argv[2])
    fit(Path(sys.argv[1]), None if momentum < 0 else momentum, int(os.environ.get("WORLD_SIZE", "1")))
