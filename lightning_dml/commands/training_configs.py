"""Training configs read as `fit` reads them, without a training: for `study`, which checks them, and for `curves`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dml.commands.messages import message_of
from lightning_dml.errors import InputError

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule
    from pytorch_lightning.cli import LightningCLI


def config_parser() -> Callable[[dict[str, Any]], object]:
    """Makes a function that reads a training config as `fit` does and raises InputError for a wrong one."""
    from lightning_dml.parsing import complaint  # here, for the commands whose help is to come at once

    parser = _cli_without_a_run().parser

    def parse(config: dict[str, Any]) -> object:
        try:
            return parser.parse_object(config)
        except (ArgumentError, ValueError, ImportError) as error:
            raise InputError(message_of(error) or complaint(error)) from error

    return parse


def read_training(paths: Sequence[str]) -> tuple[LightningModule, LightningDataModule | None]:
    """Makes model and data of training configs that are laid over each other, without a trainer, and sets their seed.

    Args:
        paths: configs as `fit --config` takes them.

    Raises:
        InputError: for a file that is not there.
    """
    from pytorch_lightning import seed_everything

    from lightning_dml.parsing import complaint, instantiated

    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise InputError(f"training config {missing[0]!r} does not exist")
    cli = _cli_without_a_run()
    try:
        cli.config = cli.parser.parse_args([part for path in paths for part in ("--config", path)])
    except ArgumentError as error:
        raise InputError(message_of(error) or f"{', '.join(paths)}: {complaint(error)}") from error
    seed = cli.config.get("seed_everything")
    if seed is not None and seed is not False:
        seed_everything(0 if seed is True else seed, workers=True)
    parts = cli.config.clone()
    for part in ("trainer", "config"):  # a trainer's loggers would make folders
        parts.pop(part, None)
    objects = instantiated(cli.parser, parts)
    return objects.model, objects.get("data")


def _cli_without_a_run() -> LightningCLI:
    """LightningCLI that has its parser and has parsed nothing."""
    from pytorch_lightning import LightningDataModule, LightningModule

    from lightning_dml.commands.dml_cli import DMLCLI, SETTINGS, DMLParser

    class ParserAlone(DMLCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = {"seed_everything": False}

        def instantiate_classes(self) -> None:
            pass

    return ParserAlone(
        LightningModule,
        LightningDataModule,
        **SETTINGS,
        run=False,
        parser_class=DMLParser,
        parser_kwargs={"exit_on_error": False},
    )
