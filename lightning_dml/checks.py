"""What every function of this package asks of its tensors; the messages name the argument and the way out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dml.errors import InputError


def is_integer(value: object, least: int) -> bool:
    """Whether `value` is an integer, no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_tensor(name: str, value: object) -> None:
    """Raises InputError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor() makes one")


def check_embeddings(name: str, tensor: Tensor) -> None:
    """Raises InputError unless `tensor` is (N, D) floating point with D >= 1."""
    check_tensor(name, tensor)
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise InputError(
            f"{name} must be (rows, dimensions), got shape {tuple(tensor.shape)}; flatten each item to a row"
        )
    if not tensor.is_floating_point():
        raise InputError(f"{name} must be floating point, got {tensor.dtype}; convert it with .float()")


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


def check_integers(name: str, tensor: Tensor, length: int) -> None:
    """Raises InputError unless `tensor` is (length,) of an integer dtype."""
    _check_length(name, tensor, length)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(
            f"{name} must be integers, got {tensor.dtype}; number the items or classes and use torch.int64 "
            "(floats run two classes into one above 2**24)"
        )


def check_flags(name: str, tensor: Tensor, length: int) -> None:
    """Raises InputError unless `tensor` is (length,) bool."""
    _check_length(name, tensor, length)
    if tensor.dtype != torch.bool:
        raise InputError(f"{name} must be bool, got {tensor.dtype}; convert it with .bool()")


def _check_length(name: str, tensor: Tensor, length: int) -> None:
    check_tensor(name, tensor)
    if tensor.shape != (length,):
        raise InputError(f"{name} must have shape ({length},), one for each row, got {tuple(tensor.shape)}")


def check_number(
    name: str, value: float, meaning: str, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    """Raises `InputError` unless `value` is finite, greater than `above`, and within [`least`, `most`].

    Args:
        name: the argument.
        value: what was passed.
        meaning: what it should be instead, with an example.
        above: open lower limit.
        least: closed lower limit.
        most: closed upper limit.
    """
    if math.isfinite(value) and value > above and least <= value <= most:
        return
    limits = [
        text.format(limit)
        for text, limit in (("greater than {:g}", above), ("at least {:g}", least), ("at most {:g}", most))
        if math.isfinite(limit)
    ]
    raise InputError(f"{name} must be {meaning}, finite{''.join(f', {limit}' for limit in limits)}; got {value}")
