"""Pieces that every parser of jsonargparse shares here: objects, short help, and reading its messages."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

MOST_CLASSES = 30
"""A help lists no more classes than this; an argument that may be any module of torch has more than a thousand."""


def instantiated(parser: ArgumentParser, parsed: Namespace) -> Any:
    """Makes the objects that a parsed config names; one attribute for each argument."""
    # Called instantiate_classes before jsonargparse 4.49, which warns of that name; version 5 has it no more.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return make(parsed)


class BriefHelp(DefaultHelpFormatter):
    """Help in which a long list of classes is replaced by their number."""

    def _expand_help(self, action: Any) -> str:
        text, listed, names = str(super()._expand_help(action)).partition(", known subclasses: ")
        count = names.count(",") + 1
        if not listed or count <= MOST_CLASSES:
            return text + listed + names
        return f"{text}, {count:,} known subclasses)"


# What follows reads the messages of jsonargparse, of version 4.39 to 4.53. They have no structure, so a version that
# words them differently costs precision, never the error itself: each function then gives less or nothing.


def complaint(error: BaseException) -> str:
    """The message of jsonargparse in one line, without the value, which may be a whole config."""
    return " ".join(str(error).partition("Given value type")[0].split())


def constructor_complaint(error: BaseException) -> str:
    """The message of a class's constructor, which jsonargparse repeats for every type; if none, all that it says."""
    text = " ".join(str(error).split())
    return text.partition(" Errors: - ")[2].partition(" - ")[0] or text


def class_complaint(error: BaseException) -> tuple[str, str] | None:
    """The class path that was refused and the reason, if the message tells; `torch.nn.Module` is not one to name."""
    text = " ".join(str(error).split())
    refused = re.search(r"Problem with given class_path '(?!torch\.nn\.Module)([\w.]+)': (.*?)(?= - |$)", text)
    return (refused[1], re.split(r" Errors:| Given value", refused[2])[0]) if refused else None


def ambiguous_classes(error: BaseException) -> str | None:
    """The class paths among which a class name leaves the choice, if that is what the message is about."""
    text = " ".join(str(error).split())
    several = re.search(r"Give the full class path to avoid ambiguity: (.*?)\.(?: |$)", text)
    return several[1] if several else None


def refused_value(error: BaseException, argument: str) -> str:
    """The value that was refused, as the message repeats it; with its key where it came as `--ARGUMENT.KEY VALUE`."""
    value = " ".join(str(error).split()).rpartition("Given value: ")[2]
    nested = re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", value)
    return f"{nested[2]} for {argument}.{nested[1]}" if nested else value
