"""The errors that the command line shows without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, a file or a tensor that the caller can put right.

    The message names the argument, the value and the way out. It is a `ValueError`, so code that
    catches those keeps working; `lightning-dml` prints it as one line instead of a traceback.
    """


class NothingToEvaluate(InputError):
    """There are no queries, or there is no gallery, to evaluate."""
