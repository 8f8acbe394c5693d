"""The command line on the repository's own configs: it trains, writes, prints and refuses."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_dml import MetricLearningModule
from lightning_dml.cli import main
from tests.helpers import ROOT
from tests.image_folder import CLASSES, FOLDER_CONFIG, pictures

QUICKSTART = ("fit", "--config", str(ROOT / "configs/quickstart.yaml"))
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2")
CPU = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


def test_quickstart_trains_evaluates_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first command of the README: table, figure, logs and a checkpoint that loads without the config."""
    main([*QUICKSTART, *SHORT, *CPU, "--trainer.log_every_n_steps=1"])
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["Recall@1", "Recall@2", "Recall@4", "Recall@8", "MAP@R", "seconds"] in lines
    assert any(line[:1] == ["untrained"] for line in lines) and any(line[:1] == ["trained,"] for line in lines)
    run = folder / "runs/quickstart/version_0"
    assert Image.open(run / "retrieval.png").size > (400, 400)
    assert f"{run.relative_to(folder)}/retrieval.png" in printed
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val/recall@1"]) for row in rows if row["val/recall@1"]]
    assert len([row for row in rows if row["train/loss"]]) == 3
    assert list((folder / "runs/tensorboard/quickstart/version_0").glob("events.*"))
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert not any("bank" in name for name in checkpoint["state_dict"])
    loaded = MetricLearningModule.load_from_checkpoint(run / "checkpoints/best.ckpt", map_location="cpu")
    assert torch.equal(
        loaded.state_dict()["embedder.projection.bias"], checkpoint["state_dict"]["embedder.projection.bias"]
    )


def test_the_baseline_is_the_same_config_without_memory(folder: Path) -> None:
    """A comparison is fair only if the memory is all that differs."""
    main([*QUICKSTART, *SHORT, *CPU, "--config", str(ROOT / "configs/no-memory.yaml")])
    checkpoint = torch.load(folder / "runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert not any("MemoryBank" in name for name in checkpoint["callbacks"])


def test_a_run_resumes_and_its_checkpoint_is_tested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a crash the report must still compare with the untrained model, not with the resumed one."""
    main([*QUICKSTART, *SHORT, *CPU])
    untrained = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("untrained"))
    last = str(folder / "runs/quickstart/version_0/checkpoints/last.ckpt")
    main([*QUICKSTART, *CPU, *SHORT[1:], "--trainer.max_epochs=2", "--ckpt_path", last])
    printed = capsys.readouterr().out
    assert untrained in printed.splitlines()  # the row of the first start, though this fit began at step 3
    assert "trained, step 6" in printed
    main(["test", *QUICKSTART[1:], *CPU, "--trainer.limit_test_batches=2", "--ckpt_path", last])
    assert "test/recall@1" in capsys.readouterr().out


def test_validate_without_a_checkpoint_says_so(folder: Path) -> None:
    """Numbers of random weights would pass for those of the trained model."""
    with pytest.warns(UserWarning, match="validate runs without --ckpt_path"):
        main(["validate", *QUICKSTART[1:], *CPU, "--trainer.limit_val_batches=2"])


def test_every_kind_of_loss_comes_from_yaml(folder: Path) -> None:
    """A loss that needs Python code is out of reach on the command line."""
    config = folder / "loss.yaml"
    config.write_text(
        """
model:
  init_args:
    loss:
      class_path: lightning_dml.losses.DirectWeightingLoss
      init_args:
        positive: torch.ones_like
        negative:
          class_path: lightning_dml.losses.curves.PiecewiseLinear
          init_args: {points: [[0.2, 0.0], [1.0, 1.0]]}
        miner: {class_path: lightning_dml.losses.MultiSimilarityMiner, init_args: {epsilon: 0.2}}
        reduction: pairs
    memory_loss:
      class_path: lightning_dml.losses.MultiSimilarityLoss
      init_args: {alpha: 2.0, beta: 40.0, base: 0.4, reduction: active_anchors, gather: true, block_bytes: 4096}
    lr_scheduler:
      class_path: pytorch_lightning.cli.ReduceLROnPlateau
      init_args: {monitor: val/recall@1, mode: max}
    lr_interval: epoch
"""
    )
    main([*QUICKSTART, *SHORT, *CPU, "--config", str(config)])
    assert (folder / "runs/quickstart/version_0/checkpoints/best.ckpt").exists()


def fit_folder(folder: Path, *options: str) -> None:
    """The config that a user with a folder of images would write."""
    config = folder / "folder.yaml"
    config.write_text(FOLDER_CONFIG)
    main(["fit", "--config", str(config), *options])


def test_a_folder_of_images_trains(folder: Path) -> None:
    """Own images are what most people come for."""
    pictures(folder / "images", CLASSES)
    fit_folder(folder, "--trainer.enable_checkpointing=true")
    assert list(folder.rglob("*.ckpt"))


NOTHING: tuple[str, ...] = ()
REFUSED = {
    "a wrong model name": (CLASSES, ("--model.embedder.model_name=resnet5O",), "resnet5O.*did you mean resnet50"),
    "a missing folder": (CLASSES, ("--data.root=nowhere",), "nowhere"),
    "a class with one image": ({**CLASSES, "b": 1, "c": 1, "d": 1, "e": 1}, NOTHING, "1 image|one image"),
    "more classes than there are": (CLASSES, ("--data.classes_per_batch=5",), "classes_per_batch"),
    "one image per class": (CLASSES, ("--data.samples_per_class=1",), "samples_per_class.*2"),
    "no validation data": (CLASSES, ("--data.val_fraction=0",), "validation|val_fraction"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_clear_error_before_training(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """A wrong value ends in one line that names it, with no traceback and no training begun."""
    classes, options, words = REFUSED[what]
    pictures(folder / "images", classes)
    with pytest.raises(SystemExit) as stop:
        fit_folder(folder, *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, error[-1]), error
    assert error[-1].startswith("lightning-dml: error: ")
    assert not any("Traceback" in line or "Epoch" in line for line in error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model.embedder.pooling=foo",), "pooling='foo'"),
        (("--model.embedder.model_args.nope=1",), "model_args={'nope': 1}"),
        (("--ckpt_path=nope.ckpt",), "nope.ckpt"),
    ],
)
def test_what_the_libraries_below_refuse_is_one_line_too(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    """A traceback through three libraries hides the one value that is wrong."""
    pictures(folder / "images", CLASSES)
    with pytest.raises(SystemExit):
        fit_folder(folder, *options)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning-dml: error: ") and words in last
