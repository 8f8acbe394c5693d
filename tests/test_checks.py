"""The vocabulary of errors: name, value and way out, and nothing that fits is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lightning_dml.checks import (
    check_choice,
    check_count,
    check_counts,
    check_embeddings,
    check_finite,
    check_flags,
    check_integers,
    check_number,
    check_tensor,
)
from lightning_dml.errors import InputError


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_count("k", 0), "k must be an integer of at least 1, got 0"),
        (lambda: check_count("k", True), "k must be an integer of at least 1, got True"),
        (lambda: check_count("k", 2.0), "k must be an integer of at least 1, got 2.0"),
        (lambda: check_count("k", "2"), "k must be an integer of at least 1, got '2'"),
        (lambda: check_count("k", 9, 2, 8, "use less"), "k must be an integer from 2 to 8, got 9; use less"),
        (lambda: check_counts("ks", []), "ks must be one or more integers of at least 1, got []"),
        (lambda: check_counts("ks", "12"), "ks must be one or more integers of at least 1, got '12'"),
        (lambda: check_counts("ks", [1, 0]), "ks must be one or more integers of at least 1, got [1, 0]"),
        (lambda: check_number("m", math.nan), "m must be a number, finite, got nan"),
        (lambda: check_number("m", math.inf, "a margin"), "m must be a margin, finite, got inf"),
        (lambda: check_number("m", "1", above=0), "m must be a number, finite, greater than 0, got '1'"),
        (lambda: check_number("m", 0, above=0), "m must be a number, finite, greater than 0, got 0"),
        (
            lambda: check_number("m", 1, least=0, below=1, hint="0 is none"),
            "m must be a number, finite, at least 0 and less than 1, got 1; 0 is none",
        ),
        (lambda: check_number("m", 3, most=2), "m must be a number, finite, at most 2, got 3"),
        (lambda: check_choice("how", "x", ("a", None)), "how must be one of a, None, got 'x'"),
        (lambda: check_tensor("rows", [1]), "rows must be a torch.Tensor, got list; torch.as_tensor() makes one"),
        (
            lambda: check_embeddings("rows", torch.ones(2, 3, dtype=torch.int64)),
            "rows must be floating point, got torch.int64; convert it with .float()",
        ),
        (
            lambda: check_embeddings("rows", torch.ones(3)),
            "rows must have shape (N, D), got (3,); flatten each item to a row",
        ),
        (lambda: check_embeddings("rows", torch.ones(2, 3), 4), "rows must have shape (N, 4), got (2, 3)"),
        (
            lambda: check_finite("rows", torch.tensor([[1.0], [math.nan]])),
            "rows has NaN or infinite values in 1 of 2 rows, the first is row 1",
        ),
        (
            lambda: check_integers("labels", torch.ones(2), 2),
            "labels must be integers, got torch.float32; number the items or classes and use torch.int64",
        ),
        (
            lambda: check_integers("ref_labels", torch.ones(2), 3, "ref_emb"),
            "ref_labels must have shape (3,), one for each row of ref_emb, got (2,)",
        ),
        (
            lambda: check_flags("mask", torch.ones(2), 2),
            "mask must be bool, got torch.float32; convert it with .bool()",
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(check: Callable[[], None], message: str) -> None:
    """Each message begins with the argument and holds the value."""
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value).startswith(message)


def test_what_fits_passes() -> None:
    """The limits themselves, numbers of either kind, and the largest sums that stay finite."""
    check_count("k", 1)
    check_count("k", 8, 2, 8)
    check_counts("ks", (1, 5))
    check_number("m", 0, least=0)
    check_number("m", 2.5, above=2, most=2.5)
    check_choice("how", None, ("a", None))
    check_embeddings("rows", torch.ones(0, 3), 3)
    check_finite("rows", torch.tensor([[3e38, 3e38]]))  # the sum overflows, no entry does
    check_integers("labels", torch.ones(2, dtype=torch.uint8), 2)
    check_flags("mask", torch.ones(2, dtype=torch.bool), 2)
