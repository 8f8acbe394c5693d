"""Folders of images, made small with PIL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_dml.datamodules import FolderDataModule
from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.errors import InputError

Maker = Callable[[dict[str, int]], Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Folder -> number of images; the red of an image counts the images of its folder."""

    def build(folders: dict[str, int]) -> Path:
        for name, count in folders.items():
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (40, 30), (number, 100, 200)).save(tmp_path / name / f"{number}.png")
        return tmp_path

    return build


def module(root: Path, stage: str = "fit", **options: Any) -> FolderDataModule:
    """A set-up data module with sizes that keep the test fast."""
    small = {"image_size": 16, "resize": 20, "classes_per_batch": 2, "samples_per_class": 2}
    data = FolderDataModule(root, **small | options)
    data.setup(stage)
    return data


def classes(data: FolderDataModule, images: Any) -> list[str]:
    """The class names that a data set really holds, whatever numbers they have."""
    assert data.class_names is not None
    return [data.class_names[label] for label in sorted(set(images.labels.tolist()))]


def test_flat_folders_are_split_by_class(make: Maker) -> None:
    """A class on both sides would make validation measure memory instead of unseen classes."""
    names = [f"class{number}" for number in range(7)]
    root = make({name: 3 for name in names})
    data = module(root, val_fraction=0.4)
    train, val = classes(data, data.train_set), classes(data, data.val_set)
    assert len(train) == 4 and len(val) == 3 and sorted(train + val) == names
    assert data.test_set is data.val_set
    assert data.class_names == train + val  # training labels count from 0
    assert data.train_set is not None and data.train_set.labels.tolist() == np.repeat(range(4), 3).tolist()
    again = module(root, val_fraction=0.4, seed=5)
    assert classes(again, again.val_set) == val  # the split has a seed of its own
    splits = {tuple(classes(other, other.val_set)) for other in (module(root, split_seed=n) for n in range(8))}
    assert len(splits) > 1


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.99, 3), (0.5, 2)])
def test_a_split_keeps_classes_on_both_sides(fraction: float, count: int, make: Maker) -> None:
    """An extreme fraction of few classes must leave neither side empty."""
    data = module(make({f"c{n}": 2 for n in range(4)}), val_fraction=fraction, classes_per_batch=1)
    assert len(classes(data, data.val_set)) == count


def test_split_folders_are_taken_as_they_lie(make: Maker) -> None:
    """Benchmarks come with their split; mixing it would make the results incomparable."""
    root = make({"train/dog": 3, "train/cat": 2, "val/ant": 2, "test/bee": 4})
    data = module(root)
    assert data.class_names == ["cat", "dog", "ant", "bee"]
    assert classes(data, data.train_set) == ["cat", "dog"]
    assert classes(data, data.val_set) == ["ant"] and classes(data, data.test_set) == ["bee"]
    assert data.train_set is not None and data.train_set.labels.tolist() == [0, 0, 1, 1, 1]


def test_without_a_test_folder_validation_tests(make: Maker) -> None:
    """Many data sets have only two parts, as in the papers."""
    data = module(make({"train/a": 2, "train/b": 2, "val/c": 2}))
    assert data.test_set is data.val_set


def test_a_class_may_be_called_train(make: Maker) -> None:
    """Among flat class folders, `train` is a vehicle and no split."""
    data = module(make({"train": 2, "plane": 2, "car": 2, "val": 2}))
    assert data.class_names is not None and sorted(data.class_names) == ["car", "plane", "train", "val"]


def test_other_and_hidden_files_are_passed_over(make: Maker) -> None:
    """Notes, caches and macOS leftovers in a folder must not break a training."""
    root = make({f"c{n}": 2 for n in range(4)})
    (root / "c0" / "notes.txt").write_text("x")
    (root / "c0" / ".hidden.png").write_text("x")
    (root / "README.md").write_text("x")
    (root / ".cache").mkdir()
    (root / "c0" / "2.PNG").write_bytes((root / "c0" / "1.png").read_bytes())
    data = module(root)
    assert data.train_set is not None and data.val_set is not None
    assert len(data.train_set) + len(data.val_set) == 9


def test_transforms(make: Maker) -> None:
    """A wrong normalisation or resize shows in no error, only in poor results; the pixel is computed by hand."""
    data = module(make({"train/a": 2, "train/b": 2, "val/c": 3}), mean=(0, 0, 0), std=(1, 1, 0.5))
    assert data.train_set is not None and isinstance(data.val_set, LabelledImages)
    for sample in (data.train_set[0], data.val_set[2]):
        assert sample["image"].shape == (3, 16, 16) and type(sample["image"]) is Tensor
        assert sample["image"].dtype == torch.float32
    pixel = data.val_set[2]["image"][:, 3, 3]
    assert torch.allclose(pixel, torch.tensor([2 / 255, 100 / 255, 400 / 255]))
    (batch,) = data.val_dataloader()
    assert batch["image"].shape == (3, 3, 16, 16) and batch["label"].tolist() == [2, 2, 2]
    picture = data.eval_image(2)
    assert picture.shape == (30, 40, 3) and picture[0, 0].tolist() == [2, 100, 200]


def test_the_default_training_transform_crops_and_flips(tmp_path: Path) -> None:
    """A crop or a flip that never happens would weaken training unnoticed."""
    ramp = np.broadcast_to(4 * np.arange(64, dtype=np.uint8)[:, None], (64, 64, 3))
    for name in ("train/a", "train/b", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(ramp).save(tmp_path / name / f"{number}.png")
    whole: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    data = module(tmp_path, crop_scale=(0.2, 0.3), **whole)
    assert data.train_set is not None
    images = [data.train_set[0]["image"] for _ in range(40)]
    ranges = [float(image.max() - image.min()) for image in images]
    assert max(ranges) < 0.75  # none shows the whole width
    rising = sum(float(image[0, 0, -1] - image[0, 0, 0]) > 0 for image in images)
    assert 5 < rising < 35


def test_own_transforms_replace_ours(make: Maker) -> None:
    """Ours on top of the user's would augment twice."""
    root = make({"train/a": 2, "train/b": 2, "val/c": 3})
    data = module(root, train_transform=lambda image: torch.zeros(3, 2, 2), eval_transform=lambda image: torch.ones(1))
    assert data.train_set is not None and isinstance(data.val_set, LabelledImages)
    assert data.train_set[0]["image"].shape == (3, 2, 2) and data.val_set[0]["image"].shape == (1,)


def test_shared_classes(make: Maker) -> None:
    """Seen classes in validation are refused unless the user says that this is meant."""
    root = make({"train/a": 2, "train/b": 2, "val/b": 2, "val/c": 2})
    with pytest.raises(InputError, match=r"class 'b' \(1 such .*unseen classes.*allow_shared_classes=true"):
        module(root)
    data = module(root, allow_shared_classes=True)
    assert data.class_names == ["a", "b", "c"] and isinstance(data.val_set, LabelledImages)
    assert data.val_set.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("own", [{"train/a": 2, "train/b": 2, "val/c": 2}, {"a": 2, "b": 2, "c": 2, "d": 2}])
def test_further_folders_are_sets_of_their_own(make: Maker, tmp_path: Path, own: dict[str, int]) -> None:
    """A model is judged on several collections; each must keep its images, and a class its one label."""
    others = {"night": make({"more/night/x": 3, "more/night/y": 2}) / "more/night", "rain": tmp_path / "more/rain"}
    make({"more/rain/x": 2})
    (tmp_path / "own").mkdir()
    root = make({f"own/{name}": count for name, count in own.items()}) / "own"
    data = module(root, val_roots={name: str(folder) for name, folder in others.items()})
    plain = module(root)
    assert isinstance(data.val_set, dict) and list(data.val_set) == ["val", "night", "rain"]
    assert classes(data, data.val_set["val"]) == classes(plain, plain.val_set)
    assert classes(data, data.val_set["night"]) == ["x", "y"] and len(data.val_set["night"]) == 5
    assert classes(data, data.val_set["rain"]) == ["x"] and len(data.val_set["rain"]) == 2
    assert data.test_set is data.val_set and data.class_names is not None
    assert data.train_set is not None and plain.train_set is not None
    assert data.train_set.labels.tolist() == plain.train_set.labels.tolist()
    assert data.val_set["night"][0]["image"].shape == (3, 16, 16)
    assert len(data.class_names) == len(set(data.class_names)) == len(own) + 2


@pytest.mark.parametrize(
    "own", [{"train/a": 2, "train/b": 2}, {"a": 2, "b": 2}, {"train/a": 2, "train/b": 2, "test/c": 2}]
)
def test_all_classes_may_train_where_others_validate(make: Maker, own: dict[str, int]) -> None:
    """A model is often trained on one whole collection and judged on others; an empty set of its own is no mistake."""
    folders = {f"own/{name}": count for name, count in own.items()}
    whole = make({**folders, "rain/x": 3, "night/x": 2, "night/y": 2})
    root, names = whole / "own", ["rain", "night"]  # as they are given, not as they are sorted
    data = module(root, val_fraction=0, val_roots={name: str(whole / name) for name in names})
    assert classes(data, data.train_set) == ["a", "b"]
    assert isinstance(data.val_set, dict) and list(data.val_set) == names and data.eval_image(2).shape == (30, 40, 3)
    assert [len(loader.dataset) for loader in data.val_dataloader().values()] == [3, 4]
    if "test/c" in own:
        assert classes(data, data.test_set) == ["c"]
    else:
        assert data.test_set is data.val_set
    if "test/c" in own:
        alone = module(root, val_fraction=0)
        assert alone.val_set is alone.test_set
    else:
        with pytest.raises(InputError, match="no validation images"):
            module(root, val_fraction=0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, r"val_roots\['night'\] .*night is not a folder"),
        ({"night/.hidden": 1}, r"val_roots\['night'\] .*night has no class folders with images"),
        ({"night/x": 2, "night/y": 0}, r"class folder .*y has no images"),
        ({"night/x": 1, "night/y": 1}, "no class of the validation set 'night' has two images"),
        (
            {"night/x": 2, "night/a": 2},
            r"class 'a' \(1 such .*training set and .*night: .*allow_shared_classes=true",
        ),
    ],
)
def test_further_folders_are_checked(make: Maker, folders: dict[str, int], message: str) -> None:
    """The message must show the one of several folders that has the mistake, before training."""
    root = make({"train/a": 2, "train/b": 2, "val/c": 2, **folders})
    with pytest.raises(InputError, match=message):
        module(root, val_roots={"night": str(root / "night")})
    if "night/a" in folders:
        module(root, val_roots={"night": str(root / "night")}, allow_shared_classes=True)


def test_evaluation_needs_no_training_folder(make: Maker) -> None:
    """A model is often evaluated where the training images are not."""
    root = make({"val/a": 2, "val/b": 2})
    assert len(module(root, "validate").val_set or []) == 4
    with pytest.raises(InputError, match="no training images"):
        module(root, "fit")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "has no class folders with images: expected root/<class>"),
        ({"train/a": 3}, "no validation images"),
        ({"a": 3}, "no validation images"),
        ({"a": 2, "b": 0, "c": 2}, r"class folder .*b has no images .*remove it"),
        ({"train/a": 2, "train/b": 1, "train/c": 2, "val/d": 2}, "training class 'b' has one image"),
        ({"train/a": 2, "train/b": 2, "val/c": 1}, "no class of the validation set has two images"),
        ({"train/a": 2, "val/c": 2}, "classes_per_batch=2 .* there are 1"),
    ],
)
def test_folder_errors(folders: dict[str, int], message: str, make: Maker) -> None:
    """A folder of the wrong form is explained by what is missing in it."""
    with pytest.raises(InputError, match=message):
        module(make(folders), classes_per_batch=1 if 3 in folders.values() else 2)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_missing_root(stage: str, tmp_path: Path) -> None:
    """A typing error in the path is the likeliest mistake; the message has to show the path."""
    with pytest.raises(InputError, match=r"root .*nowhere is not a folder"):
        module(tmp_path / "nowhere", stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be a share of .*, at least 0 and less than 1, got 1.0"),
        ({"split_seed": -1}, "split_seed must be an integer of at least 0, got -1"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        (
            {"image_size": 32, "resize": 20},
            "resize must be an integer of at least 32, got 20; the crop of image_size=32",
        ),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be .* got \(0.0, 1.0\)"),
        ({"crop_scale": (0.8, 0.4)}, "crop_scale must be two ascending"),
        ({"val_roots": {"val": "x"}}, "val_roots must not have a set called 'val'"),
        ({"val_roots": {"": "x"}}, "val_roots must not have a set called ''"),
        ({"val_roots": "night"}, r"val_roots must map names to folders, such as \{night: data/night\}, got 'night'"),
        ({"val_roots": ["night"]}, r"val_roots must map names to folders, .*got \['night'\]"),
        ({"val_roots": {"a": None}}, r"val_roots must map names to folders, .*got \{'a': None\}"),
        ({"val_roots": {7: "x"}}, r"val_roots must map names to folders, .*got \{7: 'x'\}"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Wrong fractions and sizes are refused when the object is made, with the value in the message."""
    with pytest.raises(InputError, match=message):
        FolderDataModule(tmp_path, **options)


def test_a_cache_among_the_classes_is_refused(make: Maker) -> None:
    """A later run would take it for a class without images."""
    root = make({"a": 2, "b": 2})
    with pytest.raises(InputError, match="among the classes: choose a folder elsewhere"):
        module(root, cache=root / "cache")
