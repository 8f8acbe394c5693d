"""The commands of `lightning-dml`: a name, a sentence and what runs it. The help of the program is made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of `lightning-dml`.

    Args:
        name: the word on the command line.
        summary: a sentence for the help.
        run: runs it on the arguments after its name; imports what it needs by itself, so that the help needs nothing.
            None for the commands that LightningCLI runs.
    """

    name: str
    summary: str
    run: Callable[[Sequence[str]], None] | None = None


def _curves(arguments: Sequence[str]) -> None:
    from lightning_dml.commands import curves, training_configs

    curves.main(arguments, training_configs.read_training)


def _study(arguments: Sequence[str]) -> None:
    from lightning_dml.commands import study, training_configs

    study.main(arguments, training_configs.config_parser)


COMMANDS = (
    Command("fit", "Trains an embedder and evaluates its retrieval as it goes."),
    Command("validate", "Evaluates retrieval on the validation classes."),
    Command("test", "Evaluates retrieval on the test classes."),
    Command("predict", "Embeds the images of a data module in one pass, for a callback that writes them."),
    Command("bank", "Embeds the training set and writes it as a memory bank that a training starts from."),
    Command("curves", "Draws the weight curves of losses, also over the pairs of a real batch.", _curves),
    Command("study", "Runs many trainings that differ in stated ways, and makes their table and figures.", _study),
)
BY_NAME = {command.name: command for command in COMMANDS}
