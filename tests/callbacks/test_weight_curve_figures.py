"""Figures of the logger of pair weights: files, loggers of every kind, and what goes wrong with them."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_dml.callbacks import WeightCurveLogger, weight_curve_logger
from lightning_dml.report import pair_figure
from tests.callbacks.logger_cases import fit, warnings_of


def test_figures_come_as_files_and_into_tensorboard(tmp_path: Path) -> None:
    """Somebody opens TensorBoard, or the folder, and sees the pairs of step 4."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    before = pyplot.get_fignums()
    logger = WeightCurveLogger(2, figure_every_n_steps=4, points=50)
    loggers: list[Logger] = [TensorBoardLogger(tmp_path, name="run"), CSVLogger(tmp_path, name="csv")]
    fit(logger, steps=6, bank={}, logger=loggers)
    written = tmp_path / "run/version_0/weight_curves"
    stems = ["over_time", "step_000004_batch", "step_000004_memory"]
    assert sorted(path.name for path in written.iterdir()) == sorted(
        f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "png", "svg")
    )
    with (written / "step_000004_memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    # A curve too, as contrastive weights follow from the similarity alone.
    assert {row["kind"] for row in rows} == {"curve", "pair", "density"}
    assert sum(row["kind"] == "pair" and row["side"] == "negative" for row in rows) == 50
    for row in rows:
        if row["kind"] == "pair":  # points lie on the curve: 1 for positives and for negatives above the margin
            above = row["side"] == "positive" or float(row["similarity"]) > 0.3
            assert float(row["weight"]) == pytest.approx(float(above))
    with (written / "over_time.csv").open() as file:
        table = list(csv.DictReader(file))
    forces = [float(row["pairs/memory/negative_force"]) for row in table]
    assert forces == [figures["pairs/memory/negative_force"] for figures in logger.history]

    events = reader.EventAccumulator(str(tmp_path / "run/version_0"), {"images": 0}).Reload()
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"pairs/batch/weights": [4], "pairs/memory/weights": [4], "pairs/over_time": [6]}
    assert pyplot.get_fignums() == before  # a thousand open figures would fill the memory of a long training
    picture = events.Images("pairs/memory/weights")[0]
    assert (picture.width, picture.height) == (1100, 680)
    assert "pairs/batch/positive_force" in events.Tags()["scalars"]


class Plain(Logger):
    """The least that Lightning takes for a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, int | str]] = []

    @property
    def name(self) -> str:
        """Its name."""
        return "plain"

    @property
    def version(self) -> int:
        """Its version."""
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Takes none."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Keeps none."""


class Writer:
    """The part of TensorBoard's writer that is of interest here."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int | str]] = []

    def add_figure(
        self, tag: str, figure: Any, global_step: int | None = None, close: bool = True, walltime: float | None = None
    ) -> None:
        """`torch.utils.tensorboard.SummaryWriter.add_figure`."""
        assert global_step is not None and not close
        self.calls.append((tag, figure, global_step))


class Taker(Plain):
    """Any logger whose experiment takes figures."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Writer()


class WandbLogger(Plain):
    """`log_image` as Lightning's logger of Weights & Biases has it."""

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Takes a list of pictures."""
        assert isinstance(images, list) and not kwargs and step is not None
        self.calls.append((key, images[0], step))


class MLFlowLogger(Plain):
    """Its experiment is an `MlflowClient`."""

    run_id = "run 7"

    @property
    def experiment(self) -> Any:
        """The client."""
        return self

    def log_figure(
        self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: dict[str, Any] | None = None
    ) -> None:
        """`MlflowClient.log_figure`."""
        assert run_id == self.run_id
        name, _, file = artifact_file.rpartition("/")
        self.calls.append((name, figure, file))


class CometLogger(Plain):
    """Its experiment is a `comet_ml.Experiment`."""

    @property
    def experiment(self) -> Any:
        """The experiment."""
        return self

    def log_figure(
        self, figure_name: str | None = None, figure: Any = None, overwrite: bool = False, step: int | None = None
    ) -> None:
        """`comet_ml.Experiment.log_figure`."""
        assert figure_name is not None and step is not None
        self.calls.append((figure_name, figure, step))


class NeptuneLogger(Plain):
    """Its experiment is a `neptune.Run`, which gives fields by their paths."""

    @property
    def experiment(self) -> Any:
        """The run."""
        return self

    def __getitem__(self, path: str) -> Any:
        """A field, whose `append` is that of `neptune.handler.Handler`."""

        class Field:
            def append(field, value: Any, *, step: float | None = None, wait: bool = False, **_: Any) -> None:
                assert step is not None
                self.calls.append((path, value, int(step)))

        return Field()


class Renamed(MLFlowLogger):
    """Somebody's own on top of one of these."""


class Broken(Plain):
    """Its server is away."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Fails."""
        raise ConnectionError("the server is away")


@pytest.mark.parametrize("options", [{"figures": False}, {"files": False}])
def test_figures_and_files_can_be_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    """A sweep of thousands of trainings needs numbers, not pictures."""
    taker = Taker()
    fit(WeightCurveLogger(2, figure_every_n_steps=4, **options), logger=taker, default_root_dir=tmp_path)
    assert not list(tmp_path.rglob("weight_curves"))
    assert bool(taker.experiment.calls) == ("files" in options)


def test_every_logger_that_takes_figures_gets_them() -> None:
    """Each library has its own call; a wrong keyword shows only when a training of hours reaches it."""
    loggers: list[Plain] = [Taker(), WandbLogger(), MLFlowLogger(), CometLogger(), NeptuneLogger(), Renamed(), Plain()]
    fit(WeightCurveLogger(2, figure_every_n_steps=2, files=False), steps=2, logger=loggers)
    for logger in loggers:
        calls = logger.experiment.calls if isinstance(logger, Taker) else logger.calls
        if type(logger) is Plain:
            assert calls == []
            continue
        assert [name for name, _, _ in calls] == ["pairs/batch/weights", "pairs/over_time"]
        for _, figure, step in calls:
            assert step == ("step_000002.png" if isinstance(logger, MLFlowLogger) else 2)
            if isinstance(logger, WandbLogger):
                assert figure.dtype == np.uint8 and figure.shape[2] == 3 and figure.shape[1] in (1100, 720)
                assert figure.std() > 10  # not a blank page
            else:
                assert isinstance(figure, Figure)


def test_a_logger_that_fails_is_reported_once_and_the_others_get_theirs() -> None:
    """An outage of a server must not end a training, nor take away what others would have got."""
    taker = Taker()
    logger = WeightCurveLogger(2, figure_every_n_steps=2, files=False)
    (message,) = warnings_of(lambda: fit(logger, steps=4, logger=[Broken(), taker]))
    assert "Broken" in message and "the server is away" in message
    assert [step for _, _, step in taker.experiment.calls] == [2, 4, 4]


def test_a_full_disk_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is worth more than its pictures."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pair_figure, "save_curves", fail)
    monkeypatch.setattr(weight_curve_logger, "save_training", fail)
    taker = Taker()
    logger = WeightCurveLogger(2, figure_every_n_steps=4)
    (message,) = warnings_of(lambda: fit(logger, logger=taker, default_root_dir=tmp_path))
    assert "no space left" in message
    assert len(taker.experiment.calls) == 3 and len(logger.history) == 4
