"""Every option of the data modules can be set from a LightningCLI's YAML."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from lightning_dml.datamodules import FolderDataModule, GlyphsDataModule, RetrievalDataModule

BASE = {
    "classes_per_batch": 3,
    "samples_per_class": 5,
    "eval_batch_size": 7,
    "num_workers": 1,
    "seed": 2,
    "drop_small_classes": True,
    "batches_per_epoch": 11,
}
CONFIGS: list[tuple[type[RetrievalDataModule], dict[str, Any]]] = [
    (GlyphsDataModule, {"root": "cache", "image_size": 32, "augment": False}),
    (
        FolderDataModule,
        {
            "root": "images",
            "val_fraction": 0.25,
            "split_seed": 3,
            "image_size": 32,
            "resize": 40,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.2, 0.1],
            "crop_scale": [0.5, 0.9],
            "allow_shared_classes": True,
            "val_roots": {"night": "night"},
            "train_transform": {"class_path": "torchvision.transforms.v2.PILToTensor"},
            "eval_transform": {"class_path": "torchvision.transforms.v2.PILToTensor"},
        },
    ),
]


def parser() -> ArgumentParser:
    """The parser as the command line builds it, except that it raises instead of exiting."""
    made = ArgumentParser(exit_on_error=False)
    made.add_subclass_arguments(RetrievalDataModule, "data")
    return made


@pytest.mark.parametrize(("cls", "options"), CONFIGS)
def test_every_option_reaches_the_module(cls: type[RetrievalDataModule], options: dict[str, Any]) -> None:
    """An option that YAML cannot set is out of reach for everybody on the command line."""
    own = set(inspect.signature(cls).parameters) - {"options"}
    base = set(inspect.signature(RetrievalDataModule).parameters)
    assert set(options) == own and set(BASE) == base  # a new option belongs into this test
    made = parser()
    config = made.parse_object(
        {"data": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options | BASE}}
    )
    data = made.instantiate_classes(config).data
    assert type(data) is cls and {name: getattr(data, name) for name in BASE} == BASE
    assert vars(data)["root"] == Path(options["root"])


def test_yaml_refuses_what_is_no_option() -> None:
    """A misspelt option that is ignored would train something else than was asked for."""
    with pytest.raises(ArgumentError, match="batch_sise"):
        parser().parse_object(
            {"data": {"class_path": "lightning_dml.datamodules.GlyphsDataModule", "init_args": {"batch_sise": 3}}},
        )


def test_help_explains_the_options() -> None:
    """`--help` reads the docstrings; broken markup there would leave users without any explanation."""
    made = ArgumentParser()
    made.add_class_arguments(FolderDataModule, "data")
    text = " ".join(made.format_help().split())
    assert "share of the classes that validates" in text and "classes in a training batch on each rank" in text


def test_transforms_from_yaml_are_used() -> None:
    """A user's own transform has to be built from its class path and applied."""
    made = parser()
    options = {"root": "x", "eval_transform": {"class_path": "torchvision.transforms.v2.PILToTensor"}}
    config = made.parse_object(
        {"data": {"class_path": "lightning_dml.datamodules.FolderDataModule", "init_args": options}}
    )
    transformed = made.instantiate_classes(config).data.eval_transform(Image.new("RGB", (3, 2)))
    assert transformed.shape == (3, 2, 3) and transformed.dtype == torch.uint8
