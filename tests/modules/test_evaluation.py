"""Evaluation under Lightning's Trainer in one process: several sets, the sanity check, NaN, and other evaluators."""

from __future__ import annotations

import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dml import MetricLearningModule, RetrievalMetrics
from lightning_dml.cli import main
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.errors import InputError, NothingToEvaluate
from lightning_dml.losses import ContrastiveLoss
from lightning_dml.modules.evaluation import SetMetrics, named_loaders
from tests.image_folder import CLASSES, FOLDER_CONFIG, pictures
from tests.tiny import QUIET, TinyData, TinyEmbedder, tiny_module

Batch = dict[str, Tensor]


class Several(TinyData):
    """Validates and tests on three parts of its images."""

    form: type = dict
    names = "abc"

    def setup(self, stage: str | None = None) -> None:
        """Cuts the parts."""
        super().setup(stage)
        whole = self.val_set
        assert isinstance(whole, ArrayDataset)
        cuts = slice(0, 30), slice(20, 60), slice(0, 60, 3)
        self.val_set = self.test_set = {
            name: ArrayDataset(whole.images[cut], whole.labels[cut], whole.transform)
            for name, cut in zip(self.names, cuts, strict=True)
        }

    def val_dataloader(self) -> Any:
        """The parts in a dict or in a list."""
        loaders = super().val_dataloader()
        return loaders if self.form is dict else list(loaders.values())


class Unsorted(Several):
    """The same sets, of which the first has the last name."""

    names = "zca"


class Listed(Several):
    """The same sets, without names."""

    form = list


def by_hand(module: MetricLearningModule, loader: Any, **options: Any) -> dict[str, float]:
    """The values of one evaluator on one loader."""
    metrics = RetrievalMetrics(**options)
    module.eval()
    with torch.no_grad():
        for batch in loader:
            metrics.update(module(batch["image"]), batch["label"], batch["index"])
    return metrics.compute()


def keys(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """Values as they are logged."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize(("data", "names"), [(Several(), "abc"), (Unsorted(), "zca"), (Listed(), "012")])
def test_each_of_several_sets_is_evaluated_by_itself(stage: str, data: Several, names: str) -> None:
    """Rows of one set in the gallery of another, or under its name, would give numbers that no paper could compare."""
    module = tiny_module()
    if stage == "test":  # whose loaders come in a dict
        names = data.names
    returned = getattr(Trainer(**QUIET), stage)(module, data, verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    loaders = data.test_dataloader()
    expected = keys(prefix, by_hand(module, next(iter(loaders.values()))))
    for name, loader in zip(names, loaders.values(), strict=True):
        expected |= keys(f"{prefix}/{name}", by_hand(module, loader))
    assert len(returned) == 3
    for values in returned:
        assert values == pytest.approx(expected, abs=1e-6)
    assert returned[0][f"{prefix}/{names[0]}/recall@1"] != returned[0][f"{prefix}/{names[1]}/recall@1"]


def test_values_per_class_are_there_after_an_evaluation() -> None:
    """Which classes fail is the first question after a validation, and the rows are gone by then."""
    module = tiny_module()
    (several, *_) = Trainer(**QUIET).validate(module, Several(), verbose=False)
    assert list(module.val_metrics.results) == ["a", "b", "c"]
    per_class = module.val_metrics.results["b"].per_class
    assert per_class is not None and len(per_class) == 8
    assert several.keys() >= {f"val/b/{name}" for name in per_class.names}
    Trainer(**QUIET).validate(module, TinyData(), verbose=False)
    (result,) = module.val_metrics.results.values()
    assert result.items == 60


def test_one_set_has_the_plain_names_only() -> None:
    """Configs and dashboards watch val/recall@1; a second name for the same number would be noise."""
    (values,) = Trainer(**QUIET).validate(tiny_module(), TinyData(), verbose=False)
    assert "val/recall@1" in values and all(name.count("/") == 1 for name in values)
    data = TinyData()
    data.setup("validate")
    in_a_dict = Trainer(**QUIET).validate(tiny_module(), {"only": data.val_dataloader()}, verbose=False)
    assert in_a_dict == [values]


def test_a_second_evaluation_takes_the_names_of_its_own_loaders() -> None:
    """A trainer that was fitted on one set and validates on others must not log under the old names."""
    trainer, module = Trainer(max_steps=1, **QUIET), tiny_module()
    trainer.fit(module, TinyData())
    values = trainer.validate(module, Several(), verbose=False)[0]
    assert "val/c/recall@1" in values
    assert "val/c/recall@1" not in trainer.validate(module, TinyData(), verbose=False)[0]


def test_predict_takes_several_sets_too() -> None:
    """Whoever tests on several sets exports the embeddings of several."""
    predictions: Any = Trainer(**QUIET).predict(tiny_module(), Several())
    assert [sum(len(batch["indices"]) for batch in of_set) for of_set in predictions] == [30, 40, 20]


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        ("loader", ["0"]),
        (["x", "y"], ["0", "1"]),
        ({"a": "x", 7: "y"}, ["a", "7"]),
        ({"a": ["x", "y"], "b": {"c": "z"}}, ["a/0", "a/1", "b/c"]),
        (None, ["0"]),
    ],
)
def test_names_follow_lightnings_order(loaders: Any, names: list[str]) -> None:
    """Lightning passes a number only; a name in another place would swap two sets' results."""
    assert list(named_loaders(loaders)) == names


def test_one_name_for_two_sets_is_refused() -> None:
    """The second would overwrite the first one's values."""
    with pytest.raises(InputError, match="two data sets are called '1'"):
        named_loaders({"1": "x", 1: "y"})


def test_checkpoints_and_early_stopping_watch_any_set(tmp_path: Path) -> None:
    """The set that matters is often not the first."""
    history: list[dict[str, float]] = []

    class Log(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                history.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    saver = ModelCheckpoint(tmp_path, monitor="val/b/recall@1", mode="max", filename="{epoch}")
    stop = EarlyStopping("val/c/map@r", mode="max", patience=1, min_delta=10.0)  # nothing is enough
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [Log(), saver, stop]}
    Trainer(max_epochs=9, **options).fit(tiny_module(), Several())
    assert len(history) == 2  # stopped
    assert saver.best_model_score == pytest.approx(max(values["val/b/recall@1"] for values in history))
    assert stop.best_score == pytest.approx(history[0]["val/c/map@r"])


def test_groups_count_where_a_batch_has_them() -> None:
    """Without them, a vehicle's next frame of the same camera would be found, which is no re-identification."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [1.0, 0.22]])
    batch = {"label": torch.tensor([0, 0, 0, 1]), "index": torch.arange(4)}
    recalls = []
    for groups in ({}, {"group": torch.tensor([7, 7, 8, 8])}):
        metrics = SetMetrics("val", RetrievalMetrics(ks=(1,)))
        for row in range(4):
            part = slice(row, row + 1)
            metrics.update(0, rows[part], {name: column[part] for name, column in (batch | groups).items()})
        recalls.append(metrics.compute(["only"], sanity_check=True)["val/recall@1"])
    # With the camera's own frames left out, each of the first two has the other class as its nearest.
    assert recalls == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (["index"], "batch has no 'index', only 'image', 'label': .*'index'"),
        (["label", "index"], "batch has no 'label' and no 'index', only 'image': .*let the data set return them"),
    ],
)
def test_a_batch_without_labels_or_indices_is_explained(lacking: list[str], words: str) -> None:
    """Most data sets return no index, so this is the first thing that a new user meets."""
    data = TinyData()
    data.setup("validate")
    assert isinstance(data.val_set, ArrayDataset)
    samples: list[Any] = [{key: value for key, value in data.val_set[0].items() if key not in lacking}]
    loader: DataLoader[Any] = DataLoader(samples)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        Trainer(**QUIET).validate(tiny_module(), loader, verbose=False)


def test_the_evaluator_is_a_template() -> None:
    """One object for validation and test, or for two sets, would mix their rows."""
    template = RetrievalMetrics(ks=(3,), metric="l2")
    template.update(torch.eye(6), torch.zeros(6, dtype=torch.int64), torch.arange(1000, 1006))
    module = tiny_module(metrics=template)
    values = Trainer(**QUIET).validate(module, Several(), verbose=False)[0]
    tested = Trainer(**QUIET).test(module, Several(), verbose=False)[0]
    data = Several()
    data.setup("validate")
    for name, loader in data.val_dataloader().items():
        expected = by_hand(module, loader, ks=(3,), metric="l2")
        assert {key: values[f"val/{name}/{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
        assert tested[f"test/{name}/recall@3"] == values[f"val/{name}/recall@3"]
    assert "val/recall@1" not in values
    assert template.update_count == 1  # as it was


def test_an_interrupted_evaluation_leaves_nothing_behind() -> None:
    """Rows of the old weights would stay, and by their index they would replace the new ones."""

    class Stops(MetricLearningModule):
        stops = True

        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            if self.stops:
                raise RuntimeError("stop")

    module = Stops(TinyEmbedder(seed=3), ContrastiveLoss())
    with pytest.raises(RuntimeError, match="stop"):
        Trainer(**QUIET).validate(module, TinyData(), verbose=False)
    module.stops = False
    module.load_state_dict(tiny_module().state_dict())
    values = Trainer(**QUIET).validate(module, TinyData(), verbose=False)[0]
    assert values == Trainer(**QUIET).validate(tiny_module(), TinyData(), verbose=False)[0]


class Start(MetricLearningModule):
    """Notes what the sanity check computed, and when the rate was lowered."""

    sanity: list[float]

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Keeps what was computed while sanity checking, which Lightning throws away."""
        if name == "val/recall@1" and self.trainer.sanity_checking:
            self.sanity.append(float(value))
        super().log(name, value, *args, **options)


def start(tmp_path: Path, sanity_steps: int, eval_batch_size: int) -> tuple[Start, list[Any]]:
    """A fit that chooses a checkpoint, may stop early and lowers its rate, and what these were left with."""
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0)
    rule = partial(torch.optim.SGD, lr=0.05)
    module = Start(TinyEmbedder(), ContrastiveLoss(0.3), optimizer=rule, lr_scheduler=plateau)
    module.sanity = []
    saver = ModelCheckpoint(tmp_path / str(sanity_steps), monitor="val/recall@1", mode="max", filename="{epoch}")
    stop = EarlyStopping("val/recall@1", mode="max", patience=2)
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [saver, stop]}
    trainer = Trainer(max_epochs=4, num_sanity_val_steps=sanity_steps, **options)
    trainer.fit(module, TinyData(eval_batch_size=eval_batch_size))
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    scores = [float(saver.best_model_score or 0), Path(saver.best_model_path).name, float(stop.best_score)]
    return module, [*scores, stop.wait_count, scheduler.best, scheduler.num_bad_epochs, scheduler.last_epoch, metrics]


@pytest.mark.parametrize(("size", "steps"), [(7, 2), (1, 1)])
def test_a_sanity_check_changes_nothing(tmp_path: Path, size: int, steps: int) -> None:
    """One image alone has no match, so its values are NaN: they must stop, save and lower nothing."""
    none, without = start(tmp_path, 0, eval_batch_size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        some, with_check = start(tmp_path, steps, eval_batch_size=size)
    assert none.sanity == [] and len(some.sanity) == 1
    assert math.isnan(some.sanity[0]) == (size == 1)
    assert with_check == without
    assert not [warning for warning in caught if re.search("match|gallery items", str(warning.message))]


class Distinct(TinyData):
    """Validates on images that are alone in their classes, but for the first and the last."""

    def setup(self, stage: str | None = None) -> None:
        """Renumbers the labels."""
        super().setup(stage)
        assert isinstance(self.val_set, ArrayDataset)
        labels = [*range(100, 159), 100]
        self.val_set = ArrayDataset(self.val_set.images, labels, self.val_set.transform)


class Lonely(MetricLearningModule):
    """Sees every validation image in a class of its own."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Renumbers the labels of what is evaluated."""
        super().validation_step(batch | {"label": batch["index"]}, batch_idx, dataloader_idx)


def test_nan_in_the_sanity_check_is_silent_and_without_effect(tmp_path: Path) -> None:
    """The first batches often hold no two images of a class; a warning there would alarm for nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stop = EarlyStopping("val/recall@1", mode="max")  # stops at NaN
        trainer = Trainer(max_epochs=2, num_sanity_val_steps=1, callbacks=[stop], **QUIET)
        trainer.fit(tiny_module(), Distinct())
    messages = [str(warning.message) for warning in caught if "no match" in str(warning.message)]
    assert messages and all(
        "58 of 60" in text for text in messages
    )  # of the whole set; the first batch has no match at all
    assert trainer.current_epoch == 2 and stop.stopped_epoch == 0


def test_an_index_of_more_lists_than_a_sanity_check_has_rows() -> None:
    """Faiss refuses to train it on so few; a fit would die before its first step, where validate runs."""
    evaluator = RetrievalMetrics(index="IVF16,Flat", index_parameters="nprobe=4")
    module = Start(TinyEmbedder(), ContrastiveLoss(0.3), metrics=evaluator)
    module.sanity = []
    trainer = Trainer(max_steps=1, val_check_interval=1, **QUIET)
    trainer.fit(module, TinyData())
    data = TinyData()
    data.setup("validate")
    few = [batch for batch, _ in zip(data.val_dataloader(), range(2), strict=False)]
    assert module.sanity == pytest.approx([by_hand(Start(TinyEmbedder(), ContrastiveLoss()), few)["recall@1"]])
    exact = by_hand(module, data.val_dataloader())
    assert trainer.callback_metrics["val/index_recall"] < 1  # the index is in use where there are rows enough
    assert trainer.callback_metrics["val/map@r"] != pytest.approx(exact["map@r"])
    assert (evaluator.options.index, evaluator.options.index_parameters) == ("IVF16,Flat", "nprobe=4")


def queries_first(queries: int) -> DataLoader[Any]:
    """Validation images of which the first ones are queries only and the others gallery only."""
    data = TinyData()
    data.setup("validate")
    assert isinstance(data.val_set, ArrayDataset)
    order = sorted(range(60), key=lambda place: place % 5)  # one image of each class after the other
    roles = [{"is_query": number < queries, "is_gallery": number >= queries} for number in range(60)]
    samples: list[Any] = [{**data.val_set[place], **role} for place, role in zip(order, roles, strict=True)]
    return DataLoader(samples, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["before", "after", None])
def test_a_sanity_check_may_see_queries_only(other: str | None) -> None:
    """Such a loader is sound, and the fit must not die of the order of its images."""
    data = TinyData()
    data.setup("fit")
    loaders: dict[str, Any] = {"roles": queries_first(24)}
    if other is not None:
        plain = {"plain": data.val_dataloader()}
        loaders = plain | loaders if other == "before" else loaders | plain
    module = Start(TinyEmbedder(), ContrastiveLoss(0.3))
    module.sanity = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(max_steps=1, val_check_interval=1, **QUIET)
        trainer.fit(module, data.train_dataloader(), loaders)
    assert len(module.sanity) == (other == "before")  # the first set's, where it has both
    assert not [warning for warning in caught if re.search("match|gallery", str(warning.message))]
    (expected, *_) = Trainer(**QUIET).validate(module, loaders, verbose=False)
    assert {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name} == expected
    assert not any(math.isnan(value) for value in expected.values())


@pytest.mark.parametrize("queries", [0, 60])
def test_a_whole_set_without_queries_or_gallery_is_refused(queries: int) -> None:
    """Left out in silence, the value that a checkpoint watches would be missing, or that of another set."""
    data = TinyData()
    data.setup("validate")
    loaders = {"plain": data.val_dataloader(), "roles": queries_first(queries)}
    with pytest.raises(NothingToEvaluate):
        Trainer(**QUIET).validate(tiny_module(), loaders, verbose=False)


def test_a_set_that_is_left_out_leaves_no_result() -> None:
    """A template that somebody has computed before would pass its own result off as the set's."""
    rows, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    template = RetrievalMetrics(ks=(1,))
    template.update(rows, labels)
    template.compute()
    metrics = SetMetrics("val", template)
    batch = {"label": labels, "index": torch.arange(4)}
    metrics.update(0, rows, batch | {"is_gallery": torch.zeros(4, dtype=torch.bool)})
    metrics.update(1, rows, batch)
    values = metrics.compute(["a", "b"], sanity_check=True)
    assert list(metrics.results) == ["b"] and {name.rsplit("/", 1)[0] for name in values} == {"val/b"}
    with pytest.raises(NothingToEvaluate):
        metrics.compute(["a", "b"])


def test_nan_everywhere_warns_saves_and_stops(tmp_path: Path) -> None:
    """NaN without a word looks like a failed training; what Lightning makes of it is what the docs say."""
    module = Lonely(TinyEmbedder(), ContrastiveLoss())
    saver = ModelCheckpoint(tmp_path, monitor="val/recall@1", mode="max", filename="{epoch}")
    options = {**QUIET, "enable_checkpointing": True}
    stop = EarlyStopping("val/recall@1", mode="max", patience=9)
    trainer = Trainer(max_epochs=5, num_sanity_val_steps=0, callbacks=[saver, stop], **options)
    with pytest.warns(UserWarning, match="val: 60 of 60 queries have no match"):
        trainer.fit(module, TinyData())
    assert math.isnan(float(trainer.callback_metrics["val/recall@1"]))
    assert trainer.current_epoch == 1  # of five; NaN is not worth its patience
    assert saver.best_model_path and saver.best_model_score == -math.inf


def test_errors_show_in_the_sanity_check() -> None:
    """It is there to find a broken evaluation before the first epoch."""

    class Broken(TinyEmbedder):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1.0 if self.training else math.nan)

    trained: list[int] = []

    class Log(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            trained.append(1)

    module = MetricLearningModule(Broken(), ContrastiveLoss())
    with pytest.raises(InputError, match="NaN"):
        Trainer(max_epochs=1, num_sanity_val_steps=2, callbacks=[Log()], **QUIET).fit(module, TinyData())
    assert not trained


def test_evaluators_and_further_folders_come_from_yaml(folder: Path) -> None:
    """The command line has no Python code to make an evaluator; the checkpoint must bring its own along."""
    pictures(folder / "images", CLASSES)
    pictures(folder / "night", dict.fromkeys("uvw", 3))
    (folder / "config.yaml").write_text(FOLDER_CONFIG)
    (folder / "evaluation.yaml").write_text(
        """
model:
  init_args:
    metrics:
      class_path: lightning_dml.RetrievalMetrics
      init_args: {ks: [1, 5], metric: l2}
data:
  init_args:
    val_roots: {night: night}
trainer:
  enable_checkpointing: true
  callbacks:
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {dirpath: ., monitor: val/night/recall@5, mode: max, filename: best}
    - class_path: pytorch_lightning.callbacks.EarlyStopping
      init_args: {monitor: val/val/map@r, mode: max}
"""
    )
    main(["fit", "--config", "config.yaml", "--config", "evaluation.yaml"])
    loaded = MetricLearningModule.load_from_checkpoint(folder / "best.ckpt", map_location="cpu")
    assert (loaded.val_metrics[0].options.ks, loaded.test_metrics[0].options.metric) == ((1, 5), "l2")
    saved = torch.load(folder / "best.ckpt", weights_only=True)
    assert not any("metrics" in name for name in saved["state_dict"])
