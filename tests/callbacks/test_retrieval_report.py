"""The report: the table's numbers, the figure's file, and the weights left as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_dml import MetricLearningModule, RetrievalMetrics
from lightning_dml.callbacks import RetrievalReport
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss
from lightning_dml.modules.evaluation import gathered_rows
from lightning_dml.report import retrieval_figure
from lightning_dml.retrieval.search import SimilarityName
from tests.tiny import QUIET, TinyData, TinyEmbedder, tiny_module


def fit(report: RetrievalReport, data: TinyData | None = None, steps: int = 4, **settings: Any) -> Any:
    """Trains the tiny module with a report that looks at it before and after."""
    module = tiny_module()
    Trainer(max_steps=steps, callbacks=[report], **{**QUIET, **settings}).fit(module, data or TinyData())
    return module


def test_the_table_holds_the_values_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed gain is what a user judges the training by; it has to be what validate would say."""
    before = Trainer(**QUIET).validate(tiny_module(), TinyData(), verbose=False)[0]
    report = RetrievalReport(ks=(1, 2, 4, 8), path=str(tmp_path / "figure.png"))
    module = fit(report)
    after = Trainer(**QUIET).validate(module, TinyData(), verbose=False)[0]
    for row, expected in zip(report.rows, (before, after), strict=True):
        assert {f"val/{name}": value for name, value in row[1].items()} == pytest.approx(expected, abs=1e-6)
    untrained = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("untrained")).split()
    assert float(untrained[1]) == pytest.approx(100 * before["val/recall@1"], abs=0.06)
    assert float(untrained[5]) == pytest.approx(100 * before["val/map@r"], abs=0.06)


@pytest.mark.parametrize("form", [dict, list])
def test_the_first_of_several_sets_is_reported(tmp_path: Path, form: type) -> None:
    """The table is for one set; taken over all of them, its numbers would be those of none."""
    data = TinyData()
    data.setup("fit")
    assert isinstance(data.val_set, ArrayDataset)
    small = DataLoader(ArrayDataset(data.val_set.images[:10], data.val_set.labels[:10], data.val_set.transform), 7)
    loaders: Any = [data.val_dataloader(), small] if form is list else {"own": data.val_dataloader(), "small": small}
    report = RetrievalReport(path=str(tmp_path / "figure.png"))
    module = tiny_module()
    Trainer(max_steps=2, callbacks=[report], **QUIET).fit(module, data.train_dataloader(), loaders)
    after = Trainer(**QUIET).validate(module, data.val_dataloader(), verbose=False)[0]
    assert {f"val/{name}": value for name, value in report.rows[1][1].items()} == pytest.approx(after, abs=1e-6)
    assert (tmp_path / "figure.png").exists()


def test_an_image_that_is_not_in_its_place_stays_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader over part of a set numbers its images otherwise; another image in their place would be a lie."""
    greys: list[bool] = []
    original = retrieval_figure._show

    def show(axes: Any, picture: Any, hit: bool | None) -> None:
        greys.append(picture.shape == (1, 1, 3))
        original(axes, picture, hit)

    monkeypatch.setattr(retrieval_figure, "_show", show)
    data = TinyData()
    data.setup("fit")
    assert isinstance(data.val_set, ArrayDataset)
    later = DataLoader(Subset(data.val_set, range(20, 60)), 7)
    report = RetrievalReport(queries=2, neighbours=3, path=str(tmp_path / "figure.png"))
    Trainer(max_steps=1, callbacks=[report], **QUIET).fit(tiny_module(), data.train_dataloader(), later)
    assert greys == [True] * 8


@pytest.mark.parametrize("ignore", ["label_and_group", "group"])
def test_groups_count_and_distractors_are_no_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignore: Any) -> None:
    """The table must agree with what validation logs, and two images of nobody are no match."""
    hits: list[bool | None] = []
    monkeypatch.setattr(retrieval_figure, "_show", lambda axes, picture, hit: hits.append(hit))
    data = TinyData()
    data.setup("fit")
    assert isinstance(data.val_set, ArrayDataset)
    samples: list[Any] = [{**data.val_set[place], "group": place % 2} for place in range(8)]
    for sample in samples[::3]:
        sample["label"] = -1
    report = RetrievalReport(queries=8, neighbours=7, path=str(tmp_path / "figure.png"))
    module = tiny_module(metrics=RetrievalMetrics(ignore=ignore))
    loader: DataLoader[Any] = DataLoader(samples, 7)  # type: ignore[arg-type]
    Trainer(max_steps=1, callbacks=[report], **QUIET).fit(module, data.train_dataloader(), loader)
    after = Trainer(**QUIET).validate(module, loader, verbose=False)[0]
    assert {f"val/{name}": value for name, value in report.rows[1][1].items()} == pytest.approx(after, abs=1e-6)
    classes = [sample["label"] for sample in samples if sample["label"] >= 0]
    assert hits.count(True) == sum(classes.count(label) - 1 for label in classes)


class Raw(TinyEmbedder):
    """Evaluates the first two pixels as they are, rows of any length."""

    def forward(self, images: Tensor) -> Tensor:
        """Rows of unit length in training only."""
        return super().forward(images) if self.training else images.flatten(1)[:, :2]


@pytest.mark.parametrize(
    ("metric", "hits"), [("l2", [False, True, False, False]), ("cosine", [True, True, True, False])]
)
def test_the_similarity_is_that_of_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: SimilarityName, hits: list[bool]
) -> None:
    """A table and a figure of another similarity than the one that is trained for and logged would mislead."""
    frames: list[bool | None] = []
    monkeypatch.setattr(retrieval_figure, "_show", lambda axes, picture, hit: frames.append(hit))
    # The first two are one class, of one direction and far apart; close to the first is the third, of another class.
    rows, labels = [[1.0, 0.0], [3.0, 0.1], [1.0, 0.9], [9.0, 1.0]], [0, 0, 1, 1]
    samples: list[Any] = []
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        image = torch.zeros(1, 8, 8)
        image[0, 0, :2] = torch.tensor(row)
        samples.append({"image": image, "label": label, "index": place})
    data = TinyData()
    data.setup("fit")
    report = RetrievalReport(queries=4, neighbours=1, path=str(tmp_path / "figure.png"))
    module = MetricLearningModule(Raw(), ContrastiveLoss(0.3), metrics=RetrievalMetrics(metric=metric))
    loader: DataLoader[Any] = DataLoader(samples, 3)  # type: ignore[arg-type]
    Trainer(max_steps=1, callbacks=[report], **QUIET).fit(module, data.train_dataloader(), loader)
    after = Trainer(**QUIET).validate(module, loader, verbose=False)[0]
    assert {f"val/{name}": value for name, value in report.rows[1][1].items()} == pytest.approx(after, abs=1e-6)
    assert [hit for hit in frames if hit is not None] == hits
    assert report.rows[1][1]["recall@1"] == sum(hits) / 4


def test_other_modules_are_reported_with_the_defaults(tmp_path: Path) -> None:
    """The callback is for anybody's module, which may call something else `val_metrics`."""

    class Foreign(LightningModule):
        val_metrics = "recall"

        def __init__(self) -> None:
            super().__init__()
            self.net = TinyEmbedder()

        def forward(self, images: Tensor) -> Tensor:
            embeddings: Tensor = self.net(images)
            return embeddings

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            total: Tensor = self(batch["image"]).sum()
            return total

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            """Nothing: without it Lightning makes no validation loaders."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    report = RetrievalReport(path=str(tmp_path / "figure.png"))
    Trainer(max_steps=1, callbacks=[report], **QUIET).fit(Foreign(), TinyData())
    expected = Trainer(**QUIET).validate(tiny_module(), TinyData(), verbose=False)[0]
    assert {f"val/{name}": value for name, value in report.rows[1][1].items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("queries", "gathered"), [(3, 1), (0, 0)])
def test_rows_are_gathered_for_the_figure_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queries: int, gathered: int
) -> None:
    """Every rank holds what is gathered, all rows of a set that may be large; the table needs none of it."""
    calls: list[int] = []

    def count(metrics: RetrievalMetrics) -> Any:
        calls.append(1)
        return gathered_rows(metrics)

    monkeypatch.setattr("lightning_dml.callbacks.retrieval_report.gathered_rows", count)
    fit(RetrievalReport(queries=queries, path=str(tmp_path / "figure.png")))
    assert len(calls) == gathered


def test_a_batch_without_an_index_is_explained() -> None:
    """The report may be the first to look at the validation data; a bare KeyError would not say who asks."""
    data = TinyData()
    data.setup("fit")
    assert isinstance(data.val_set, ArrayDataset)
    sample = data.val_set[0]
    without: list[Any] = [{"image": sample["image"], "label": 0}]
    loader: DataLoader[Any] = DataLoader(without)  # type: ignore[arg-type]
    trainer = Trainer(max_steps=1, num_sanity_val_steps=0, callbacks=[RetrievalReport()], **QUIET)
    with pytest.raises(InputError, match="batch has no 'index'"):
        trainer.fit(tiny_module(), data.train_dataloader(), loader)


def test_the_figure_has_a_row_per_query(tmp_path: Path) -> None:
    """A figure that does not grow would squeeze the pictures; half-written files would pass for finished ones."""
    heights = []
    for queries in (2, 6):
        fit(RetrievalReport(queries=queries, neighbours=3, path=str(tmp_path / "new" / "figure.png")))
        heights.append(Image.open(tmp_path / "new" / "figure.png").size[1])
    assert heights[1] > 2 * heights[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]  # nothing half-written is left


def test_hits_and_misses_are_framed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss framed as a hit would make a bad model look good."""
    frames: list[bool | None] = []
    original = retrieval_figure._show

    def show(axes: Any, picture: Any, hit: bool | None) -> None:
        frames.append(hit)
        original(axes, picture, hit)

    monkeypatch.setattr(retrieval_figure, "_show", show)

    class Perfect(nn.Module):
        """Knows the class from a picture: nearest neighbours are the four others, then misses."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            centres = TinyData()
            centres.setup("validate")
            assert isinstance(centres.val_set, ArrayDataset)
            gallery = torch.stack([centres.val_set[i]["image"] for i in range(60)]).flatten(1)
            nearest = torch.cdist(images.flatten(1), gallery).argmin(dim=1)
            return nn.functional.one_hot(nearest // 5, 12).float() + 1e-3 * torch.rand(len(images), 12)

    module = tiny_module()
    module.embedder = Perfect()
    module.weight = nn.Parameter(torch.zeros(1))
    report = RetrievalReport(queries=3, neighbours=6, path=str(tmp_path / "figure.png"))
    trainer = Trainer(max_steps=1, callbacks=[report], **QUIET)
    data = TinyData()
    trainer.validate(module, data, verbose=False)
    trainer.strategy.connect(module)
    _, evaluated = report._evaluate(_with_val(trainer), module)
    report._figure(trainer, evaluated)
    assert frames == [None, True, True, True, True, False, False] * 3


def _with_val(trainer: Any) -> Any:
    class Loaders:
        """The trainer as it is in a fit, with validation loaders."""

        val_dataloaders = trainer.datamodule.val_dataloader()
        num_val_batches = (math.inf,)
        is_global_zero = True
        strategy = trainer.strategy
        precision_plugin = trainer.precision_plugin

    return Loaders


def test_no_queries_draws_nothing(tmp_path: Path) -> None:
    """Who only wants the table gets no file."""
    fit(RetrievalReport(queries=0, path=str(tmp_path / "figure.png")))
    assert not list(tmp_path.iterdir())


def test_modes_are_put_back(tmp_path: Path) -> None:
    """The report evaluates the model; a frozen layer that it left in train mode would start to learn."""

    class Frozen(RetrievalReport):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.embedder.net[2].eval()
            super().on_train_start(trainer, pl_module)
            assert pl_module.embedder.net[1].training and not pl_module.embedder.net[2].training

    fit(Frozen(path=str(tmp_path / "figure.png")))


def test_without_the_datamodule_the_tensor_is_shown(tmp_path: Path) -> None:
    """Plain dataloaders have no original pictures; the figure must be drawn all the same."""
    data = TinyData()
    data.setup("fit")
    report = RetrievalReport(path=str(tmp_path / "figure.png"))
    trainer = Trainer(max_steps=2, callbacks=[report], **QUIET)
    trainer.fit(tiny_module(), data.train_dataloader(), data.val_dataloader())
    assert (tmp_path / "figure.png").exists()


def test_wrong_input_is_named() -> None:
    """A report that cannot be made says so at the start, not after hours of training."""
    with pytest.raises(InputError, match=r"queries.*-1"):
        RetrievalReport(queries=-1)
    with pytest.raises(InputError, match=r"neighbours.*0"):
        RetrievalReport(neighbours=0)
    with pytest.raises(InputError, match="validation"):
        fit(RetrievalReport(), limit_val_batches=0)


def test_a_wrong_path_is_named_before_training(tmp_path: Path) -> None:
    """At the last step it would cost the run its figure."""
    with pytest.raises(InputError, match=r"path must end in one of .png.*report.txt"):
        RetrievalReport(path="report.txt")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="path must be a file"):
        fit(RetrievalReport(path=str(tmp_path / "folder.png")))


def test_a_second_fit_begins_a_new_table(tmp_path: Path) -> None:
    """The first model's untrained row is not the second's."""
    report = RetrievalReport(queries=0)
    fit(report)
    first = report.rows[0]
    report.rows[0] = (first[0], dict.fromkeys(first[1], -1.0), 0.0)
    fit(report)
    assert report.rows[0][1] == first[1]


def test_true_bfloat16_is_evaluated(tmp_path: Path) -> None:
    """The report runs its own loop, which has to convert its inputs as Lightning's does."""
    fit(RetrievalReport(path=str(tmp_path / "figure.png")), precision="bf16-true")
    assert (tmp_path / "figure.png").exists()
