"""Replicas of the official data sets, tables and folders through the command line, and how wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_dml.cli import main
from lightning_dml.datamodules import FolderDataModule, PKBatchSampler
from tests.datamodules import replicas

MODEL: dict[str, Any] = {
    "class_path": "lightning_dml.MetricLearningModule",
    "init_args": {
        "embedder": {"class_path": "lightning_dml.Embedder", "init_args": {"model_name": "test_resnet", "dim": 4}},
        "loss": {"class_path": "lightning_dml.losses.ContrastiveLoss"},
    },
}
TRAINER = {
    "accelerator": "cpu",
    "max_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
SMALL = {"image_size": 32, "resize": 32, "classes_per_batch": 2, "samples_per_class": 2, "num_workers": 0}
PART = {**SMALL, "check_counts": False}
TABLE = ("path,label,split,shop", "a/0.png,a,train,x", "a/1.png,a,train,y", "b/0.png,b,train,x", "b/1.png,b,train,x")
EVALUATED = ("c/0.png,c,validation,x", "c/1.png,c,validation,y")

Run = Callable[..., None]


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs a subcommand on a config that it writes."""

    def command(subcommand: str, name: str, options: dict[str, Any], metrics: dict[str, Any] | None = None) -> None:
        data = {"class_path": f"lightning_dml.datamodules.{name}", "init_args": options}
        config: dict[str, Any] = {"model": MODEL, "data": data, "trainer": TRAINER}
        if metrics is not None:
            retrieval = {"class_path": "lightning_dml.RetrievalMetrics", "init_args": metrics}
            config["model"] = {**MODEL, "init_args": {**MODEL["init_args"], "metrics": retrieval}}
        # JSON is YAML as well.
        (folder / "config.yaml").write_text(json.dumps(config))
        main([subcommand, "--config", "config.yaml"])

    return command


def make_table(root: Path, lines: tuple[str, ...] = TABLE + EVALUATED) -> Path:
    """Three classes of two images and a table that lists them."""
    replicas._paint(root, [f"{name}/{number}.png" for name in "abc" for number in range(2)], True)
    (root / "table.csv").write_text("\n".join(lines))
    return root


SETS: list[tuple[str, Callable[[Path], Path], dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("CUB200DataModule", replicas.make_cub, {**PART, "crop_boxes": True}, {}, ("recall@1",)),
    ("Cars196DataModule", replicas.make_cars, PART, {}, ("recall@1",)),
    ("Cars196DataModule", replicas.make_cars_devkit, PART, {}, ("recall@1",)),
    (
        "SOPDataModule",
        replicas.make_sop,
        {**PART, "super_classes_per_batch": 2, "class_weights": "uniform"},
        {"ks": [1, 10]},
        ("recall@10",),
    ),
    ("InShopDataModule", replicas.make_in_shop, PART, {"ks": [1, 2]}, ("recall@2",)),
    (
        "VehicleIDDataModule",
        replicas.make_vehicle_id,
        PART,
        {"gallery_draws": 10},
        ("recall@1", "small/recall@1", "medium/recall@1", "large/recall@1"),
    ),
    ("INaturalistDataModule", replicas.make_inaturalist, PART, {}, ("recall@1",)),
    ("FolderDataModule", make_table, {**SMALL, "val_fraction": 0.3, "cache": "cache"}, {}, ("recall@1",)),
    ("TableDataModule", make_table, {**SMALL, "table": "table.csv"}, {}, ("recall@1",)),
]


@pytest.mark.parametrize(("name", "make", "options", "metrics", "keys"), SETS)
def test_every_set_trains_and_is_tested(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], Path],
    options: dict[str, Any],
    metrics: dict[str, Any],
    keys: tuple[str, ...],
) -> None:
    """Files in the official format are all that a user has; the protocol of the set must come out of them."""
    root = make(tmp_path / "data")
    if name == "TableDataModule":
        options = {**options, "table": str(root / "table.csv")}
    else:
        options = {**options, "root": str(root)}
    run("fit", name, options, metrics)
    run("test", name, options, metrics)
    printed = capsys.readouterr().out
    for key in keys:
        assert f"test/{key}" in printed


def make_edited(make: Callable[[Path], Path], file: str, old: str, new: str) -> Callable[[Path], Path]:
    """A replica with one text exchanged."""

    def make_changed(root: Path) -> Path:
        folder = make(root)
        replicas.edit(folder / file, old, new)
        return folder

    return make_changed


def make_without(make: Callable[[Path], Path], file: str) -> Callable[[Path], Path]:
    """A replica that lacks a file."""

    def make_changed(root: Path) -> Path:
        folder = make(root)
        next(folder.glob(file)).unlink()
        return folder

    return make_changed


def make_with_empty_image(root: Path) -> Path:
    """A replica with an image that is none."""
    folder = replicas.make_cub(root)
    next(folder.glob("images/001*/*.jpg")).write_bytes(b"")
    return folder


def table(*lines: str) -> Callable[[Path], Path]:
    """A table with other lines at its end."""
    return lambda root: make_table(root, TABLE + lines)


@pytest.mark.parametrize(
    ("name", "make", "options", "message"),
    [
        ("CUB200DataModule", replicas.make_cub, SMALL, "must have 5,864 images of 100 classes"),
        ("SOPDataModule", make_without(replicas.make_sop, "Ebay_test.txt"), PART, "Ebay_test.txt"),
        (
            "SOPDataModule",
            make_edited(replicas.make_sop, "Ebay_test.txt", " 11319 ", " 1 "),
            PART,
            "is in training and in evaluation",
        ),
        ("CUB200DataModule", make_with_empty_image, PART, "cannot be read"),
        ("CUB200DataModule", make_without(replicas.make_cub, "images/101*/*.jpg"), PART, "there is no such file"),
        ("TableDataModule", table("../c.png,c,validation,x", *EVALUATED), SMALL, "leads out of root"),
        ("TableDataModule", table(*EVALUATED, EVALUATED[0]), SMALL, "table.csv, line 8"),
        ("TableDataModule", lambda root: make_table(root, ("path,lable,split", "a,b,train")), SMALL, "'lable'"),
        ("TableDataModule", table("c/0.png,a,validation,x"), SMALL, "class 'a'"),
        ("SOPDataModule", replicas.make_sop, {**PART, "super_classes_per_batch": 3}, "must divide"),
        ("FolderDataModule", make_table, {**SMALL, "super_classes_per_batch": 1}, "needs super-classes"),
        ("FolderDataModule", make_table, {**SMALL, "class_weights": {"z": 2.0}}, "'z', which is no training class"),
        ("CUB200DataModule", replicas.make_cub, {**PART, "folds": 5}, "folds=5 needs as many training classes"),
    ],
)
def test_wrong_data_is_one_line_before_training(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], Path],
    options: dict[str, Any],
    message: str,
) -> None:
    """A queue of jobs is full of typing errors; each must say in a line what to mend."""
    root = make(tmp_path / "data")
    where = {"table": str(root / "table.csv"), "root": str(root)} if name == "TableDataModule" else {"root": str(root)}
    with pytest.raises(SystemExit) as stopped:
        run("fit", name, {**where, **options})
    assert stopped.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("lightning-dml: error: ")]
    assert message in line


@pytest.mark.parametrize("weights", ["uniform", "sqrt", {"a": 3.0}])
def test_class_weights_are_by_name(run: Run, tmp_path: Path, weights: Any) -> None:
    """Labels are numbers that nobody knows; folders have names."""
    options = {**SMALL, "root": str(make_table(tmp_path)), "val_fraction": 0.3, "class_weights": weights}
    run("fit", "FolderDataModule", options)
    data = FolderDataModule(**options)
    data.setup("fit")
    sampler = data.train_dataloader().batch_sampler
    assert isinstance(sampler, PKBatchSampler) and sampler._rates is not None and data.class_names is not None
    share = sampler._rates[data.class_names.index("a")]
    assert share == pytest.approx(0.75 if isinstance(weights, dict) else 0.5)


def test_a_bank_takes_the_cache_of_the_training(run: Run, tmp_path: Path) -> None:
    """Decoding a data set anew for the bank takes as long as the first epoch did; and it looks at no test image."""
    root = replicas.make_sop(tmp_path / "data")
    data = {**PART, "root": str(root), "cache": "cache", "folds": 3}
    run("fit", "SOPDataModule", data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.images")}
    assert [path.name.split("-")[0] for path in before] == ["train"]
    next(root.glob("*/*11319_*")).write_bytes(b"")
    run("bank", "SOPDataModule", data)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.images")} == before
    assert (tmp_path / "bank.pt").exists()
