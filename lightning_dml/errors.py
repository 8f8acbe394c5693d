"""The errors that the command line shows without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A setting, a file or a tensor that the caller can put right.

    The message names the argument, the value and the way out. It is a `ValueError`, so code that
    catches those keeps working; `lightning-dml` prints it as one line instead of a traceback.
    """


def input_error_in(error: BaseException) -> InputError | None:
    """The error itself, or the first of ours among those that led to it.

    jsonargparse wraps what a constructor raises in a report on every type that the argument might have had.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, InputError):
        link = link.__cause__ or link.__context__
    return link


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error as one line of at most `limit` characters; its type where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of a message that asks for the nearest of the known names; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class NothingToEvaluate(InputError):
    """There are no queries, or there is no gallery, to evaluate."""
