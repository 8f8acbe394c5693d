"""Real trainings of a study: the config that is written, the record that comes back, resumption, the command."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_dml.cli import main
from lightning_dml.commands.training_configs import config_parser
from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import Point, Run, points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.running.ledger import Ledger
from lightning_dml.study.running.record import StudyRecord
from lightning_dml.study.running.storage import open_storage
from lightning_dml.study.running.trial_config import drop_checkpoints, last_checkpoint, metric_value, training_config
from lightning_dml.study.running.worker import _environment
from tests.helpers import ROOT
from tests.tiny import QUIET, TinyData, tiny_module

SMOKE = ROOT / "configs/study/smoke.yaml"
EPOCHS = 20


class LogsNowAndThen(Callback):
    """Logs the number of the step at every second one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """As `DriftMonitor` does."""
        if trainer.global_step % 2 == 0:
            pl_module.log("own/step", float(trainer.global_step), on_step=True, on_epoch=False)


class NotesRecalls(Callback):
    """The values of the validations, by step."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes it down."""
        self.found[trainer.global_step] = float(trainer.callback_metrics["val/recall@1"])


def fit(folder: Path, epochs: int, checkpoint: Path | None = None, *further: Callback) -> dict[str, Any]:
    """Trains for some epochs in all and returns the record."""
    record = StudyRecord(str(folder / "result.json"), ["own/step", "val/recall@1", "own/none"], every=3)
    saver = ModelCheckpoint(folder, save_last=True)
    options = {**QUIET, "enable_checkpointing": True}
    callbacks = [*further, LogsNowAndThen(), record, saver]
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **options)
    trainer.fit(tiny_module(), TinyData(), ckpt_path=checkpoint, weights_only=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_the_record_is_that_of_all_validations_also_after_a_resumption(tmp_path: Path) -> None:
    """The best epoch may have been before the kill; and a run that was killed at its very end is only to be told of."""
    recalls = NotesRecalls()
    whole = fit(tmp_path / "whole", 4, None, recalls)
    first = fit(tmp_path / "parts", 2)
    (tmp_path / "parts/result.json").unlink()
    parts = fit(tmp_path / "parts", 4, tmp_path / "parts/last.ckpt")
    assert parts["metrics"] == whole["metrics"] and parts["step"] == whole["step"] > first["step"]
    assert parts["seconds"] > first["seconds"] > 0
    recall = whole["metrics"]["val/recall@1"]
    assert recall["min"] <= recall["last"] <= recall["max"] and recall["max_step"] in range(0, whole["step"] + 1)
    steps = list(range(3, whole["step"] + 1, 3))
    assert parts["course"] == whole["course"] and len(steps) > 3
    assert whole["course"]["own/step"] == [[step, step - step % 2] for step in steps]
    assert "own/none" not in whole["course"]
    each_epoch = whole["step"] // 4
    validated = {step: recalls.found[step // each_epoch * each_epoch] for step in steps if step >= each_epoch}
    assert each_epoch % 3 == 0 and dict(whole["course"]["val/recall@1"]) == pytest.approx(validated)
    (tmp_path / "parts/result.json").unlink()
    again = fit(tmp_path / "parts", 4, tmp_path / "parts/last.ckpt")
    assert again["metrics"] == whole["metrics"] and again["course"] == whole["course"]


def test_values_that_are_no_numbers_are_told_apart(tmp_path: Path) -> None:
    """A loss that became nan must fail the training and not pass for its best value."""
    record = StudyRecord(str(tmp_path / "result.json"))
    for step, value in enumerate([0.5, 0.75, math.nan]):
        record._note("val/x", value, step)
    assert (record.metrics["val/x"]["max"], record.metrics["val/x"]["max_step"]) == (0.75, 1)
    assert math.isnan(record.metrics["val/x"]["last"])
    result = {"metrics": {"val/x": {"last": None, "max": 0.75, "min": 0.5}}}
    assert math.isnan(metric_value(result, "val/x", "max", "last"))
    assert metric_value(result, "val/x", "max", "best") == 0.75
    assert metric_value(result, "val/x", "min", "best") == 0.5
    assert math.isnan(metric_value(result, "val/y", "min", "best"))


def test_a_training_writes_into_its_own_folder(tmp_path: Path) -> None:
    """Two trainings that shared a log or a checkpoint folder would spoil each other."""
    study = StudyFile.read(SMOKE)
    run = runs_of(study, points_of(study))[-1]
    config = training_config(run, tmp_path / "one")
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == run.seed == 1
    trainer = config["trainer"]
    assert {logger["init_args"]["save_dir"] for logger in trainer["logger"]} == {str(tmp_path / "one")}
    names = [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]]
    assert names == ["MemoryBankCallback", "ModelCheckpoint", "StudyRecord"]
    assert trainer["callbacks"][1]["init_args"]["dirpath"] == str(tmp_path / "one/checkpoints")
    config_parser()(config)
    bare = training_config(type(run)(type(run.point)({}, {"trainer": {"logger": False}}, "k"), 0), tmp_path)
    assert bare["trainer"]["logger"] is False
    assert "logger" not in json.dumps(run.point.config).partition("StudyRecord")[2]


class Plain(CSVLogger):
    """A logger of somebody's own that leaves the folder to the one below it."""

    def __init__(self, flush: int = 1, **options: Any) -> None:
        super().__init__(flush_logs_every_n_steps=flush, **options)


class Elsewhere(DummyLogger):
    """A logger that writes into no folder."""

    def __init__(self, server: str = "none") -> None:
        super().__init__()


def test_loggers_and_callbacks_of_all_kinds_are_taken(tmp_path: Path) -> None:
    """An option that a logger does not have, or a progress bar where bars are off, would fail every training."""
    loggers = [f"{__name__}.{name}" for name in ("Plain", "Elsewhere", "Missing")] + ["CometLogger", "WandbLogger"]
    callbacks = [{"class_path": f"pytorch_lightning.callbacks.{name}"} for name in ("TQDMProgressBar", "Timer")]
    trainer = {"logger": loggers, "callbacks": [*callbacks, "RichProgressBar"]}
    config = training_config(Run(Point({}, {"trainer": trainer}, "k"), 0), tmp_path)["trainer"]
    places = [logger.get("init_args", {}).get("save_dir") for logger in config["logger"]]
    assert places == [str(tmp_path), None, None, None, str(tmp_path)]
    assert [callback["class_path"].rpartition(".")[2] for callback in config["callbacks"]] == ["Timer", "StudyRecord"]


def test_checkpoints_go_wherever_they_are(tmp_path: Path) -> None:
    """A hundred trainings fill a disk; a logger with a name has its checkpoints in a folder of its own."""
    for place in ("checkpoints/last.ckpt", "project/run1/checkpoints/a.ckpt", "project/run2/sharded.ckpt/part"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    (tmp_path / "project/last.ckpt").symlink_to(tmp_path / "project/run1/checkpoints/a.ckpt")
    (tmp_path / "result.json").touch()
    drop_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == ["result.json"]
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "checkpoints").exists()


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    """A kill may fall into the writing of one, or between that of one and of the link to it."""
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert last_checkpoint(tmp_path) is None
    for age, name in enumerate(("broken", "new", "old")):
        torch.save({"step": torch.zeros(3)}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1e9 - age, 1e9 - age))
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(broken.read_bytes()[:100])
    os.utime(broken, (2e9, 2e9))
    assert last_checkpoint(tmp_path) == tmp_path / "new.ckpt"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trainer": {"max_epochz": 3}}, "max_epochz"),
        ({"trainer": {"max_epochs": "many"}}, "max_epochs"),
        ({"trainer": {"callbacks": [{"class_path": "lightning_dml.callbacks.MemoryBankCallbck"}]}}, "callbacks"),
        ({"model": {"class_path": "MetricLearningModule", "init_args": {"los": 1}}}, "los"),
    ],
)
def test_the_parser_of_fit_finds_what_is_no_option(config: dict[str, Any], said: str) -> None:
    """A typo shows in seconds and not when the variant's turn has come."""
    with pytest.raises(InputError, match=said):
        config_parser()(
            {"data": {"class_path": "GlyphsDataModule"}, "model": {"class_path": "MetricLearningModule"}, **config}
        )


def test_the_command_plans_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config of the documentation, and a typo in it, from the command line."""
    monkeypatch.chdir(tmp_path)
    main(["study", "--config", str(SMOKE), "--dry-run"])
    assert "study smoke: 10 trainings: 10 waiting" in capsys.readouterr().out
    content = yaml.safe_load(SMOKE.read_text())
    content["base"][0] = str(ROOT / "configs/quickstart.yaml")
    content["axes"]["memory"]["half"] = {"trainer.callbacks.MemoryBankCallback.init_args.sice": 0.5}
    Path("typo.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit) as status:
        main(["study", "--config", "typo.yaml", "--dry-run"])
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert "lightning-dml: error: the training config of (memory=half" in said and "sice" in said
    logger = {"class_path": "CSVLogger", "init_args": {"sive_dir": 1}}
    content["axes"]["memory"]["half"] = {"trainer.max_epochs": 9, "trainer.logger": [logger]}
    Path("typo.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit):
        main(["study", "--config", "typo.yaml", "--dry-run"])
    assert "memory=half" in (said := capsys.readouterr().err) and "sive_dir" in said
    assert not Path("runs").exists()


def test_a_training_is_none_of_the_slurm_tasks_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task of an array is a worker; Lightning would wait for the other tasks, or refuse a number of GPUs."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "study"}.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    assert not SLURMEnvironment.detect()


@pytest.mark.slow
def test_a_real_training_is_killed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL to worker and training; the next worker resumes the training from its checkpoint and reports."""
    saver = {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    loss = {"class_path": "lightning_dml.losses.ContrastiveLoss"}
    module = {"embedder": {"class_path": "tests.tiny.TinyEmbedder"}, "loss": loss}
    base = {
        "model": {"class_path": "MetricLearningModule", "init_args": module},
        "data": {"class_path": "tests.tiny.TinyData"},
        "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu", "callbacks": [saver]},
    }
    content = {"base": base, "axes": {"a": {"b": {}}}, "metric": "val/recall@1", "keep_checkpoints": False}
    content["course"] = {"metrics": ["train/loss"], "every": 1}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lightning_dml", "study", "--config", "real.yaml"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    place = tmp_path / "runs/study/real/trials"
    end = time.monotonic() + 300
    while not list(place.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < end and worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    main(["study", "--config", "real.yaml"])
    printed = capsys.readouterr().out
    assert "attempt 2, going on from" in printed and "1 training: 1 finished" in printed
    (folder,) = place.iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] % EPOCHS == 0 and 0 < result["metrics"]["val/recall@1"]["max"] <= 1
    assert (folder / "metrics-start1.csv").exists() and not (folder / "checkpoints").exists()
    with Path("runs/study/real/course.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, result["step"] + 1))
    study = StudyFile.read("real.yaml")
    (entry,) = Ledger(open_storage(study.storage), study.name, study.mode, study.lease).entries().values()
    assert "course" not in entry.attributes["result"]
    # Epochs are counted in what both processes logged: none of them was trained anew but those after the checkpoint.
    with (folder / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row["val/recall@1"]]
    assert epochs == list(range(epochs[0], EPOCHS)) and epochs[0] > 0
