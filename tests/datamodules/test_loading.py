"""A fit that stops in the middle of an epoch and goes on sees what it would have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_dml.datamodules import PKBatchSampler, ResumableLoader, RetrievalDataModule
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.errors import InputError

BATCHES, EPOCHS = 5, 3


def noisy(image: Tensor) -> Tensor:
    """A random transform of which no two outcomes are equal."""
    return image / 255 + torch.rand(image.shape)


class TinyDataModule(RetrievalDataModule):
    """10 classes of 4 random images; P = 4 and K = 2 make 5 batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"classes_per_batch": 4, "samples_per_class": 2} | options)

    def setup(self, stage: str | None = None) -> None:
        """Builds sets whose every read differs, so that a wrong seed shows in the pixels."""
        images = np.random.default_rng(0).integers(0, 256, (40, 3, 3), dtype=np.uint8)
        labels = np.repeat(np.arange(10), 4)
        self.train_set = ArrayDataset(images, labels, noisy)
        self.val_set = self.test_set = ArrayDataset(images, labels, lambda image: image / 255)
        super().setup(stage)


class Watcher(LightningModule):
    """Learns nothing much and writes down every batch: epoch, indices, pixels, and a draw like a dropout's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 1)
        self.batches: list[tuple[int, list[int], float]] = []
        self.predicted: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Writes down what came in, and trains, so that there is a state to resume."""
        self.batches.append((self.current_epoch, batch["index"].tolist(), float(batch["image"].double().sum())))
        loss: Tensor = self.layer(batch["image"].flatten(1)).mean()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Runs between epochs, as it does for users; it must not disturb the order of training."""
        assert batch["image"].dtype == torch.float32

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Writes down which images came, in their order."""
        self.predicted += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer that has a step to count."""
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet trainer whose defaults a test may override."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return Trainer(**(defaults | options))


def every_step(folder: Path) -> ModelCheckpoint:
    """Keeps a checkpoint of every step, so that a resume can begin anywhere."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, list[int], float]]]:
    """The uninterrupted fit, with a checkpoint after every batch."""
    folder = tmp_path_factory.mktemp("whole")
    model = Watcher()
    trainer(folder, callbacks=[every_step(folder)]).fit(model, datamodule=TinyDataModule())
    assert [epoch for epoch, _, _ in model.batches] == [epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    return folder, model.batches


def test_epochs_and_augmentation_differ(whole: tuple[Path, list[tuple[int, list[int], float]]]) -> None:
    """If all batches were alike, the tests below would pass whatever the loader did."""
    _, batches = whole
    assert (
        len({tuple(indices) for _, indices, _ in batches}) == len({pixels for _, _, pixels in batches}) == len(batches)
    )


# Every place, the last batches of epochs among them.
@pytest.mark.parametrize("step", range(1, BATCHES * EPOCHS))
def test_a_resumed_fit_sees_the_batches_that_were_to_come(
    step: int, whole: tuple[Path, list[tuple[int, list[int], float]]], tmp_path: Path
) -> None:
    """A restart that repeats or skips images trains on another distribution than the user believes."""
    folder, batches = whole
    model = Watcher()
    fit = trainer(tmp_path, enable_checkpointing=False)
    fit.fit(model, datamodule=TinyDataModule(), ckpt_path=folder / f"{step}.ckpt", weights_only=True)
    assert model.batches == batches[step:]
    assert fit.global_step == len(batches)


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": BATCHES * EPOCHS}])
@pytest.mark.parametrize(("first", "second"), [(3, 4), (5, 7), (5, 10), (5, 12), (10, 14)])
def test_a_fit_resumed_twice_sees_the_batches_that_were_to_come(
    first: int,
    second: int,
    limits: dict[str, int],
    whole: tuple[Path, list[tuple[int, list[int], float]]],
    tmp_path: Path,
) -> None:
    """Preempted jobs restart many times; a small error each time would add up."""
    folder, batches = whole
    once, twice = Watcher(), Watcher()
    fit = trainer(tmp_path, callbacks=[every_step(tmp_path)], **limits)
    fit.fit(once, datamodule=TinyDataModule(), ckpt_path=folder / f"{first}.ckpt")
    assert once.batches == batches[first:]
    fit = trainer(tmp_path, enable_checkpointing=False, **limits)
    fit.fit(twice, datamodule=TinyDataModule(), ckpt_path=tmp_path / f"{second}.ckpt")
    assert twice.batches == batches[second:]


def test_hooks_of_the_epoch_after_a_resume_run(
    whole: tuple[Path, list[tuple[int, list[int], float]]], tmp_path: Path
) -> None:
    """A skipped epoch start would leave schedulers and callbacks of the user one epoch behind."""
    started: list[int] = []

    class Epochs(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            started.append(trainer.current_epoch)

    trainer(tmp_path, callbacks=[Epochs()], enable_checkpointing=False).fit(
        Watcher(), datamodule=TinyDataModule(), ckpt_path=whole[0] / f"{BATCHES}.ckpt"
    )
    assert started == [1, 2]


@pytest.mark.parametrize("step", [3, BATCHES])
def test_workers_change_nothing(
    step: int, whole: tuple[Path, list[tuple[int, list[int], float]]], tmp_path: Path
) -> None:
    """num_workers is about speed; it must change neither the images nor where a checkpoint resumes."""
    folder, batches = whole
    model = Watcher()
    data = TinyDataModule(num_workers=2)
    trainer(tmp_path, callbacks=[every_step(tmp_path)], max_epochs=2).fit(
        model, datamodule=data, ckpt_path=folder / f"{step}.ckpt"
    )
    assert model.batches == batches[step : 2 * BATCHES]
    # A checkpoint of a run with workers, which fetch batches ahead of the training, resumes the same.
    again = Watcher()
    trainer(tmp_path, enable_checkpointing=False).fit(
        again, datamodule=TinyDataModule(num_workers=2), ckpt_path=tmp_path / f"{BATCHES + 2}.ckpt"
    )
    assert again.batches == batches[BATCHES + 2 :]


@pytest.mark.parametrize(("step", "limit"), [(2, 3), (3, 3), (4, 3)])
def test_resumes_in_epochs_that_are_cut_short(step: int, limit: int, tmp_path: Path) -> None:
    """limit_train_batches ends epochs early; the loader must not finish them after a resume."""
    model, again = Watcher(), Watcher()
    cut = {"limit_train_batches": limit, "max_epochs": 2}
    trainer(tmp_path, callbacks=[every_step(tmp_path)], **cut).fit(model, datamodule=TinyDataModule())
    assert [epoch for epoch, _, _ in model.batches] == [0] * limit + [1] * limit
    trainer(tmp_path, enable_checkpointing=False, **cut).fit(
        again, datamodule=TinyDataModule(), ckpt_path=tmp_path / f"{step}.ckpt"
    )
    assert again.batches == model.batches[step:]


def test_resumes_from_the_checkpoint_of_an_epoch_end(
    whole: tuple[Path, list[tuple[int, list[int], float]]], tmp_path: Path
) -> None:
    """The usual checkpoint, saved per epoch, must start the next epoch and not repeat the last."""
    _, batches = whole
    first, again = Watcher(), Watcher()
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[keep], max_epochs=2).fit(first, datamodule=TinyDataModule())
    trainer(tmp_path, enable_checkpointing=False).fit(
        again, datamodule=TinyDataModule(), ckpt_path=keep.best_model_path
    )
    assert first.batches + again.batches == batches


def test_the_loader_leaves_the_global_random_state_alone() -> None:
    """Dropout would otherwise depend on how the data are loaded, and runs could not be compared."""
    data = TinyDataModule()
    data.setup("fit")
    before = torch.random.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for _ in loader:
            pass
    assert torch.equal(torch.random.get_rng_state(), before)


def test_prediction_goes_through_lightnings_own_sampler(tmp_path: Path) -> None:
    """Lightning swaps the sampler for prediction; ours must survive that in order."""
    model = Watcher()
    trainer(tmp_path).predict(model, datamodule=TinyDataModule(eval_batch_size=7), return_predictions=False)
    assert model.predicted == list(range(40))


def test_state_before_during_and_after_an_epoch() -> None:
    """A checkpoint may be written at any moment; the count must be that of batches handed out."""
    loader = ResumableLoader(range(20), PKBatchSampler(np.repeat(np.arange(10), 2), 2, 2))  # type: ignore[arg-type]
    assert loader.state_dict() == {"epoch": 0, "batch": 0}
    iterator = iter(loader)
    assert loader.state_dict() == {"epoch": 0, "batch": 0}
    whole = [next(iterator).tolist() for _ in range(2)]
    assert loader.state_dict() == {"epoch": 0, "batch": 2}
    whole += [batch.tolist() for batch in iterator]
    assert loader.state_dict() == {"epoch": 0, "batch": 5}
    loader.load_state_dict({"epoch": 0, "batch": 3})
    assert loader.state_dict() == {"epoch": 0, "batch": 3} and len(loader) == 5
    rest = iter(loader)
    assert next(rest).tolist() == whole[3]
    assert loader.state_dict() == {"epoch": 0, "batch": 4}
    loader.load_state_dict({"epoch": 0, "batch": 5})
    assert loader.state_dict() == {"epoch": 1, "batch": 0}


def test_a_batch_sampler_that_cannot_resume_is_refused() -> None:
    """Accepted, it would start the epoch over after a resume without a word."""
    sampler = BatchSampler(SequentialSampler(range(4)), 2, False)
    with pytest.raises(InputError, match=r"batch_sampler must have epoch, state_dict .* got BatchSampler"):
        ResumableLoader(range(4), sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_epoch_may_be_set_after_the_iterator_is_made(workers: int) -> None:
    """Lightning does it in that order; read too early, every epoch would have the first one's batches."""
    data = TinyDataModule(num_workers=workers)
    data.setup("fit")
    loader, other = data.train_dataloader(), data.train_dataloader()
    iterator = iter(loader)
    for either in (loader, other):
        either.batch_sampler.sampler.set_epoch(4)  # type: ignore[union-attr]
    assert [batch["index"].tolist() for batch in iterator] == [batch["index"].tolist() for batch in other]
    assert loader.state_dict() == {"epoch": 4, "batch": BATCHES}
