"""The recipe configs train as they stand, on replicas of their data sets and with a small backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_dml.cli import main
from tests.helpers import ROOT
from tests.recipes import RECIPES

SMALL = (
    "--model.init_args.embedder.init_args.model_name=test_resnet",
    "--model.init_args.embedder.init_args.pretrained=false",
    "--data.init_args.check_counts=false",
    "--data.init_args.classes_per_batch=2",
    "--data.init_args.batches_per_epoch=2",
    "--data.init_args.num_workers=0",
    "--data.init_args.image_size=32",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, folder: Path) -> None:
    """A recipe with a typing error costs its first user a queue slot."""
    root = RECIPES[name](folder / "data")
    main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), f"--data.init_args.root={root}", *SMALL])
    (best,) = (folder / "runs" / name).glob("version_0/checkpoints/best.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert ("MemoryBankCallback" in checkpoint["callbacks"]) == (name not in ("cub", "cars"))
