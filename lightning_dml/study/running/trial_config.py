"""The folder of one training: the config that is written there, the checkpoint to go on from, the result."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_dml.files import write_whole
from lightning_dml.study.plan.grid import Run
from lightning_dml.study.plan.overrides import overlay
from lightning_dml.study.plan.study_file import Course

CONFIG, RESULT, LOG = "trial.yaml", "result.json", "log.txt"
NO_COURSE = Course()
RECORD = "lightning_dml.study.running.record.StudyRecord"


def folder_of(run: Run, output: Path) -> Path:
    """The folder of a training in the output of its study."""
    return output / "trials" / run.key


def training_config(run: Run, folder: Path, course: Course = NO_COURSE) -> dict[str, Any]:
    """The config of `lightning-dml fit` for one training, which writes into `folder` alone.

    Loggers keep their class and, as far as they have a `save_dir`, write into the folder; no logger at all stays none,
    and Lightning's default becomes a CSVLogger. Progress bars are left out, as nobody looks at them. Checkpoints of a
    ModelCheckpoint in the config go to `folder/checkpoints`, others to where Lightning puts them within the folder.
    `StudyRecord` is added to the callbacks.
    """
    noted = {"course": list(course.metrics), "every": course.every} if course.metrics else {}
    record = {"class_path": RECORD, "init_args": {"path": str(folder / RESULT), **noted}}
    trainer = dict(run.point.config.get("trainer") or {})
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    callbacks = [
        _in_folder(callback, folder) for callback in callbacks if not _class_of(callback).endswith("ProgressBar")
    ]
    settings = {
        "default_root_dir": str(folder),
        "enable_progress_bar": False,
        "logger": _loggers(trainer.get("logger"), folder),
        "callbacks": [*callbacks, record],
    }
    config = {"seed_everything": run.seed, **run.point.config, "trainer": {**trainer, **settings}}
    for option in run.point.seed_options:
        config = overlay(config, {option: run.seed})
    return config


def write_config(run: Run, folder: Path, course: Course = NO_COURSE) -> Path:
    """Writes the training's config, with the command that repeats it by hand."""
    path = folder / CONFIG
    config = training_config(run, folder, course)
    header = f"# {run.label}\n#   python -m lightning_dml fit --config {path}\n"
    write_whole(path, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return path


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, if there is one."""
    newest_first = sorted(
        (path for path in folder.rglob("*.ckpt") if path.is_file()),  # not so a link to what is gone
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    return next((path for path in newest_first if zipfile.is_zipfile(path)), None)


def drop_checkpoints(folder: Path) -> None:
    """Removes all checkpoints, wherever in the folder; those of sharded strategies are folders."""
    for path in [*folder.rglob("*.ckpt"), folder / "checkpoints"]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result that `StudyRecord` wrote; None if the training did not come to its end."""
    path = folder / RESULT
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def metric_value(result: Mapping[str, Any], name: str, mode: str, value: str) -> float:
    """The last value of a metric or its best; not a number where it is missing or was not finite."""
    key = mode if value == "best" else "last"
    number = result.get("metrics", {}).get(name, {}).get(key)
    return math.nan if number is None else float(number)


def set_aside(folder: Path, suffix: str) -> Path:
    """Renames a folder, so that the next attempt starts in an empty one."""
    place, number = folder.with_name(f"{folder.name}-{suffix}"), 2
    while place.exists():
        place, number = folder.with_name(f"{folder.name}-{suffix}-{number}"), number + 1
    os.replace(folder, place)
    return place


def keep_logged(folder: Path) -> None:
    """Renames the metrics of the start before, as CSVLogger deletes what it finds."""
    path, number = folder / "metrics.csv", 1
    while path.exists() and (folder / f"metrics-start{number}.csv").exists():
        number += 1
    if path.exists():
        os.replace(path, folder / f"metrics-start{number}.csv")


def _loggers(loggers: Any, folder: Path) -> Any:
    if loggers is False:
        return False
    if loggers is None or loggers is True:
        loggers = {"class_path": "pytorch_lightning.loggers.CSVLogger"}
    several = loggers if isinstance(loggers, list) else [loggers]
    return [_logger(logger, folder) for logger in several]


def _logger(logger: Any, folder: Path) -> Any:
    logger = logger if isinstance(logger, Mapping) else {"class_path": logger}
    name = _class_of(logger)
    place: dict[str, Any] = {"save_dir": str(folder)} if _has_save_dir(name) else {}
    if name.endswith(("CSVLogger", "TensorBoardLogger")):
        place.update(name="", version="")  # else they would make folders of their own inside
    return overlay(logger, {"init_args": place}) if place else logger


def _has_save_dir(name: str) -> bool:
    """True when a logger takes `save_dir`; of a class that is not to be found, the training itself will tell."""
    if name.endswith(("CSVLogger", "TensorBoardLogger", "WandbLogger", "MLFlowLogger")):
        return True
    module, _, short = name.rpartition(".")
    try:
        logger_class = getattr(importlib.import_module(module or "pytorch_lightning.loggers"), short)
    except (ImportError, AttributeError, ValueError):
        return False
    for base in (base for base in getattr(logger_class, "__mro__", ()) if "__init__" in vars(base)):
        options = inspect.signature(base.__init__).parameters
        if "save_dir" in options:
            return True
        if not any(option.kind == option.VAR_KEYWORD for option in options.values()):
            return False
    return False


def _class_of(item: Any) -> str:
    """The class of an item of a config, which may be a path alone."""
    return str(item.get("class_path")) if isinstance(item, Mapping) else str(item)


def _in_folder(callback: Any, folder: Path) -> Any:
    if isinstance(callback, Mapping) and _class_of(callback).endswith("ModelCheckpoint"):
        return overlay(callback, {"init_args": {"dirpath": str(folder / "checkpoints")}})
    return callback
