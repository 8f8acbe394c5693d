"""The recipe configs train as they stand, on replicas of their data sets and with a small backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_dml.cli import main
from tests.datamodules import replicas
from tests.helpers import ROOT

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
RECIPES: dict[str, Callable[[Path], Path]] = {
    "cub": lambda root: replicas.make_cub(root, (1, 2, 3, 4, 101, 102)),
    "cars": lambda root: replicas.make_cars(root, (1, 2, 3, 98, 99, 196)),
    "sop": lambda root: replicas.make_sop(root, train=range(1, 6)),
    "in_shop": lambda root: replicas.make_in_shop(root, train=range(1, 6), test=(7_001, 7_982)),
    "vehicle_id": lambda root: replicas.make_vehicle_id(root, train=(1, 2, 3, 4)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, folder: Path) -> None:
    """A recipe with a typing error costs its first user a queue slot."""
    root = RECIPES[name](folder / "data")
    main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), f"--data.init_args.root={root}", *SMALL])
    (best,) = (folder / "runs" / name).glob("version_0/checkpoints/best.ckpt")
    checkpoint = torch.load(best, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert any("MemoryBankCallback" in each for each in checkpoint["callbacks"]) == (name not in ("cub", "cars"))
