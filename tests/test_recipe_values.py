"""The recipe configs hold the numbers of their sources, also where a default gives them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lightning_dml.commands.training_configs import config_parser
from lightning_dml.datamodules.images.transforms import image_settings
from tests.helpers import ROOT
from tests.recipes import RECIPES

Values = dict[str, dict[str, Any]]

# Both releases have it for ResNet-50: XBM's (papers.md 3.2), and multi-similarity's in configs/example_resnet50.yaml
# (papers.md 3.1 has BN-Inception's).
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# research-ms-loss at b68507d, code and CUB config: papers.md 3.1.
MULTI_SIMILARITY: Values = {
    "embedder": {"pooling": "avg", "dim": 512, "freeze_batch_norm": True},
    "loss": {
        "class": "lightning_dml.losses.MultiSimilarityLoss",
        "alpha": 2.0,
        "beta": 40.0,
        "base": 0.5,
        "miner": {"class_path": "lightning_dml.losses.mining.MultiSimilarityMiner", "init_args": {"epsilon": 0.1}},
        "reduction": "anchors",  # divided by the full batch size
    },
    "optimizer": {"class": "torch.optim.Adam", "lr": 3e-5, "weight_decay": 5e-4},
    "scheduler": {"class": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1200, 2400], "gamma": 0.1},
    "data": {"classes_per_batch": 16, "samples_per_class": 5},
    "image": {"resize": 256, "image_size": 227, "crop_scale": (0.16, 1.0), "flip": 0.5, **IMAGENET},
    "training": {"iterations": 3000},
    "memory": {},
}
# research-xbm at 223ecdc, code and sample_config.yaml; the scheduler's factor, PaddleClas: papers.md 3.2.
XBM: Values = {
    "embedder": {"pooling": "max", "dim": 128, "freeze_batch_norm": False},
    "loss": {"class": "lightning_dml.losses.ContrastiveLoss", "margin": 0.5, "reduction": "anchors"},
    "optimizer": {"class": "torch.optim.Adam", "lr": 1e-4, "weight_decay": 5e-4},
    "scheduler": {
        "class": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "mode": "max",
        "factor": 0.1,
        "patience": 4,
        "threshold": 1e-3,
        "cooldown": 2,
        "min_lr": 5e-6,
    },
    "data": {"classes_per_batch": 16, "samples_per_class": 4},
    "image": {"resize": 256, "image_size": 224, "crop_scale": (0.2, 1.0), "flip": 0.5, **IMAGENET},
    "training": {
        "iterations": 35_000,
        "iterations between validations": 1000,
        "selected by": "val/map@r",
        "batch_weight": 1.0,
        "memory_weight": 1.0,
    },
    "memory": {
        "size": 55_000,
        "start_step": 1000,
        "weight": 1.0,
        "warmup_steps": 0,
        "enqueue": "before",
        "initial_fill": False,
        "policy": "queue",
    },
}
# image-retrieval-transformers at dd564fd, for In-Shop: papers.md 3.4.
IN_SHOP_MEMORY = {**XBM["memory"], "size": 0.2, "momentum": 0.999}
# The metrics are those of datasets.md.
EXPECTED: dict[str, Values] = {
    "cub": {**MULTI_SIMILARITY, "metrics": {"ks": [1, 2, 4, 8]}},
    # papers.md 3.1: none published for Cars; CUB's are carried over by us.
    "cars": {**MULTI_SIMILARITY, "metrics": {"ks": [1, 2, 4, 8]}},
    "sop": {**XBM, "metrics": {"ks": [1, 10, 100, 1000]}},
    # What is not of papers.md 3.4 is carried over from SOP by us.
    "in_shop": {**XBM, "memory": IN_SHOP_MEMORY, "metrics": {"ks": [1, 10, 20, 30]}},
    # papers.md 3.2: not found for VehicleID; SOP's are carried over by us.
    "vehicle_id": {**XBM, "metrics": {"ks": [1, 5], "gallery_draws": 10}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_values_of_its_source(name: str) -> None:
    """A number that slips, here or in a default, trains all the same and makes comparisons with papers wrong."""
    expected, recipe = EXPECTED[name], _values(name)
    assert bool(recipe["memory"]) == bool(expected["memory"])
    assert {part: {key: recipe[part][key] for key in values} for part, values in expected.items()} == expected


def _values(name: str) -> Values:
    """A recipe as `fit` reads it, by its parts; what it counts in epochs is in iterations here."""
    config: Any = config_parser()(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()))
    read = config.as_dict()
    model, data, trainer = read["model"]["init_args"], read["data"]["init_args"], read["trainer"]
    parts = {part: _flat(model[part]) for part in ("embedder", "loss", "optimizer", "metrics")}
    scheduler, epoch = _flat(model["lr_scheduler"]), data["batches_per_epoch"]
    if "milestones" in scheduler:
        assert model["lr_interval"] == "epoch"
        scheduler["milestones"] = [epoch * milestone for milestone in scheduler["milestones"]]
    callbacks = {part["class_path"].rpartition(".")[2]: part["init_args"] for part in trainer["callbacks"]}
    chosen = ("recipe", "image_size", "resize", "mean", "std", "interpolation", "crop_scale")
    image = image_settings(model_name=parts["embedder"]["model_name"], **{option: data[option] for option in chosen})
    training = {
        "iterations": epoch * trainer["max_epochs"],
        "iterations between validations": epoch * trainer["check_val_every_n_epoch"],
        "selected by": callbacks["ModelCheckpoint"]["monitor"],
        "batch_weight": model["batch_weight"],
        "memory_weight": model["memory_weight"],
    }
    return {
        **parts,
        "scheduler": scheduler,
        "data": data,
        "image": vars(image),
        "training": training,
        "memory": callbacks.get("MemoryBankCallback", {}),
    }


def _flat(part: dict[str, Any]) -> dict[str, Any]:
    return {"class": part["class_path"], **part["init_args"]}
