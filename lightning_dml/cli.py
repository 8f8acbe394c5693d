"""The command `lightning-dml`: LightningCLI with the defaults that metric learning needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities import rank_zero_warn

from lightning_dml import callbacks, datamodules, losses, modules
from lightning_dml.bank_command import DMLTrainer
from lightning_dml.errors import InputError

BY_NAME = (callbacks, datamodules, losses, modules)
"""Imported here, so that a config may name their classes without the module."""


class DMLCLI(LightningCLI):
    """LightningCLI whose evaluation says when it scores weights that nobody trained."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ours, each with the arguments that come from the rest of the config."""
        return {**LightningCLI.subcommands(), "bank": {"model", "datamodule"}}

    def before_bank(self) -> None:
        """Called before `bank`."""
        self._warn_without_checkpoint("bank")

    def before_validate(self) -> None:
        """Called before `validate`."""
        self._warn_without_checkpoint("validate")

    def before_test(self) -> None:
        """Called before `test`."""
        self._warn_without_checkpoint("test")

    def _warn_without_checkpoint(self, command: str) -> None:
        if self.config[command].ckpt_path is None:
            rank_zero_warn(
                f"{command} runs without --ckpt_path: it takes the weights that the config builds, "
                "random ones unless the backbone is pretrained"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: the arguments after the program's name; None takes them from `sys.argv`.

    Raises:
        SystemExit: with status 2 and one line on stderr for input that the caller can put right.
    """
    try:
        DMLCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=DMLTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Lightning would re-wrap the P x K sampler and break K per class.
            trainer_defaults={"use_distributed_sampler": False},
            # A requeued job would otherwise die on the config that it wrote itself.
            save_config_kwargs={"overwrite": True},
            args=list(args) if args is not None else None,
        )
    except (ValueError, ModuleNotFoundError, FileNotFoundError, MisconfigurationException) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"lightning-dml: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def _message(error: BaseException) -> str | None:
    """One line for what the caller can put right, None for anything else."""
    if isinstance(error, ModuleNotFoundError) and "tensorboard" in str(error):
        return (
            "TensorBoardLogger needs the package tensorboard: pip install 'lightning-dml[report]', "
            "or take the logger out of the config"
        )
    if isinstance(error, FileNotFoundError | MisconfigurationException):
        return " ".join(str(error).split())
    # jsonargparse wraps what a constructor raises in a report on every type that the argument might have had.
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, InputError):
        seen = seen.__cause__ or seen.__context__
    return None if seen is None else str(seen)
