"""The measures that losses and miners compare a pair by."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_dml.checks import check_choice

Measure = Literal["similarity", "distance", "squared_distance"]
"""The cosine similarity S of two unit vectors, their distance d = sqrt(2 - 2 S), or its square.

The default is `similarity` everywhere, as the engine works on S; a docstring says where a paper's own form is another.
"""

UnsquaredMeasure = Literal["similarity", "distance"]
"""The measures of the losses that have no form on squared distances."""


def check_measure(measure: object) -> None:
    """Raises InputError unless `measure` is a `Measure`."""
    check_choice("measure", measure, get_args(Measure))


def check_unsquared_measure(measure: object) -> None:
    """Raises InputError unless `measure` is an `UnsquaredMeasure`."""
    check_choice("measure", measure, get_args(UnsquaredMeasure))
