"""Checks of arguments: one vocabulary, so that the same mistake gets the same words everywhere.

Each check takes the name of the argument as the caller knows it, and raises InputError with the name, the value and the
way out. `hint` is added to the message where there is a better way out than the rule itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_dml.errors import InputError, near_names


def is_integer(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Returns True for an integer within [`least`, `most`]; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> bool:
    """Returns True for a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: object, least: int = 1, most: int | None = None, hint: str = "") -> None:
    """Raises InputError unless `value` is an integer within [`least`, `most`], no bool; `most` None is no limit."""
    if is_integer(value, least, math.inf if most is None else most):
        return
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} must be an integer {limits}, got {value!r}{_after(hint)}")


def check_number(
    name: str,
    value: object,
    meaning: str = "a number",
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    hint: str = "",
) -> None:
    """Raises InputError unless `value` is a finite number between the limits, no bool.

    Args:
        name: the argument.
        value: its value.
        meaning: what it should be instead, with its unit and an example.
        above: open lower limit.
        least: closed lower limit.
        below: open upper limit.
        most: closed upper limit.
        hint: a way out that the limits do not tell.
    """
    if is_number(value) and above < value < below and least <= value <= most:  # type: ignore[operator]
        return
    limits = [
        text.format(limit)
        for text, limit in (
            ("greater than {:g}", above),
            ("at least {:g}", least),
            ("less than {:g}", below),
            ("at most {:g}", most),
        )
        if math.isfinite(limit)
    ]
    between = " and ".join(limits)
    raise InputError(f"{name} must be {meaning}, finite{between and ', ' + between}, got {value!r}{_after(hint)}")


def check_choice(name: str, value: object, choices: Collection[object], hint: str = "") -> None:
    """Raises InputError unless `value` is one of the choices; of a misspelt word it names the nearest."""
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        near = near_names(value, map(str, choices)) if isinstance(value, str) else ""
        raise InputError(f"{name} must be one of {known}, got {value!r}{near}{_after(hint)}")


def check_counts(name: str, values: object, least: int = 1, hint: str = "") -> None:
    """Raises InputError unless `values` is a sequence of one or more integers of at least `least`."""
    right = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not right or not all(is_integer(value, least) for value in values):  # type: ignore[attr-defined]
        raise InputError(f"{name} must be one or more integers of at least {least}, got {values!r}{_after(hint)}")


def check_tensor(name: str, value: object) -> None:
    """Raises InputError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor() makes one")


def check_embeddings(name: str, tensor: object, dim: int | None = None) -> None:
    """Raises InputError unless `tensor` is (N, D) floating point, with D >= 1 and, where `dim` is given, D = `dim`."""
    check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if not tensor.is_floating_point():
        raise InputError(f"{name} must be floating point, got {tensor.dtype}; convert it with .float()")
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise InputError(f"{name} must have shape (N, D), got {tuple(tensor.shape)}; flatten each item to a row")
    if dim is not None and tensor.shape[1] != dim:
        raise InputError(
            f"{name} must have shape (N, {dim}), got {tuple(tensor.shape)}; all embeddings must come from embedders of "
            "the same dimension"
        )


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Raises InputError when `tensor` has no row."""
    if len(tensor) == 0:
        raise InputError(f"{name} is empty, got shape {tuple(tensor.shape)}; give at least one row")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises InputError when a row of `tensor` (N, D) holds NaN or infinity."""
    # One pass without an N x D mask: a sum is finite unless a row holds NaN or inf, or overflows.
    suspects = ~torch.isfinite(tensor.sum(dim=1))
    if not suspects.any():
        return
    broken = (~torch.isfinite(tensor)).any(dim=1).nonzero().flatten()
    if len(broken):
        raise InputError(
            f"{name} has NaN or infinite values in {len(broken)} of {len(tensor)} rows, the first is row "
            f"{int(broken[0])}; look at the model's outputs (learning rate, half precision), or leave those rows out"
        )


def check_integers(name: str, tensor: object, length: int, rows: str = "embeddings") -> None:
    """Raises InputError unless `tensor` is (`length`,) of an integer dtype, one for each row of `rows`."""
    values = _check_length(name, tensor, length, rows)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise InputError(
            f"{name} must be integers, got {values.dtype}; number the items or classes and use torch.int64 "
            "(floats run two classes into one above 2**24)"
        )


def check_flags(name: str, tensor: object, length: int, rows: str = "embeddings") -> None:
    """Raises InputError unless `tensor` is (`length`,) bool, one for each row of `rows`."""
    values = _check_length(name, tensor, length, rows)
    if values.dtype != torch.bool:
        raise InputError(f"{name} must be bool, got {values.dtype}; convert it with .bool()")


def _check_length(name: str, tensor: object, length: int, rows: str) -> Tensor:
    check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.shape != (length,):
        raise InputError(f"{name} must have shape ({length},), one for each row of {rows}, got {tuple(tensor.shape)}")
    return tensor


def _after(hint: str) -> str:
    return f"; {hint}" if hint else ""
