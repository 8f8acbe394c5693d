"""Evaluation under Lightning's Trainer on two and three real processes, some of them without a batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dml import MetricLearningModule
from lightning_dml.callbacks import RetrievalReport
from lightning_dml.datamodules.images.datasets import ArrayDataset, LabelledImages
from lightning_dml.losses import ContrastiveLoss
from tests.helpers import run_ranks
from tests.tiny import QUIET, SIDE, TinyData, TinyEmbedder, tiny_module

Values = dict[str, float]
Sample = dict[str, Any]


class Several(TinyData):
    """Validates on two sets, of which the second has two images only."""

    def setup(self, stage: str | None = None) -> None:
        """Cuts the second set from the images that TinyData validates on."""
        super().setup(stage)
        assert isinstance(self.val_set, ArrayDataset)
        self.val_set = self.test_set = {"a": self.val_set, "b": first(self.val_set, 2)}


class TwoImages(TinyData):
    """Validates on two images."""

    def setup(self, stage: str | None = None) -> None:
        """Keeps the first two images that TinyData validates on."""
        super().setup(stage)
        assert isinstance(self.val_set, ArrayDataset)
        self.val_set = self.test_set = first(self.val_set, 2)


class QueriesFirst(TinyData):
    """Validates on images of which the first 45 are queries only and the others gallery only."""

    def setup(self, stage: str | None = None) -> None:
        """Puts one image of each class after the other, so that the last of each are in the gallery."""
        super().setup(stage)
        whole = self.val_set
        assert isinstance(whole, ArrayDataset)
        order = sorted(range(60), key=lambda place: place % 5)
        self.val_set = self.test_set = WithRoles(whole.images[order], whole.labels[order], whole.transform)


class WithRoles(ArrayDataset):
    """Samples that say what they are."""

    def __getitem__(self, index: int) -> Any:
        """The sample with its roles."""
        return {**super().__getitem__(index), "is_query": index < 45, "is_gallery": index >= 45}


def first(images: ArrayDataset, count: int) -> ArrayDataset:
    """The first images of a set."""
    return ArrayDataset(images.images[:count], images.labels[:count], images.transform)


class Foreign(LightningDataModule):
    """Somebody else's data module: rank 1 has nothing to evaluate, the others share the images out."""

    def __init__(self, rank: int, ranks: int, alone: bool = False) -> None:
        super().__init__()
        ours = TinyData()
        ours.setup()
        assert ours.train_set is not None and isinstance(ours.val_set, LabelledImages)
        self.train, whole = share(ours.train_set, rank, ranks), share(ours.val_set, 0, 1)
        if alone:  # each image is the only one of its class
            whole = [{**sample, "label": sample["index"]} for sample in whole]
        if ranks == 1:
            self.evaluated = whole
        else:
            self.evaluated = [] if rank == 1 else whole[min(rank, 1) :: ranks - 1]

    def train_dataloader(self) -> DataLoader[Any]:
        """Equally many batches on every rank."""
        return DataLoader(self.train, batch_size=4, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Possibly no batch."""
        return DataLoader(self.evaluated, batch_size=7)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        """Possibly no batch."""
        return self.val_dataloader()


def share(images: LabelledImages, rank: int, ranks: int) -> list[Sample]:
    """The samples of a rank, in memory."""
    return [{**images[index]} for index in range(rank, len(images), ranks)]


class Normalising(nn.Module):
    """An embedder with buffers, which DDP broadcasts at a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(SIDE * SIDE)
        self.net = TinyEmbedder()

    def forward(self, images: Tensor) -> Tensor:
        """Embeds the normalised pixels."""
        embeddings: Tensor = self.net(self.norm(images.flatten(1)))
        return embeddings


def normalising_module() -> MetricLearningModule:
    """The tiny module with batch norm."""
    rule = partial(torch.optim.SGD, lr=0.05)
    return MetricLearningModule(Normalising(), ContrastiveLoss(0.3), optimizer=rule)


def trainer(ranks: int, **options: Any) -> Trainer:
    """One that finds the processes of `run_ranks`."""
    distributed = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    return Trainer(**{**QUIET, **distributed, **options})


def both_stages(ranks: int, make: Callable[[], Any]) -> list[Values]:
    """The values of validate and test, without a fit before."""
    with_options = partial(trainer(ranks).validate, verbose=False)
    validated = with_options(tiny_module(), datamodule=make())
    tested = trainer(ranks).test(tiny_module(), datamodule=make(), verbose=False)
    return [dict(validated[0]), dict(tested[0])]


def fit(ranks: int, folder: Path, data: Any, monitor: str, *others: Any) -> dict[str, Any]:
    """Two epochs that choose a checkpoint and may stop early; values, weights and buffers at their end."""
    module = normalising_module()
    saver = ModelCheckpoint(folder, monitor=monitor, mode="max", filename=f"{type(data).__name__}-{{epoch}}")
    stop = EarlyStopping(monitor, mode="max", patience=5)
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [saver, stop, *others]}
    fitting = trainer(ranks, max_epochs=2, num_sanity_val_steps=2, default_root_dir=folder, **options)
    fitting.fit(module, datamodule=data)
    return {
        "values": {name: float(value) for name, value in fitting.callback_metrics.items() if name.startswith("val/")},
        "epochs": fitting.current_epoch,
        "state": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "best": saver.best_model_path,
        "score": float(saver.best_model_score or 0),
        "stop": float(stop.best_score),
    }


def scenarios(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Everything that is evaluated, in one process group, as starting the processes takes the longest."""
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_RUN_ID="tests")
    report = RetrievalReport(path=f"{folder}/figure.png")
    outcome: dict[str, Any] = {
        "whole": both_stages(ranks, TinyData),
        "two images": both_stages(ranks, TwoImages),
        "several": both_stages(ranks, Several),
        "foreign": both_stages(ranks, lambda: Foreign(rank, ranks)),
        "fit several": fit(ranks, Path(folder), Several(), "val/b/recall@1"),
        "fit roles": fit(ranks, Path(folder), QueriesFirst(), "val/recall@1"),
        "fit foreign": fit(ranks, Path(folder), Foreign(rank, ranks), "val/recall@1", report),
    }
    outcome["report"] = [values for _, values, _ in report.rows]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome["alone"] = both_stages(ranks, lambda: Foreign(rank, ranks, alone=True))
    words = "no match", "before the ``update``"
    outcome["warnings"] = [
        text for text in map(str, (warning.message for warning in caught)) if any(w in text for w in words)
    ]
    return outcome


@lru_cache
def on_one(folder: str) -> dict[str, Any]:
    """The same in this process alone."""
    return scenarios(0, 1, folder)


def evaluated_alone(state: dict[str, Tensor], data: Any) -> Values:
    """The values of a model in one process."""
    module = normalising_module()
    module.load_state_dict(state)
    return dict(trainer(1).validate(module, datamodule=data, verbose=False)[0])


@pytest.fixture(scope="module", params=[2, 3])
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcome on each rank."""
    return run_ranks(request.param, scenarios, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome in one process."""
    return on_one(str(tmp_path_factory.mktemp("one")))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["whole", "two images", "several", "foreign"])
def test_validate_and_test_return_the_values_of_one_process(
    ends: list[dict[str, Any]], right: dict[str, Any], what: str
) -> None:
    """Whoever evaluates on more GPUs must read the same numbers, on every rank, also where a rank has no batch."""
    for end in ends:
        for ours, expected in zip(end[what], right[what], strict=True):
            assert len(expected) >= 7 and not any(np.isnan(value) for value in expected.values())
            assert ours == pytest.approx(expected, abs=1e-6)
        assert end[what] == ends[0][what]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "monitor", "make"),
    [
        ("fit several", "val/b/recall@1", Several),
        ("fit roles", "val/recall@1", QueriesFirst),  # whose sanity check has queries only
        ("fit foreign", "val/recall@1", lambda: Foreign(0, 1)),
    ],
)
def test_a_fit_watches_the_values_on_every_rank(
    ends: list[dict[str, Any]], what: str, monitor: str, make: Callable[[], Any]
) -> None:
    """A rank that leaves the evaluation out, or sees other values, leaves the others waiting or saves another model."""
    first_rank, data = ends[0][what], make()
    assert first_rank["epochs"] == 2
    assert first_rank["values"] == pytest.approx(evaluated_alone(first_rank["state"], data), abs=1e-6)
    for end in ends:
        for part in ("values", "best", "score", "stop", "epochs"):
            assert end[what][part] == first_rank[part], part
        for name, tensor in first_rank["state"].items():  # buffers as well: those of rank 0 count
            assert torch.equal(end[what]["state"][name], tensor), name
    saved = torch.load(first_rank["best"], weights_only=True)
    data = make()
    assert evaluated_alone(saved["state_dict"], data)[monitor] == pytest.approx(first_rank["score"], abs=1e-6)
    assert first_rank["stop"] == first_rank["score"]


@pytest.mark.slow
def test_the_report_evaluates_where_a_rank_has_no_batch(ends: list[dict[str, Any]]) -> None:
    """It runs a loop of its own, which has to meet the other ranks as well."""
    for end in ends:
        assert end["report"] == ends[0]["report"] and len(end["report"]) == 2
        trained = {f"val/{name}": value for name, value in end["report"][1].items()}
        assert trained == pytest.approx(end["fit foreign"]["values"], abs=1e-6)


@pytest.mark.slow
def test_rank_0_warns_where_no_query_has_a_match(ends: list[dict[str, Any]]) -> None:
    """The others' output is often thrown away, and NaN without a word looks like a failed training."""
    for end in ends:
        assert all(np.isnan(value) for stage in end["alone"] for value in stage.values())
    messages = ends[0]["warnings"]
    assert [text.split(":")[0] for text in messages] == ["val", "test"] and all("60 of 60" in text for text in messages)
    assert not any(end["warnings"] for end in ends[1:])
