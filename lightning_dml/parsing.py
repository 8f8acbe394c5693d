"""What is the same in every parser of jsonargparse here."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace


def instantiated(parser: ArgumentParser, parsed: Namespace) -> Any:
    """Makes the objects that a parsed config names; one attribute for each argument."""
    # Called instantiate_classes before jsonargparse 4.49, which warns of that name; version 5 has it no more.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return make(parsed)
