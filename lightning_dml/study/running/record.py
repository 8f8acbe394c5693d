"""`StudyRecord`: the callback that writes what a training brought, for the worker of a study to read."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_dml.files import write_whole


class StudyRecord(Callback):
    """Writes the last, the largest and the smallest value of every logged metric as JSON when a fit ends well.

    Values are taken at the end of each validation. They are in the checkpoints, so that a resumed training tells of all
    of its validations. A value that is not finite is written as null. The course of some metrics can be noted too: what
    had been logged last at every so many optimizer steps, by a validation after that step too; each costs the GPU a
    wait then.

    Args:
        path: the JSON file: `{"metrics": {name: {"last", "max", "min", "max_step", "min_step"}}, "course": {name:
            [[step, value], ...]}, "seconds", "step"}`. Seconds are those of the fit, over all its starts.
        course: names of the logged values whose course is noted.
        every: optimizer steps from one value of a course to the next.

    Examples:
        >>> from lightning_dml.study.running.record import StudyRecord
        >>> StudyRecord("result.json").state_dict()
        {'metrics': {}, 'course': {}, 'noted_step': -1, 'seconds': 0.0}
    """

    def __init__(self, path: str, course: list[str] | None = None, every: int = 1) -> None:
        super().__init__()
        self.path = path
        self.names = course or []
        self.every = every
        self.metrics: dict[str, dict[str, float]] = {}
        self.course: dict[str, list[tuple[int, float]]] = {}
        self._last_step = 0
        self._noted_step = -1
        self._before = 0.0
        self._started: float | None = None
        self._fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew; what a checkpoint holds comes after this."""
        self._fitting = stage == "fit"
        if self._fitting:
            self.metrics, self.course, self._noted_step = {}, {}, -1
            self._before, self._started = 0.0, time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns from which step a checkpoint goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the course where it is time."""
        step, previous = trainer.global_step, self._last_step
        self._last_step = step
        if not self.names or step // self.every == previous // self.every:
            return
        self._noted_step = step
        self._note_course(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what has been logged."""
        if not self._fitting or trainer.sanity_checking:
            return
        for name, tensor in trainer.callback_metrics.items():
            self._note(str(name), float(tensor), trainer.global_step)
        if trainer.global_step == self._noted_step:  # what this validation found belongs to the step that it followed
            self._note_course(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file; a fit that an exception or a signal ended does not come here."""
        if trainer.is_global_zero:
            metrics = {
                name: {key: value if math.isfinite(value) else None for key, value in values.items()}
                for name, values in self.metrics.items()
            }
            course = {
                name: [(step, value if math.isfinite(value) else None) for step, value in values]
                for name, values in self.course.items()
            }
            content = {"metrics": metrics, "course": course, "seconds": self._seconds(), "step": trainer.global_step}
            write_whole(Path(self.path), json.dumps(content, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The values and the seconds so far."""
        return {
            "metrics": {name: dict(values) for name, values in self.metrics.items()},
            "course": {name: list(values) for name, values in self.course.items()},
            "noted_step": self._noted_step,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was noted before the interruption."""
        if self._fitting:
            self.metrics = {name: dict(values) for name, values in state_dict["metrics"].items()}
            self.course = {name: list(values) for name, values in state_dict.get("course", {}).items()}
            self._noted_step = state_dict.get("noted_step", -1)
            self._before = state_dict["seconds"]

    def _note_course(self, trainer: Trainer) -> None:
        # Lightning forgets at a resumption what was logged before; what the last validation found is still known here.
        logged = {name: values["last"] for name, values in self.metrics.items()} | trainer.callback_metrics
        for name in self.names:
            if name in logged:
                values = self.course.setdefault(name, [])
                if values and values[-1][0] == self._noted_step:
                    values.pop()
                values.append((self._noted_step, float(logged[name])))

    def _seconds(self) -> float:
        return self._before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def _note(self, name: str, value: float, step: int) -> None:
        start = {"last": value, "max": -math.inf, "max_step": -1, "min": math.inf, "min_step": -1}
        values = self.metrics.setdefault(name, start)
        values["last"] = value
        if value > values["max"]:
            values["max"], values["max_step"] = value, step
        if value < values["min"]:
            values["min"], values["min_step"] = value, step
