"""Data modules of image files are alike in transforms by model, held-out classes, checks, caches, ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.trainer.states import TrainerFn

from lightning_dml import Embedder, MetricLearningModule
from lightning_dml.datamodules import FolderDataModule, ImagesDataModule
from lightning_dml.datamodules.images.file_dataset import ImageFileDataset
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.datamodules.tables.splits import Splits
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss
from tests.helpers import run_ranks
from tests.tiny import QUIET

Make = Callable[..., "Listed"]


class Listed(ImagesDataModule):
    """Twelve training classes and four of each of two test sets, three images each, as a subclass would list them."""

    def __init__(self, root: Path, several: bool = False, **options: Any) -> None:
        small = {"image_size": 16, "resize": 20, "classes_per_batch": 2, "samples_per_class": 2, "num_workers": 0}
        super().__init__(root, **small | options)
        self.several = several
        self.reads = 0

    def read(self) -> Splits:
        """Lists the files that `make` has drawn."""
        self.reads += 1
        tests = {"day": self.listed(12, 16), "night": self.listed(16, 20)}
        names = [f"class {number}" for number in range(20)]
        return Splits(self.listed(0, 12), tests if self.several else tests["day"], names)

    def listed(self, first: int, last: int) -> ImageTable:
        """Three rows of each class."""
        labels = np.repeat(np.arange(first, last), 3)
        return ImageTable(self.root, Texts(f"{row % 3}-{label}.jpg" for row, label in enumerate(labels)), labels)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Draws the images, each of another colour, and lists them."""
    generator = np.random.default_rng(0)
    for label in range(20):
        for number in range(3):
            pixels = generator.integers(0, 256, (30, 40 + number, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}-{label}.jpg")

    return lambda **options: Listed(tmp_path, **options)


def file_set(images: Any) -> ImageFileDataset:
    """The data set, which must be one of files."""
    assert isinstance(images, ImageFileDataset)
    return images


def names(data: Listed, images: Any) -> set[str]:
    """The classes that a set really holds, by the names of its files."""
    images = file_set(images)
    assert data.class_names is not None
    for path, label in zip(images.table.paths, images.labels.tolist(), strict=True):
        assert data.class_names[label] == "class " + path.split("-")[1].split(".")[0]
    return {data.class_names[label] for label in images.labels.tolist()}


def test_without_a_request_the_test_set_validates(make: Make) -> None:
    """The published protocol, so that figures compare with those of papers."""
    data = make()
    data.setup()
    assert len(names(data, data.train_set)) == 12
    assert data.val_set is data.test_set and len(names(data, data.val_set)) == 4


@pytest.mark.parametrize("options", [{"val_fraction": 0.25}, {"folds": 4, "fold": 3}])
def test_classes_are_held_out_on_request(make: Make, options: dict[str, Any]) -> None:
    """Tuning on the test set reports a number that nobody can repeat on other classes."""
    data = make(several=True, **options)
    data.setup()
    train, val = names(data, data.train_set), names(data, data.val_set)
    assert len(train) == 9 and len(val) == 3 and not train & val
    assert isinstance(data.test_set, dict) and list(data.test_set) == ["day", "night"]
    assert all(len(names(data, test)) == 4 and not names(data, test) & (train | val) for test in data.test_set.values())


def test_several_test_sets_are_evaluated_each(make: Make) -> None:
    """VehicleID has three."""
    data = make(several=True)
    data.setup()
    loaders = data.test_dataloader()
    assert list(loaders) == ["day", "night"]
    assert [sum(len(batch["label"]) for batch in loader) for loader in loaders.values()] == [12, 12]


@pytest.mark.parametrize(("check", "content"), [("headers", b"no image"), ("headers", b""), ("decode", None)])
def test_an_unreadable_image_is_found_before_training(
    make: Make, tmp_path: Path, check: Any, content: bytes | None
) -> None:
    """Hours into a training is too late."""
    path = tmp_path / "1-4.jpg"
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    data = make(check_images=check)
    for call in (data.prepare_data, data.setup):
        with pytest.raises(InputError, match=r"1-4\.jpg.*row 13.*unreadable='skip'"):
            call()


def test_a_missing_image_is_found_before_training(make: Make, tmp_path: Path) -> None:
    """A copy of a data set that was cut short is the most common fault of all."""
    (tmp_path / "0-13.jpg").unlink()
    (tmp_path / "2-13.jpg").unlink()
    with pytest.raises(InputError, match=r"2 of 12 images .*0-13\.jpg .*no such file"):
        make().prepare_data()
    make(check_images="none").setup()


def test_unreadable_images_are_skipped_and_counted(make: Make, tmp_path: Path) -> None:
    """Images are left out by choice, and never replaced by a black one."""
    path = tmp_path / "1-4.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    data = make(unreadable="skip", val_fraction=0.25)
    with pytest.warns(UserWarning, match=r"1 of 36 images of the train set cannot be read.*1-4\.jpg"):
        data.setup("fit")
    train, val = file_set(data.train_set), file_set(data.val_set)
    assert len(train) + len(val) == 35 and "1-4.jpg" not in [*train.table.paths, *val.table.paths]
    names(data, train), names(data, val)


def test_an_image_that_breaks_later_is_named(make: Make, tmp_path: Path) -> None:
    """Files vanish during a training as well."""
    data = make()
    data.setup()
    (tmp_path / "0-0.jpg").unlink()
    with pytest.raises(InputError, match=r"0-0\.jpg.*row 0 "):
        file_set(data.train_set)[0]


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.25}, {"several": True}, {"folds": 3, "fold": 1}])
def test_the_cache_changes_no_pixel(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    """A cache that trains something else than the files would be a trap; held-out rows must find their own pictures."""
    plain, cached = make(**options), make(cache=tmp_path / "cache", **options)
    cached.prepare_data()
    for data in (plain, cached):
        data.setup()
    for ours, right in ((cached.train_set, plain.train_set), (cached.val_set, plain.val_set)):
        for name in ours if isinstance(ours, dict) else [None]:
            one = file_set(ours if name is None else ours[name])  # type: ignore[index]
            other = file_set(right if name is None else right[name])  # type: ignore[index]
            assert one.cache is not None and other.cache is None and len(one) == len(other)
            for row in range(len(one)):
                torch.manual_seed(row)
                sample = one[row]
                torch.manual_seed(row)
                assert torch.equal(sample["image"], other[row]["image"])
                np.testing.assert_array_equal(one.picture(row), other.picture(row))


def test_folds_share_a_cache(make: Make, tmp_path: Path) -> None:
    """Cross validation must not decode everything once for each fold."""
    for fold in range(3):
        make(cache=tmp_path / "cache", folds=3, fold=fold).prepare_data()
    make(cache=tmp_path / "cache").setup("fit")
    assert len(list((tmp_path / "cache").glob("*.images"))) == 2  # train and test


def test_the_jpeg_cache_is_smaller(make: Make, tmp_path: Path) -> None:
    """A tenth of the size is what it is for; the pictures differ by little."""
    raw, jpeg = (make(cache=tmp_path / encoding, cache_encoding=encoding) for encoding in ("raw", "jpeg"))
    for data in (raw, jpeg):
        data.setup()
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.images")) for name in ("raw", "jpeg")]
    assert sizes[1] < sizes[0]
    ours, right = file_set(jpeg.val_set)[0]["image"], file_set(raw.val_set)[0]["image"]
    assert 0 < float((ours - right).abs().mean()) < 0.3


def test_the_table_is_read_once(make: Make) -> None:
    """Half a million lines take seconds, and both hooks need them."""
    data = make()
    data.prepare_data()
    data.setup("fit")
    assert data.reads == 1
    data.setup("test")  # the files may have changed since
    assert data.reads == 2


def test_normalisation_is_that_of_the_trained_model(make: Make) -> None:
    """A backbone that was pretrained with other statistics loses points without an error."""
    data = make(recipe="standard")
    assert data.image_settings().mean == pytest.approx((0.485, 0.456, 0.406))
    explicit = make(model_name="vit_base_patch16_224.augreg_in21k").image_settings()
    assert explicit.mean == pytest.approx((0.5, 0.5, 0.5)) and explicit.interpolation == "bicubic"
    embedder = Embedder("test_vit", dim=4, pooling="avg", model_args={"img_size": 16, "patch_size": 8})
    cfg: Any = embedder.backbone.pretrained_cfg
    trainer = Trainer(max_steps=1, limit_val_batches=1, **QUIET)
    trainer.fit(MetricLearningModule(embedder, ContrastiveLoss(0.5)), datamodule=data)
    assert data.image_settings().mean == pytest.approx(tuple(cfg["mean"]))
    assert data.image_settings().interpolation == cfg["interpolation"]
    assert cfg["mean"] != (0.485, 0.456, 0.406)


def test_the_config_of_the_module_counts(make: Make) -> None:
    """Weights of one's own have statistics and a size of their own, which timm's list of names does not know."""
    data = make(image_size=None, resize=None)
    module = torch.nn.Module()
    module.encoder = Embedder("test_vit", dim=4, pooling="avg", model_args={"img_size": 32})
    backbone: Any = module.encoder.backbone
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "tag": None}
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    settings = data.image_settings()
    assert settings.mean == (0.1, 0.2, 0.3) and (settings.image_size, settings.resize) == (32, 37)
    module.encoder = torch.nn.Linear(1, 1)
    assert data.image_settings().mean == pytest.approx((0.485, 0.456, 0.406))


def trainer_of(data: ImagesDataModule, stage: str, **options: Any) -> Trainer:
    """A trainer that is about to do something with the data."""
    trainer = Trainer(**QUIET, **options)
    trainer.state.fn = TrainerFn(stage)
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = trainer
    return trainer


@pytest.mark.parametrize(
    ("stage", "broken", "options", "limit", "seen"),
    [
        ("fit", "0-13.jpg", {"val_fraction": 0.3}, 1, False),
        ("fit", "0-13.jpg", {}, 1, True),
        ("fit", "0-13.jpg", {}, 0, False),
        ("validate", "0-13.jpg", {"val_fraction": 0.3}, 1, False),
        ("test", "0-13.jpg", {"val_fraction": 0.3}, 1, True),
        ("test", "0-3.jpg", {}, 1, False),
        ("predict", "0-3.jpg", {}, 1, False),
        ("fit", "0-3.jpg", {}, 1, True),
    ],
)
def test_a_stage_looks_at_its_own_images(
    make: Make, tmp_path: Path, stage: str, broken: str, options: dict[str, Any], limit: int, seen: bool
) -> None:
    """A test set that is kept for the end must not stop a training, nor cost the time to check and cache it."""
    (tmp_path / broken).write_bytes(b"")
    data = make(**options)
    trainer_of(data, stage, limit_val_batches=limit)
    if seen:
        with pytest.raises(InputError, match=broken):
            data.prepare_data()
    else:
        data.prepare_data()
        data.setup(stage)


def test_skipped_images_change_no_split(make: Make, tmp_path: Path) -> None:
    """The classes that validate follow from the seed; a broken disk must not move others into the training."""
    right, ours = make(val_fraction=0.25), make(val_fraction=0.25, unreadable="skip")
    right.setup()
    for number in range(3):
        (tmp_path / f"{number}-5.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="3 of 36 images"):
        ours.setup()
    assert names(ours, ours.val_set) == names(right, right.val_set) - {"class 5"}
    assert names(ours, ours.train_set) == names(right, right.train_set) - {"class 5"}
    assert ours.class_names == right.class_names


def use_on_ranks(rank: int, _ranks: int, root: Path) -> tuple[int, list[list[int]], float]:
    """A rank's part of a data set with a broken image and a cache that the first rank has made."""
    data = Listed(root, cache=root / "cache", unreadable="skip", val_fraction=0.25)
    if rank == 0:
        data.prepare_data()
    dist.barrier()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = [batch["index"].tolist() for batch in loader]
    return len(file_set(data.train_set)), batches, float(sum(file_set(data.val_set)[0]["image"].flatten()))


def test_ranks_share_the_cache_and_not_the_batches(make: Make, tmp_path: Path) -> None:
    """One machine decodes once; and no image is in the batches of two ranks at a time."""
    make()
    (tmp_path / "1-4.jpg").write_bytes(b"")
    (first, ours, pixels), (second, theirs, others) = run_ranks(2, use_on_ranks, tmp_path)
    assert first == second and pixels == others and len(ours) == len(theirs) > 0
    assert all(not set(one) & set(other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("column", ["is_query", "is_gallery"])
def test_an_evaluation_without_a_role_is_refused(make: Make, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the first validation, it would cost an epoch."""
    data = make()
    roles: dict[str, Any] = {"is_query": np.ones(12, bool), "is_gallery": np.ones(12, bool), column: np.zeros(12, bool)}
    splits = data.read()
    assert isinstance(splits.test, ImageTable)
    monkeypatch.setattr(data, "read", lambda: replace(splits, test=replace(splits.test, **roles)))
    with pytest.raises(InputError, match=f"{column} is false for every image of the validation set"):
        data.setup("fit")


def test_super_classes_must_be_known(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without one are not of one kind."""
    data = make(super_classes_per_batch=1)
    splits = data.read()
    supers = np.where(np.arange(36) < 3, -1, 0)
    monkeypatch.setattr(data, "read", lambda: replace(splits, train=replace(splits.train, super_labels=supers)))
    with pytest.raises(InputError, match="and 3 have none"):
        data.setup("fit")


def read_differently(rank: int, _ranks: int, root: Path) -> str:
    """The error on a rank whose folder lacks a file that another's has."""
    data = FolderDataModule(root / str(rank), image_size=8, resize=8, num_workers=0, classes_per_batch=1)
    try:
        data.setup("fit")
    except InputError as error:
        return str(error)
    return ""


def test_ranks_must_see_the_same_files(tmp_path: Path) -> None:
    """Each rank plans the batches of all from its own table: another table trains classes that are no classes."""
    for rank in range(2):
        for name in "abcd":
            (tmp_path / str(rank) / name).mkdir(parents=True)
            for number in range(3 - (rank == 1 and name == "c")):
                Image.new("RGB", (8, 8)).save(tmp_path / str(rank) / name / f"{number}.png")
    assert all("rank 1 reads other files" in message for message in run_ranks(2, read_differently, tmp_path))
    (tmp_path / "0" / "c" / "2.png").unlink()
    assert run_ranks(2, read_differently, tmp_path) == ["", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_images": "all"}, "check_images must be one of none, headers, decode, got 'all'"),
        ({"unreadable": "ignore"}, "unreadable must be one of raise, skip, got 'ignore'"),
        ({"unreadable": "skip", "check_images": "none"}, "set it to 'decode'"),
        ({"cache_encoding": "png"}, "cache_encoding must be one of raw, jpeg, got 'png'"),
        ({"recipe": "standrad"}, "standard"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"fold": 2}, "fold=2 needs folds"),
        ({"folds": 3, "val_fraction": 0.5}, "two splits: set one of them"),
        ({"cache": "cache", "resize": None, "train_transform": len}, "set resize to the shorter side"),
    ],
)
def test_wrong_options(make: Make, options: dict[str, Any], message: str) -> None:
    """Before any long work starts."""
    with pytest.raises(InputError, match=message):
        make(**options)


def test_workers_share_the_cores(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker for each core is what keeps a GPU fed; as many for each of eight ranks would stand in its way."""
    data = make(num_workers=None)
    data.setup()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert data.train_dataloader().num_workers == 6
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    loader = data.train_dataloader()
    assert loader.num_workers == 8 and loader.persistent_workers
    data.trainer = SimpleNamespace(num_devices=16)  # type: ignore[assignment]
    assert data.train_dataloader().num_workers == 4
    several = make(num_workers=None, several=True)
    several.setup()
    assert [loader.persistent_workers for loader in several.test_dataloader().values()] == [False, False]
