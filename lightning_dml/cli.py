"""The command `lightning-dml`: LightningCLI with the defaults that metric learning needs."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities import rank_zero_warn

from lightning_dml import callbacks, datamodules, losses, modules
from lightning_dml.commands.bank import DMLTrainer
from lightning_dml.errors import InputError, input_error_in
from lightning_dml.parsing import instantiated

BY_NAME = (callbacks, datamodules, losses, modules)
"""Imported here, so that a config may name their classes without the module."""

SETTINGS: dict[str, Any] = {
    "trainer_class": DMLTrainer,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    # Lightning would re-wrap the P x K sampler and break K per class.
    "trainer_defaults": {"use_distributed_sampler": False},
    # A requeued job would otherwise die on the config that it wrote itself.
    "save_config_kwargs": {"overwrite": True},
}
EPILOG = (
    "lightning-dml study --help: many trainings that differ in stated ways, and their table. "
    "lightning-dml curves --help: weight curves of losses"
)


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
    arguments = sys.argv[1:] if args is None else list(args)
    try:
        if arguments[:1] == ["study"]:
            from lightning_dml.commands.study import main as study

            study(arguments[1:], config_parser)
        elif arguments[:1] == ["curves"]:
            from lightning_dml.commands.curves import main as curves

            curves(arguments[1:], read_training)
        else:
            DMLCLI(
                LightningModule,
                LightningDataModule,
                **SETTINGS,
                parser_kwargs={"epilog": EPILOG},
                args=None if args is None else arguments,
            )
    except (ValueError, ModuleNotFoundError, FileNotFoundError, MisconfigurationException) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"lightning-dml: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def config_parser() -> Callable[[dict[str, Any]], object]:
    """What reads a training config as `fit` does, makes nothing of it, and raises InputError for a wrong one."""
    parser = _config_cli().parser

    def parse(config: dict[str, Any]) -> object:
        try:
            return parser.parse_object(config)
        except (ArgumentError, ValueError, ImportError) as error:
            # jsonargparse ends with all that it was given, which may be a whole config.
            text = " ".join(str(error).partition("Given value type")[0].split())
            raise InputError(_message(error) or text) from error

    return parse


def read_training(paths: Sequence[str]) -> tuple[LightningModule, LightningDataModule | None]:
    """Model and data of training configs that are laid over each other, without a trainer, and with their seed set.

    Args:
        paths: configs as `fit --config` takes them.

    Raises:
        InputError: for a file that is not there.
    """
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise InputError(f"training config {missing[0]!r} does not exist")
    cli = _config_cli()
    try:
        cli.config = cli.parser.parse_args([part for path in paths for part in ("--config", path)])
    except ArgumentError as error:
        text = " ".join(str(error).partition("Given value type")[0].split())
        raise InputError(_message(error) or f"{', '.join(paths)}: {text}") from error
    seed = cli.config.get("seed_everything")
    if seed is not None and seed is not False:
        seed_everything(0 if seed is True else seed, workers=True)
    parts = cli.config.clone()
    for part in ("trainer", "config"):  # a trainer's loggers would make folders
        parts.pop(part, None)
    made = instantiated(cli.parser, parts)
    return made.model, made.get("data")


def _config_cli() -> _ConfigParser:
    return _ConfigParser(
        LightningModule, LightningDataModule, **SETTINGS, run=False, parser_kwargs={"exit_on_error": False}
    )


class _ConfigParser(DMLCLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = {"seed_everything": False}

    def instantiate_classes(self) -> None:
        pass


def _message(error: BaseException) -> str | None:
    """One line for what the caller can put right, None for anything else."""
    if isinstance(error, ModuleNotFoundError) and "tensorboard" in str(error):
        return (
            "TensorBoardLogger needs the package tensorboard: pip install 'lightning-dml[report]', "
            "or take the logger out of the config"
        )
    if isinstance(error, FileNotFoundError | MisconfigurationException):
        return " ".join(str(error).split())
    ours = input_error_in(error)
    return None if ours is None else str(ours)
