"""Requests for help, told from other arguments."""

from __future__ import annotations

from collections.abc import Sequence

HELP = ("-h", "--help")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """True for arguments with `--help` among them."""
    return any(argument in HELP for argument in arguments)


def asks_for_all(arguments: Sequence[str]) -> bool:
    """True for arguments that ask for help, for that of a class too, and end with the word `all`."""
    return arguments[-1:] == ["all"] and any(
        argument in HELP or (argument.startswith("--") and argument.partition("=")[0].endswith(".help"))
        for argument in arguments
    )
