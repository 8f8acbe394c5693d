"""`lightning-dml bank` and the callback's options in YAML: what is made, what a fit does with it, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from lightning_dml import MemoryBank
from lightning_dml.cli import main
from lightning_dml.commands.bank import DMLTrainer
from lightning_dml.errors import InputError
from tests.helpers import ROOT, TORCHRUN, run
from tests.tiny import QUIET, TinyData, tiny_module


def with_memory(folder: Path, **options: Any) -> str:
    """A config to lay over the other: the callback with these options."""
    memory = {"class_path": "lightning_dml.callbacks.MemoryBankCallback", "init_args": options}
    drift = {"class_path": "lightning_dml.callbacks.DriftMonitor", "init_args": {"every_n_steps": 1, "probes": 2}}
    (folder / "memory.yaml").write_text(json.dumps({"trainer": {"callbacks": [memory, drift]}}))
    return str(folder / "memory.yaml")


def test_a_bank_is_made_from_the_training_set_and_a_fit_starts_with_it(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the command and an option are all it takes to start with a full memory."""
    main(["bank", "--config", config, "--output", "bank.pt"])
    printed = capsys.readouterr().out
    bank = MemoryBank.load("bank.pt")
    assert len(bank) == len(set(bank.indices.tolist())) == 4 * len(set(bank.labels.tolist()))
    torch.testing.assert_close(bank.embeddings.norm(dim=1), torch.ones(len(bank)))
    assert "bank.pt: MemoryBank(" in printed and f"rows {len(bank)}" in printed
    memory = with_memory(tmp_path, bank_file="bank.pt", size=100, start_step=1)
    main(["fit", "--config", config, "--config", memory, "--trainer.enable_checkpointing=true"])
    (path,) = tmp_path.rglob("*.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [value for key, value in states.items() if "MemoryBank" in key]
    assert torch.equal(state["bank"]["embeddings"][: len(bank)], bank.embeddings)


def test_the_weights_of_a_checkpoint_make_the_bank(config: str, tmp_path: Path) -> None:
    """The warm-up of the XBM paper in two commands: train, then encode the training set with what was trained."""
    main(["fit", "--config", config, "--trainer.enable_checkpointing=true"])
    (path,) = tmp_path.rglob("*.ckpt")
    main(["bank", "--config", config, "--ckpt_path", str(path), "--output", "trained.pt", "--policy", "samples"])
    with pytest.warns(UserWarning, match="bank runs without --ckpt_path"):
        main(["bank", "--config", config, "--output", "random.pt", "--dtype", "float16"])
    trained, random = MemoryBank.load("trained.pt"), MemoryBank.load("random.pt")
    assert (trained.policy, random.policy) == ("samples", "queue")
    assert (trained.dtype, random.dtype) == (torch.float32, torch.float16)
    assert not torch.allclose(trained.embeddings, random.embeddings.float(), atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 1.0, "policy": "samples", "average": 0.5, "adaptation": "kalman", "initial_fill": True},
        {"size": 20, "momentum": None, "enqueue": "after", "weight": 0.5, "warmup_steps": 2, "dtype": "bfloat16"},
        {
            "size": 0.5,
            "momentum": 0.9,
            "momentum_end": 1.0,
            "enqueue": "before",
            "sharded": True,
            "output": "embeddings",
        },
        {"size": 20, "momentum": None, "adaptation": "moments", "attribute": "memory_bank", "encoder": "embedder"},
    ],
)
def test_every_option_comes_from_yaml(config: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """An option that needs Python code is out of reach on the command line."""
    main(
        ["fit", "--config", config, "--config", with_memory(tmp_path, **options), "--trainer.enable_checkpointing=true"]
    )
    (path,) = tmp_path.rglob("*.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    assert any("MemoryBank" in key and state["bank"] is not None for key, state in states.items())


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (
            "bank",
            ("--output", "nowhere/bank.pt"),
            "output must be a file in a folder that exists, got 'nowhere/bank.pt'",
        ),
        ("bank", ("--output", "images"), "got 'images'"),
        ("fit", {"bank_file": "none.pt"}, "none.pt"),
        ("fit", {"bank_file": "folder.yaml"}, "folder.yaml"),
        ("fit", {"size": 0.5, "policy": "samples"}, "size to 1.0"),
        ("fit", {"size": 4, "policy": "samples"}, "training samples, got size 4; set size to 1.0"),
        ("fit", {"encoder": "backbone"}, "no submodule 'backbone'"),
    ],
)
def test_one_clear_error_before_training(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: Any, words: str
) -> None:
    """A wrong value ends in one line that names it."""
    extra = options if command == "bank" else ("--config", with_memory(tmp_path, **options))
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", config, *extra])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning-dml: error: ") and words in last


class Mute(LightningModule):
    """Predicts something else than a dict."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns labels alone."""
        return batch["label"]


def test_other_modules_and_data_are_named(tmp_path: Path) -> None:
    """The command takes foreign modules; what it needs of them must be said."""
    with pytest.raises(InputError, match=r"Mute\.predict_step must return a dict"):
        DMLTrainer(**QUIET).bank(Mute(), TinyData(), output=str(tmp_path / "bank.pt"))
    with pytest.raises(InputError, match="data module"):
        DMLTrainer(**QUIET).bank(tiny_module(), None, output=str(tmp_path / "bank.pt"))
    assert not (tmp_path / "bank.pt").exists()


class OnDevice(TinyData):
    """Finishes its batches on the device, as data modules with GPU augmentation do; some rows are to enter no bank."""

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Makes all images equal."""
        return {**batch, "image": torch.ones_like(batch["image"]), "enqueue": batch["index"] >= 10}


def test_the_data_modules_own_transfer_is_used(tmp_path: Path) -> None:
    """Images that are normalised on the device would otherwise enter the bank as they are not trained on."""
    bank = DMLTrainer(**QUIET).bank(tiny_module(), OnDevice(), output=str(tmp_path / "bank.pt"))
    assert torch.allclose(bank.embeddings, bank.embeddings[0])
    assert sorted(bank.indices.tolist()) == list(range(10, 60))


@pytest.mark.slow
def test_two_ranks_make_the_bank_of_one(tmp_path: Path) -> None:
    """Large sets are encoded on many GPUs; no sample may be missing or twice."""
    quickstart = ("bank", "--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.limit_predict_batches", "2")
    small = ("--data.eval_batch_size", "50", "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    one_rank = ("--data.eval_batch_size", "100", *small[2:], "--output", "one.pt")
    run(sys.executable, "-m", "lightning_dml", *quickstart, *one_rank, folder=tmp_path)
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--output", "two.pt")
    run(*TORCHRUN, "-m", "lightning_dml", *quickstart, *small, *two, folder=tmp_path)
    one, other = MemoryBank.load(tmp_path / "one.pt"), MemoryBank.load(tmp_path / "two.pt")
    assert torch.equal(one.indices, other.indices) and torch.equal(one.labels, other.labels)
    assert len(one) == len(set(one.indices.tolist())) == 200
    similarity = (one.embeddings * other.embeddings).sum(dim=1)
    assert float(similarity.min()) > 0.9  # each process augments the images in its own way
