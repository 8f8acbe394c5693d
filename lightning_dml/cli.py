"""The command `lightning-dml`: answers a request for help at once, and hands anything else to the command it names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from lightning_dml.commands.help_words import asks_for_all, asks_for_help
from lightning_dml.commands.messages import is_lightnings, message_of
from lightning_dml.commands.short_help import help_of_command, help_of_program
from lightning_dml.commands.table import BY_NAME
from lightning_dml.errors import InputError

# Nothing here loads torch or Lightning: they take seconds, and a help is to come at once.


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: the arguments after the program's name; None takes them from `sys.argv`.

    Raises:
        SystemExit: with status 2 and one line on stderr for input that the caller can put right.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    try:
        _run(arguments, args is None)
    except Exception as error:
        ours = isinstance(error, ValueError | ModuleNotFoundError | FileNotFoundError) or is_lightnings(error)
        message = message_of(error) if ours else None
        if message is None:
            raise
        print(f"lightning-dml: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(arguments: list[str], from_the_shell: bool) -> None:
    if not arguments:
        raise InputError(f"a command is missing: {', '.join(BY_NAME)}; lightning-dml --help says what each does")
    command = BY_NAME.get(arguments[0])
    if command is None and not arguments[0].startswith("-"):
        near = get_close_matches(arguments[0], BY_NAME, n=1)
        raise InputError(
            f"{arguments[0]!r} is no command of lightning-dml, {f'did you mean {near[0]}' if near else 'take one of'}"
            f"{'?' if near else ' ' + ', '.join(BY_NAME)}"
        )
    if command is not None and command.run is not None:
        command.run(arguments[1:])
    elif asks_for_help(arguments) and not asks_for_all(arguments):
        _show_help(arguments)
    else:
        from lightning_dml.commands.dml_cli import run

        # Told of the shell's arguments as such: Lightning warns where it is given others than those of sys.argv.
        run(None if from_the_shell else arguments)


def _show_help(arguments: Sequence[str]) -> None:
    """Prints the help of the first command that is named, wherever it stands, or that of the program."""
    named = next((BY_NAME[argument] for argument in arguments if argument in BY_NAME), None)
    if named is None:
        print(help_of_program())
    elif named.run is None:
        print(help_of_command(named.name))
    else:
        named.run(["--help"])
