"""The checks of every data module, and how its loaders are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytorch_lightning import Trainer

from lightning_dml import distributed
from lightning_dml.datamodules import PKBatchSampler, ResumableLoader, RetrievalDataModule, UnpaddedDistributedSampler
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.errors import InputError
from lightning_dml.lightning_repairs import CountResumedEpoch


def data_set(counts: list[int]) -> ArrayDataset:
    """Images that all differ, in classes of the given sizes."""
    images = np.arange(sum(counts) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    return ArrayDataset(images, np.repeat(np.arange(len(counts)), counts), lambda image: image / 255)


class Module(RetrievalDataModule):
    """Sets of given class sizes; None leaves a set out."""

    def __init__(
        self,
        train: list[int] | None = None,
        val: list[int] | None = None,
        test: list[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{"classes_per_batch": 2, "samples_per_class": 2} | options)
        self.train_set, self.val_set, self.test_set = (
            None if counts is None else data_set(counts) for counts in (train, val, test)
        )


GOOD = [4, 4, 4]


def trainer(**options: Any) -> Trainer:
    """A trainer that writes nothing, for checks that ask it for its settings."""
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)


def test_loaders_pass_the_options_on() -> None:
    """An option that gets lost on the way to the loader would be a setting without effect."""
    data = Module(GOOD, GOOD, [2, 3], eval_batch_size=5, seed=9, batches_per_epoch=7)
    data.setup("fit")
    train = data.train_dataloader()
    assert isinstance(train, ResumableLoader) and isinstance(train.batch_sampler, PKBatchSampler)
    sampler = train.batch_sampler
    assert (sampler.classes_per_batch, sampler.samples_per_class, sampler.seed, len(train)) == (2, 2, 9, 7)
    assert all(batch["image"].shape == (4, 1, 2, 2) for batch in train)
    for loader, count in ((data.val_dataloader(), 12), (data.test_dataloader(), 5), (data.predict_dataloader(), 5)):
        assert isinstance(loader.sampler, UnpaddedDistributedSampler) and loader.batch_size == 5
        assert [index for batch in loader for index in batch["index"].tolist()] == list(range(count))


def test_evaluation_is_shared_out_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded or repeated image would count twice in the metrics."""
    data = Module(GOOD, [3, 4], eval_batch_size=2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    indices = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        indices.append([index for batch in data.val_dataloader() for index in batch["index"].tolist()])
    assert indices == [[0, 2, 4, 6], [1, 3, 5]]


def test_workers_persist() -> None:
    """Workers started anew each epoch cost seconds; without workers PyTorch refuses the flag."""
    data = Module(GOOD, GOOD, num_workers=1)
    assert data.train_dataloader().persistent_workers and data.val_dataloader().num_workers == 1
    assert not Module(GOOD).train_dataloader().persistent_workers


@pytest.mark.parametrize(
    ("stage", "sets", "options", "message"),
    [
        ("fit", [None, GOOD, GOOD], {}, "no training images"),
        ("fit", [[], GOOD, GOOD], {}, "no training images"),
        ("fit", [GOOD, None, GOOD], {}, r"no validation images.*limit_val_batches=0"),
        ("fit", [GOOD, [1, 1], GOOD], {}, "no class of the validation set has two images"),
        ("fit", [GOOD, GOOD, GOOD], {"classes_per_batch": 4}, "classes_per_batch=4 .* there are 3"),
        ("fit", [[4, 1, 4], GOOD, GOOD], {}, "training class 1 has one image .*drop_small_classes=true"),
        ("fit", [[4, 1], GOOD, GOOD], {"drop_small_classes": True}, "there are 1: set classes_per_batch to 1"),
        (None, [GOOD, None, GOOD], {}, "no validation images"),
        ("validate", [None, None, GOOD], {}, "no validation images"),
        ("test", [None, GOOD, None], {}, "no test images"),
        ("predict", [None, GOOD, [1]], {}, "no class of the test set has two images"),
    ],
)
def test_setup_finds_mistakes(stage: str | None, sets: list[Any], options: dict[str, Any], message: str) -> None:
    """Found before the first batch, a mistake in the data costs seconds instead of an epoch."""
    with pytest.raises(InputError, match=message):
        Module(*sets, **options).setup(stage)


@pytest.mark.parametrize(
    ("stage", "sets"),
    [
        ("fit", [GOOD, GOOD, None]),
        ("validate", [None, GOOD, None]),
        ("test", [None, None, GOOD]),
        ("predict", [[], [], GOOD]),
    ],
)
def test_setup_asks_only_for_what_the_stage_needs(stage: str, sets: list[Any]) -> None:
    """A user who tests a finished model need not have the training images at hand."""
    Module(*sets).setup(stage)


def test_a_class_is_named_where_names_are_known() -> None:
    """The user looks for a folder, not for label number 1."""
    data = Module([4, 1, 4], GOOD)
    data.class_names = ["ant", "bee", "cow"]
    with pytest.raises(InputError, match="training class 'bee' has one image"):
        data.setup("fit")


def test_a_fit_may_do_without_validation() -> None:
    """Only who switches validation off may leave its images out."""
    data = Module(GOOD)
    data.trainer = trainer(limit_val_batches=0)
    data.setup("fit")
    data.trainer = trainer()
    with pytest.raises(InputError, match="no validation images"):
        data.setup("fit")


def test_more_ranks_than_evaluation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small set must not cost the run its ranks; each takes part, and repeats are known by their index."""
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    data = Module(val=[2], test=[2])
    for stage, make in (("validate", data.val_dataloader), ("test", data.test_dataloader)):
        data.setup(stage)
        indices = []
        for rank in range(5):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            (batch,) = make()
            indices.append(batch["index"].tolist())
        assert indices == [[0], [1], [0], [1], [0]]


def test_predict_refuses_more_ranks_than_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of embeddings has each image once, so some rank would have none, which Lightning cannot do."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(InputError, match=r"the test set has 2 image\(s\) for 3 ranks, and predict .*use fewer ranks"):
        Module(test=[2]).setup("predict")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert list(Module(test=[2]).predict_dataloader().sampler) == [1]


def test_several_sets_have_a_loader_each() -> None:
    """A set that gets lost, or another's loader, would show as wrong numbers under a right name."""
    data = Module(GOOD)
    data.val_set = {"day": data_set([2, 3]), "night": data_set([4])}
    data.test_set = {"dusk": data_set([2])}
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    sizes = {name: sum(len(batch["label"]) for batch in loader) for name, loader in data.val_dataloader().items()}
    assert sizes == {"day": 5, "night": 4} and list(sizes) == ["day", "night"]
    assert list(data.test_dataloader()) == list(data.predict_dataloader()) == ["dusk"]
    assert data.eval_image(4).tolist() == [[16, 17], [18, 19]]  # of the first set, which the report shows
    with pytest.raises(InputError, match="position must be an integer from 0 to 4, got 5"):
        data.eval_image(5)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "has no validation images: "),
        ({"day": [4], "night": []}, "has no validation 'night' images"),
        ({"day": [4], "night": [1, 1]}, "no class of the validation set 'night' has two images"),
    ],
)
def test_each_of_several_sets_is_checked(sets: dict[str, list[int]], message: str) -> None:
    """The second of several sets has the mistake, so the message must name it."""
    data = Module(GOOD)
    data.val_set = {name: data_set(counts) for name, counts in sets.items()}
    for stage in ("fit", "validate"):
        with pytest.raises(InputError, match=message):
            data.setup(stage)


def test_distractors_are_no_class() -> None:
    """Images with the label -1 match nothing, so two of them are no pair to find."""
    data = Module(GOOD)
    pictures = data_set([2, 1]).images
    data.val_set = ArrayDataset(pictures, [-1, -1, 0], lambda image: image / 255)
    with pytest.raises(InputError, match="no class of the validation set has two images"):
        data.setup("validate")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_lightnings_own_sampler_is_refused_on_several_ranks(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left on, Lightning would replace our samplers and pad, so the metrics would be wrong in silence."""
    data = Module(GOOD, GOOD, GOOD)
    data.trainer = trainer(use_distributed_sampler=True)
    data.setup(stage)  # one rank: nothing would be replaced
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(
        InputError, match=r"use_distributed_sampler is true on 2 ranks: .*use_distributed_sampler=False"
    ):
        data.setup(stage)
    data.trainer = trainer(use_distributed_sampler=False)
    data.setup(stage)


def test_the_epoch_counter_is_added_once_and_to_fits_only() -> None:
    """Added twice, it would count an epoch twice after a resume."""
    data = Module(GOOD, GOOD, GOOD)
    data.trainer = trainer()
    for stage, count in (("validate", 0), ("fit", 1), ("fit", 1)):
        data.setup(stage)
        assert sum(isinstance(callback, CountResumedEpoch) for callback in vars(data.trainer)["callbacks"]) == count


def test_eval_image_is_the_undecorated_picture() -> None:
    """The report shows people the picture itself, not a normalised tensor; a wrong position is refused."""
    data = Module(GOOD, GOOD)
    picture = data.eval_image(3)
    assert picture.dtype == np.uint8 and picture.tolist() == [[12, 13], [14, 15]]
    for position in (-1, 12):
        with pytest.raises(InputError, match=f"position must be an integer from 0 to 11, got {position}"):
            data.eval_image(position)
    with pytest.raises(InputError, match=r"call setup\('validate'\)"):
        Module(GOOD).eval_image(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"samples_per_class": 1}, "samples_per_class must be an integer of at least 2, got 1"),
        ({"batches_per_epoch": 0}, "num_batches must be an integer of at least 1, got 0"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    """Each wrong number is named together with the range that is allowed."""
    with pytest.raises(InputError, match=message):
        Module(GOOD, GOOD, **options).setup("fit")
