"""`DMLCLI`: LightningCLI with the trainer, the defaults and the help that metric learning needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_warn

import lightning_dml
from lightning_dml import callbacks, datamodules, losses, modules
from lightning_dml.commands.bank import DMLTrainer
from lightning_dml.commands.help_words import asks_for_all
from lightning_dml.parsing import BriefHelp

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


def run(args: Sequence[str] | None) -> None:
    """Runs one of Lightning's commands, or `bank`.

    Args:
        args: the command and its arguments; None takes them from `sys.argv`.
    """
    words = sys.argv[1:] if args is None else args
    DMLCLI(
        LightningModule,
        LightningDataModule,
        **SETTINGS,
        parser_class=FullParser if asks_for_all(words) else DMLParser,
        args=None if args is None else list(args),
    )


class DMLParser(LightningArgumentParser):
    """Lightning's parser, whose help leaves out lists of classes that fill pages."""

    help_formatter: type[DefaultHelpFormatter] = BriefHelp

    def __init__(self, *args: Any, description: str | None = lightning_dml.__doc__, **options: Any) -> None:
        # Set here, as the parser behind `--model.help CLASS` is made of this class without any options.
        options.setdefault("formatter_class", self.help_formatter)
        super().__init__(*args, description=str(description), **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parses arguments; the word `all` behind a request for help has done its work and goes."""
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(words[:-1] if asks_for_all(words) else words, *others, **options)


class FullParser(DMLParser):
    """The parser whose help has every class that an argument might be."""

    help_formatter = DefaultHelpFormatter


class DMLCLI(LightningCLI):
    """LightningCLI whose evaluation says when it scores weights that nobody trained."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and `bank`, with the arguments of each that come from the rest of the config."""
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
