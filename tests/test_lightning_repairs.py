"""The repairs of Lightning and torch: each is needed still, and each mends what it says.

A test whose name ends in `by_itself` shows what happens without the repair. When one of them fails, Lightning (or
torch) has changed: see whether the repair can go.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.data import has_len_all_ranks
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dml import lightning_repairs as repairs
from lightning_dml.callbacks import StepEndSignals
from lightning_dml.memory.momentum import uncompiled
from tests.helpers import run_ranks
from tests.tiny import QUIET, TinyData, tiny_module


class Plain(LightningModule):
    """A module without anything of this library; notes which of its hooks are called."""

    def __init__(self, layer: nn.Module | None = None, repaired: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1) if layer is None else layer
        self.repaired = repaired
        self.calls: list[str] = []

    def setup(self, stage: str) -> None:
        """Repairs the evaluation where asked to."""
        if self.repaired:
            repairs.evaluate_on_every_rank(self.trainer, self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A sum of outputs."""
        self.calls.append("training_step")
        total: Tensor = self.layer(batch).sum()
        return total

    def on_train_epoch_start(self) -> None:
        """Notes the call."""
        self.calls.append("on_train_epoch_start")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Notes the call."""
        self.calls.append("validation_step")

    def on_validation_epoch_end(self) -> None:
        """Notes the call, where other ranks may wait in a collective."""
        self.calls.append("on_validation_epoch_end")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes the call."""
        self.calls.append("on_before_batch_transfer")
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain steps."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(rows: int = 4) -> DataLoader[Any]:
    """Batches of one row."""
    return DataLoader([torch.ones(2)] * rows, batch_size=1)  # type: ignore[arg-type]


def resumed_after_an_epoch(folder: Path, *others: Callback) -> list[str]:
    """Calls of a fit that resumes from a checkpoint of the last batch of an epoch of four."""
    settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 0}
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    Trainer(max_epochs=1, callbacks=[saver], **settings).fit(Plain(), loader())
    module, saver = Plain(), ModelCheckpoint(folder)
    trainer = Trainer(max_epochs=2, callbacks=[saver, *others], **settings)
    trainer.fit(module, loader(), ckpt_path=folder / "step=4.ckpt", weights_only=True)
    assert trainer.global_step == 8
    return [call for call in module.calls if call != "on_before_batch_transfer"]


def test_lightning_skips_the_start_of_a_resumed_epoch_by_itself(tmp_path: Path) -> None:
    """Seen with Lightning 2.6: the new epoch passes for the rest of the old one."""
    assert resumed_after_an_epoch(tmp_path) == ["training_step"] * 4


def test_a_resumed_epoch_is_counted(tmp_path: Path) -> None:
    """The epoch after the checkpoint is one of its own, with all its hooks."""
    calls = resumed_after_an_epoch(tmp_path, repairs.CountResumedEpoch())
    assert calls == ["on_train_epoch_start", *["training_step"] * 4]


def saved_after_a_resume(folder: Path, data: Callable[[], Any]) -> list[str]:
    """Checkpoints of a fit that resumes at step 2 and accumulates gradients of three batches."""
    for name, checkpoint in (("first", None), ("second", folder / "first/step=2.ckpt")):
        saver = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True, "accumulate_grad_batches": 3}
        trainer = Trainer(max_steps=4, limit_val_batches=0, callbacks=[saver], **settings)
        trainer.fit(tiny_module(), data(), ckpt_path=checkpoint, weights_only=True)
    return sorted(path.name for path in (folder / "second").iterdir())


def without_repair() -> Any:
    """The loader of the tiny data, whose data module would add the repair."""
    data = TinyData(batches_per_epoch=12)
    data.setup("fit")
    return data.train_dataloader()


def test_lightning_saves_amid_an_accumulation_by_itself(tmp_path: Path) -> None:
    """Seen with Lightning 2.6: a file for the resumed step, after a batch whose gradients are not in it."""
    assert saved_after_a_resume(tmp_path, without_repair) == ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]


def test_no_checkpoint_falls_into_an_accumulation_after_a_resume(tmp_path: Path) -> None:
    """Lightning saves one right after a resume; the gradients so far are not in it, and a second resume loses them."""
    names = saved_after_a_resume(tmp_path, lambda: TinyData(batches_per_epoch=12))
    assert names == ["step=3.ckpt", "step=4.ckpt"]


def test_lightning_refuses_a_rank_without_batches_by_itself() -> None:
    """Seen with Lightning 2.6: the rank raises and leaves the others waiting, unless it is allowed to go on."""

    class OtherRankHasThree:
        root_device = torch.device("cpu")

        def reduce(self, length: Tensor, reduce_op: str) -> Tensor:
            return length + 3

    strategy: Any = OtherRankHasThree()
    with pytest.raises(RuntimeError, match="zero length"):
        has_len_all_ranks(loader(0), strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert has_len_all_ranks(loader(0), strategy, allow_zero_length_dataloader_with_multiple_devices=True)


def test_lightning_leaves_an_evaluation_without_batches_out_by_itself() -> None:
    """Seen with Lightning 2.6: no hook of the module is called, in which other ranks wait."""
    module = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(**QUIET).validate(module, loader(0), verbose=False)
    assert module.calls == []


def evaluate_unevenly(rank: int, ranks: int) -> list[str]:
    """Calls of a validation in which rank 1 has no batch."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_RUN_ID="tests")
    module = Plain(repaired=True)
    trainer = Trainer(**{**QUIET, "devices": ranks, "strategy": "ddp"})
    trainer.validate(module, loader(0 if rank == 1 else 2), verbose=False)
    return [call for call in module.calls if call != "on_before_batch_transfer"]


def test_every_rank_takes_part_in_an_evaluation() -> None:
    """A collective in the hook at the end needs all ranks; tests/modules/test_evaluation_ranks.py has the metrics."""
    first, second = run_ranks(2, evaluate_unevenly)
    assert first == ["validation_step", "validation_step", "on_validation_epoch_end"]
    assert second == ["on_validation_epoch_end"]


class Saving(Plain):
    """Saves its arguments less the layer, as Lightning advises, and notes whether a config made it."""

    def __init__(self, layer: nn.Module, width: int = 3) -> None:
        super().__init__(layer)
        self.from_config = repairs.made_from_a_config()
        self.save_hyperparameters(ignore=["layer"])


class SavingAll(Plain):
    """Saves all its arguments."""

    def __init__(self, layer: nn.Module, width: int = 3) -> None:
        super().__init__(layer)
        self.save_hyperparameters()


class Nothing(LightningDataModule):
    """Has no data."""


def from_config(module: type[LightningModule]) -> Any:
    """The module as the command line makes it."""
    arguments = ["--model.layer=torch.nn.Linear", "--model.layer.in_features=2", "--model.layer.out_features=1"]
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    return LightningCLI(module, Nothing, run=False, args=[*arguments, *quiet, "--trainer.accelerator=cpu"]).model


@pytest.mark.usefixtures("folder")
def test_lightning_ignores_class_paths_as_it_does_objects_by_itself() -> None:
    """Seen with Lightning 2.6: with one list of names for both, one of them loses or pickles the layer."""
    assert "layer" not in from_config(Saving).hparams  # load_from_checkpoint would need the layer
    with pytest.warns(UserWarning, match="'layer' is an instance of `nn.Module`"):
        assert isinstance(SavingAll(nn.Linear(2, 1)).hparams["layer"], nn.Module)  # a checkpoint would pickle it


@pytest.mark.usefixtures("folder")
def test_a_module_knows_whether_a_config_made_it() -> None:
    """tests/modules/test_metric_learning_module.py loads checkpoints that were made in Python."""
    assert from_config(Saving).from_config
    assert not Saving(nn.Linear(2, 1)).from_config


class Terminating(Callback):
    """Sends SIGTERM in the first step, and notes who handles it and whether Lightning has acted on it in that step."""

    def __init__(self) -> None:
        self.handler: Any = None
        self.acted: list[bool] = []

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        """Runs in the middle of a step."""
        if not self.acted:
            self.handler = signal.getsignal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            self.acted.append(trainer.received_sigterm)


def fit_until_sigterm(*others: Callback) -> Terminating:
    """A fit that SIGTERM comes into."""
    watch = Terminating()
    trainer = Trainer(max_steps=3, limit_val_batches=0, callbacks=[watch, *others], **QUIET)
    with pytest.raises(SIGTERMException):
        trainer.fit(Plain(), loader())
    return watch


def test_lightning_handles_signals_amid_a_step_by_itself() -> None:
    """Seen with Lightning 2.6; the checkpoint of a requeued job is written there (tests/callbacks)."""
    watch = fit_until_sigterm()
    assert watch.acted == [True]
    assert repairs.is_handler_of_lightning(watch.handler)


def test_handlers_of_lightning_are_known() -> None:
    """`StepEndSignals` takes over those and no others: a user's own handler may mean anything."""
    assert fit_until_sigterm(StepEndSignals()).acted == [False]
    assert not repairs.is_handler_of_lightning(signal.SIG_DFL)
    assert not repairs.is_handler_of_lightning(lambda signum, frame: None)


@pytest.mark.parametrize(("repaired", "calls"), [(False, []), (True, ["on_before_batch_transfer"])])
def test_lightning_moves_a_batch_without_its_hook_by_itself(repaired: bool, calls: list[str]) -> None:
    """Seen with Lightning 2.6: the strategy's own call is the second half only; the repair has both."""
    module = Plain()
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, loader())
    module.calls.clear()
    batch = torch.ones(1, 2)
    move = repairs.batch_on_device if repaired else lambda trainer, _, batch: trainer.strategy.batch_to_device(batch)
    assert torch.equal(move(trainer, module, batch), batch)
    assert module.calls == calls


def test_lightning_does_not_tell_whether_it_replaces_samplers_by_itself() -> None:
    """Seen with Lightning 2.6: the setting goes in and is not to be read in public."""
    assert not hasattr(Trainer(**QUIET), "use_distributed_sampler")


@pytest.mark.parametrize("replaces", [True, False])
def test_whether_samplers_are_replaced_is_known(replaces: bool) -> None:
    """K images per class are at stake; tests/datamodules/test_base.py has the error."""
    assert repairs.replaces_samplers(Trainer(**{**QUIET, "use_distributed_sampler": replaces})) == replaces


class Last(Callback):
    """Wants to be called behind all others."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves to the end."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.in_place:
            callbacks.remove(self)
            callbacks.append(self)
        else:
            repairs.move_callback(trainer, self, first=False)


class Counter(Callback):
    """Counts the starts of a fit."""

    def __init__(self) -> None:
        self.starts = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts."""
        self.starts += 1


@pytest.mark.parametrize(("in_place", "starts"), [(True, [0, 1]), (False, [1, 1])])
def test_lightning_goes_through_the_list_of_callbacks_by_itself(in_place: bool, starts: list[int]) -> None:
    """Seen with Lightning 2.6: a callback that moves back in the list has the next one left out; the repair has not."""
    moving, counters = Last(in_place), [Counter(), Counter()]
    trainer = Trainer(max_steps=1, limit_val_batches=0, callbacks=[moving, *counters], **QUIET)
    trainer.fit(Plain(), loader())
    assert [counter.starts for counter in counters] == starts
    assert trainer.callbacks[-1] is moving  # type: ignore[attr-defined]


def test_a_callback_is_added_once() -> None:
    """Two data modules, or two banks, in one training bring the same repair."""
    trainer = Trainer(**QUIET)
    before = len(trainer.callbacks)  # type: ignore[attr-defined]
    for _ in range(2):
        repairs.add_callback(trainer, repairs.CountResumedEpoch)
    assert len(trainer.callbacks) == before + 1  # type: ignore[attr-defined]


def test_torch_calls_forward_without_any_hook_by_itself() -> None:
    """Seen with torch 2.14: `forward` leaves out pre-hooks as well, which make the weights of some layers."""
    layer, calls = nn.Linear(2, 1), []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.forward(torch.ones(1, 2))
    assert calls == []
    with repairs.without_forward_hooks(layer):
        layer(torch.ones(1, 2))
    assert calls == ["before"]
    layer(torch.ones(1, 2))
    assert calls == ["before", "before", "after"]


def test_torch_names_the_state_of_a_compiled_module_otherwise_by_itself() -> None:
    """Seen with torch 2.14: a checkpoint would not fit the module that is not compiled; `uncompiled` gives that one."""
    layer = nn.Linear(2, 1)
    compiled: Any = torch.compile(layer, backend="eager")
    assert set(compiled.state_dict()) == {"_orig_mod.weight", "_orig_mod.bias"}
    assert uncompiled(compiled) is layer and uncompiled(layer) is layer
