"""Weight curves against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lightning_dml.errors import InputError
from lightning_dml.losses import curves

FORMULAS: list[tuple[curves.Curve, Callable[[float], float]]] = [
    (curves.Constant(3.0), lambda s: 3.0),
    (curves.Step(0.2, 2.0), lambda s: 2.0 if s > 0.2 else 0.0),
    (curves.Step(0.2, 2.0, above=False), lambda s: 2.0 if s < 0.2 else 0.0),
    (curves.Linear(0.1, 4.0), lambda s: 4 * max(0.0, s - 0.1)),
    (curves.Linear(0.1, 4.0, above=False), lambda s: 4 * max(0.0, 0.1 - s)),
    (curves.Power(-0.1, 3.0, 2.0), lambda s: 2 * max(0.0, s + 0.1) ** 3),
    (curves.Power(-0.1, 0.5, 2.0, above=False), lambda s: 2 * max(0.0, -0.1 - s) ** 0.5),
    (curves.Exponential(-7.0, 0.3, 0.5), lambda s: 0.5 * math.exp(-7 * (s - 0.3))),
    (curves.Sigmoid(12.0, 0.4, 3.0), lambda s: 3 / (1 + math.exp(-12 * (s - 0.4)))),
]


@pytest.mark.parametrize(("curve", "formula"), FORMULAS, ids=[repr(curve)[:40] for curve, _ in FORMULAS])
def test_a_curve_equals_its_formula(curve: curves.Curve, formula: Callable[[float], float]) -> None:
    """A curve is the weight of a pair; a wrong sign or factor would train, only badly."""
    similarity = torch.linspace(-1, 1, 201, dtype=torch.float64).reshape(3, 67)
    expected = torch.tensor([formula(float(s)) for s in similarity.flatten()], dtype=torch.float64)
    torch.testing.assert_close(curve(similarity), expected.reshape(3, 67))


def test_points_are_joined_by_lines() -> None:
    """Users draw a curve by points and rely on straight lines between and level ends."""
    points = [(-0.5, 1.0), (0.0, 3.0), (0.75, 0.0)]
    similarity = torch.linspace(-1, 1, 101, dtype=torch.float64)
    expected = np.interp(similarity.numpy(), [x for x, _ in points], [y for _, y in points])
    np.testing.assert_allclose(curves.PiecewiseLinear(points)(similarity).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: curves.PiecewiseLinear([(0.0, 1.0)]), "at least two"),
        (lambda: curves.PiecewiseLinear([(0.5, 1.0), (0.5, 2.0)]), "must increase"),
        (lambda: curves.PiecewiseLinear([(0.0, 1.0), (1.0, math.nan)]), "finite"),
        (lambda: curves.Power(exponent=-1.0), "exponent.*-1"),
        (lambda: curves.Step(math.inf), "threshold.*inf"),
    ],
)
def test_impossible_curves_are_refused(make: Callable[[], object], words: str) -> None:
    """NaN weights or unordered points would show only as a diverging loss."""
    with pytest.raises(InputError, match=words):
        make()
