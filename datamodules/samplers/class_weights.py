"""Rates at which classes are drawn, from the forms in which a user may give class weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_dml.checks import check_choice
from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.errors import InputError

ClassWeights = Literal["uniform", "sqrt"] | Mapping[int, float] | Sequence[float] | NDArray[Any] | Tensor
"""A rule by its name, a weight for some labels by label, or one for each label from 0 on."""

# Beyond this ratio float64 could not tell a weight's share of all from zero.
_WIDEST = 1e100


def class_rates(class_weights: ClassWeights, names: IntArray, counts: IntArray) -> NDArray[np.float64]:
    """Weight of every class as a share of all.

    Args:
        class_weights: "uniform" weighs every class the same, and "sqrt" by the square root of its images. A mapping
            gives the weights of the labels that it names; the others weigh 1. A vector (L,) holds one weight for
            each label from 0 to the largest; entries of labels that do not occur are not looked at.
        names: (C,) the labels, ascending, C of at least 1.
        counts: (C,) images of each.

    Returns:
        (C,) positive, with sum 1.

    Raises:
        InputError: for another word, a label that does not occur, a vector of another length or with negative
            labels, and for weights that are not positive, finite and within a factor of 1e100 of each other.

    Examples:
        >>> class_rates({7: 3.0}, np.array([5, 7]), np.array([20, 20])).tolist()
        [0.25, 0.75]
    """
    if isinstance(class_weights, str):
        weights = _by_rule(class_weights, counts)
    elif isinstance(class_weights, Mapping):
        weights = _by_label(class_weights, names)
    else:
        weights = _by_position(class_weights, names)
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        raise InputError(
            f"class_weights must be positive and finite, got {weights[wrong][0]} for class {names[wrong][0]}: "
            "to leave a class out, leave its images out of the data set"
        )
    scaled = weights / weights.max()
    if scaled.min() < 1 / _WIDEST:
        raise InputError(
            f"class_weights must lie within a factor of {_WIDEST:g} of each other, got {weights.min()} and "
            f"{weights.max()}"
        )
    rates: NDArray[np.float64] = scaled / scaled.sum()
    return rates


def _by_rule(rule: str, counts: IntArray) -> NDArray[np.float64]:
    check_choice("class_weights", rule, ("uniform", "sqrt"), hint="or give a weight for each label; None counts images")
    return np.ones(len(counts)) if rule == "uniform" else np.sqrt(counts.astype(np.float64))


def _by_label(given: Mapping[int, float], names: IntArray) -> NDArray[np.float64]:
    places = {name: place for place, name in enumerate(names.tolist())}
    unknown = [name for name in given if name not in places]
    if unknown:
        raise InputError(
            f"class_weights names class {unknown[0]!r} ({len(unknown)} such class(es)), which is not among the labels: "
            "take it out, or check that these are the training labels"
        )
    weights = np.ones(len(names))
    weights[[places[name] for name in given]] = _numbers(list(given.values()))
    return weights


def _by_position(given: Any, names: IntArray) -> NDArray[np.float64]:
    weights = _numbers(given)
    if weights.ndim != 1:
        raise InputError(f"class_weights must be a vector with a weight for each label, got shape {weights.shape}")
    if names[0] < 0:
        raise InputError(f"class_weights by position cannot reach class {names[0]}: give a mapping of label to weight")
    if len(weights) != names[-1] + 1:
        raise InputError(
            f"class_weights must have {names[-1] + 1} entries, one for each label from 0 to {names[-1]}, got "
            f"{len(weights)}; a mapping may name some labels only"
        )
    return weights[names]


def _numbers(values: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"class_weights must be numbers: {error}") from None
