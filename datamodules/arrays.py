"""Flat arrays, in which labels, boxes and roles stand: their types, a check, and how worker processes share them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dml.errors import InputError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def integer_vector(name: str, values: Sequence[int] | NDArray[Any] | Tensor) -> NDArray[Any]:
    """The argument `name` as a vector of integers, (N,).

    Raises:
        InputError: if it has another shape, or holds anything but integers.
    """
    vector = np.asarray(values)
    if vector.ndim != 1 or (len(vector) and not np.issubdtype(vector.dtype, np.integer)):
        raise InputError(f"{name} must be a vector of integers, got shape {vector.shape} of {vector.dtype}")
    return vector if len(vector) else vector.astype(np.int64)


def share_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the numeric arrays of a state into tensors, which torch pickles to its workers in shared memory."""
    return {name: _as_tensor(value) for name, value in state.items()}


def unshare_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `share_arrays`."""
    return {name: value.array if isinstance(value, _SharedArray) else value for name, value in state.items()}


class _SharedArray:
    """An array on its way to another process."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.tensor = torch.from_numpy(array.copy())  # of its own, or the array would live as long as this does

    @property
    def array(self) -> NDArray[Any]:
        """The array, on the memory of the tensor."""
        return self.tensor.numpy()


# The tensor of an array lives as long as the array: all workers then share one, and its memory is not gone before one
# of them that was just spawned has taken hold of it. An array that went to workers once must not be written to.
_SHARED_ARRAYS: dict[int, _SharedArray] = {}


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or not value.dtype.isnative:
        return value
    key = id(value)
    if key not in _SHARED_ARRAYS:
        _SHARED_ARRAYS[key] = _SharedArray(value)
        weakref.finalize(value, _SHARED_ARRAYS.pop, key)
    return _SHARED_ARRAYS[key]
