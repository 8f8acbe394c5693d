"""Every option of the data modules can be set from a LightningCLI's YAML."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from lightning_dml import datamodules
from lightning_dml.datamodules import (
    Cars196DataModule,
    CUB200DataModule,
    FolderDataModule,
    GlyphsDataModule,
    ImagesDataModule,
    INaturalistDataModule,
    InShopDataModule,
    RetrievalDataModule,
    SOPDataModule,
    TableDataModule,
    VehicleIDDataModule,
)
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.datamodules.images.transforms import ImageSettings
from lightning_dml.datamodules.tables.splits import HoldOut
from lightning_dml.parsing import instantiated

BASE = {
    "classes_per_batch": 3,
    "samples_per_class": 5,
    "eval_batch_size": 7,
    "num_workers": 1,
    "seed": 2,
    "drop_small_classes": True,
    "batches_per_epoch": 11,
    "class_weights": {"a": 2.0},
    "super_classes_per_batch": 1,
}
PIPELINE = {"class_path": "torchvision.transforms.v2.PILToTensor"}
FILES: dict[str, Any] = {
    "root": "images",
    "recipe": "multi_similarity",
    "model_name": "test_vit",
    "image_size": 32,
    "resize": 40,
    "crop_scale": [0.5, 0.9],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.1],
    "interpolation": "nearest",
    "train_transform": PIPELINE,
    "eval_transform": PIPELINE,
    "val_fraction": 0.0,
    "folds": 3,
    "fold": 2,
    "split_seed": 3,
    "cache": "cache",
    "cache_encoding": "jpeg",
    "check_images": "decode",
    "unreadable": "skip",
}
COUNTED = {"check_counts": False}
CONFIGS: list[tuple[type[RetrievalDataModule], dict[str, Any]]] = [
    (GlyphsDataModule, {"root": "cache", "image_size": 32, "augment": False}),
    (ImagesDataModule, FILES),
    (FolderDataModule, {**FILES, "allow_shared_classes": True, "val_roots": {"night": "night"}}),
    (
        TableDataModule,
        {**FILES, "table": "images/table.csv", "root": None, "columns": {"label": "id"}, "allow_shared_classes": True},
    ),
    (CUB200DataModule, {**FILES, **COUNTED, "download": True, "crop_boxes": True}),
    (Cars196DataModule, {**FILES, **COUNTED, "crop_boxes": True}),
    (SOPDataModule, {**FILES, **COUNTED, "download": True}),
    (InShopDataModule, {**FILES, **COUNTED}),
    (VehicleIDDataModule, {**FILES, **COUNTED, "test_sizes": [800]}),
    (INaturalistDataModule, {**FILES, **COUNTED}),
]


def parser() -> ArgumentParser:
    """The parser as the command line builds it, except that it raises instead of exiting."""
    own_parser = ArgumentParser(exit_on_error=False)
    own_parser.add_subclass_arguments(RetrievalDataModule, "data")
    return own_parser


def parameters(cls: type[RetrievalDataModule]) -> set[str]:
    """The options of a class and of those that it hands `**options` on to."""
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(RetrievalDataModule) + 1]:
        names |= set(inspect.signature(base).parameters)
    return names - {"options"}


@pytest.mark.parametrize(("cls", "options"), CONFIGS, ids=[cls.__name__ for cls, _ in CONFIGS])
def test_every_option_reaches_the_module(cls: type[RetrievalDataModule], options: dict[str, Any]) -> None:
    """An option that YAML cannot set is out of reach for everybody on the command line."""
    assert {*options, *BASE} == parameters(cls)  # a new option belongs into this test
    own_parser = parser()
    config = own_parser.parse_object(
        {"data": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": {**options, **BASE}}}
    )
    data = instantiated(own_parser, config).data
    assert type(data) is cls
    attributes = vars(data)
    for name, value in {**options, **BASE}.items():
        if name in attributes and name not in ("root", "cache", "table", "val_roots", "test_sizes", "columns"):
            assert attributes[name] == value, name
    assert attributes["root"] == Path(options["root"] or "images")
    if isinstance(data, ImagesDataModule):
        assert attributes["cache"] == Path("cache") and data.hold_out == HoldOut(0.0, 3, 2, 3)
        assert data.image_settings() == ImageSettings(
            32, 40, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "nearest", (0.5, 0.9), 0.5
        )
    if isinstance(data, TableDataModule):
        assert data.columns == {"label": "id"} and data.table == Path("images/table.csv") and data.table_root is None
    if isinstance(data, VehicleIDDataModule):
        assert data.test_sizes == (800,)


every_module = pytest.mark.parametrize("cls", [cls for cls, _ in CONFIGS], ids=lambda cls: cls.__name__)


def test_every_public_module_is_configured_here() -> None:
    """A new data module belongs into these tests."""
    public = {getattr(datamodules, name) for name in datamodules.__all__ if name.endswith("DataModule")}
    assert public == {cls for cls, _ in CONFIGS} | {RetrievalDataModule}


@every_module
def test_yaml_refuses_what_is_no_option(cls: type[RetrievalDataModule]) -> None:
    """A misspelt option that is ignored would train something else than was asked for."""
    required = {"root": "images", "table": "table.csv"} if cls is TableDataModule else {"root": "images"}
    with pytest.raises(ArgumentError, match="batch_sise"):
        parser().parse_object(
            {"data": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": {**required, "batch_sise": 3}}},
        )


@every_module
def test_help_explains_every_option(cls: type[RetrievalDataModule]) -> None:
    """`--help` reads the docstrings of a class and its bases; a gap there would leave users without an explanation."""
    own_parser = ArgumentParser()
    own_parser.add_class_arguments(cls, "data")
    text = " ".join(own_parser.format_help().split())
    assert "classes in a training batch on each rank" in text
    if issubclass(cls, ImagesDataModule):
        assert "share of the training classes that validates" in text
    for name in parameters(cls):
        assert re.search(rf"--data\.{name} [^()]*? (?!\()\w", text), name


@every_module
def test_every_module_has_one_default_of_workers(cls: type[RetrievalDataModule]) -> None:
    """A user who moves from one data set to another must not find the loading slower for a reason that nobody told."""
    own_parser = ArgumentParser()
    own_parser.add_class_arguments(cls, "data")
    assert own_parser.get_defaults().data.num_workers is None


def test_images_in_memory_take_no_workers_by_default() -> None:
    """Processes that hand over what the trainer's process has already would only cost time."""
    images = ArrayDataset(np.zeros((4, 2, 2), np.uint8), [0, 0, 1, 1], lambda image: image / 255)
    data = RetrievalDataModule(classes_per_batch=2, samples_per_class=2)
    data.train_set = data.val_set = images
    assert data.train_dataloader().num_workers == 0 and data.val_dataloader().num_workers == 0
    data.num_workers = 1
    assert data.train_dataloader().num_workers == 1 and data.val_dataloader().num_workers == 1


def test_transforms_from_yaml_are_used() -> None:
    """A user's own transform has to be built from its class path and applied."""
    own_parser = parser()
    options = {"root": "x", "eval_transform": {"class_path": "torchvision.transforms.v2.PILToTensor"}}
    config = own_parser.parse_object(
        {"data": {"class_path": "lightning_dml.datamodules.FolderDataModule", "init_args": options}}
    )
    transformed = instantiated(own_parser, config).data._own_eval(Image.new("RGB", (3, 2)))
    assert transformed.shape == (3, 2, 3) and transformed.dtype == torch.uint8
