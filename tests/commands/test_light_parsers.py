"""The parsers of commands: a help must come at once, so they load none of the heavy libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers import run

HEAVY = ("torch", "pytorch_lightning", "matplotlib", "optuna", "scipy", "jsonargparse")
PROGRAM = """
import sys
from lightning_dml.commands import {name}
print({name}.parser().format_help())
print("HEAVY", sorted(set(sys.modules) & set({heavy!r})))
"""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("study", "Many trainings that differ in stated ways, each exactly once, and their table."),
        ("curves", "Draws weight against similarity for one or several losses, positives and negatives apart."),
    ],
)
def test_a_parser_loads_nothing_heavy(tmp_path: Path, name: str, sentence: str) -> None:
    """To import torch and Lightning takes seconds, which a look at the options does not need."""
    printed = run(sys.executable, "-c", PROGRAM.format(name=name, heavy=HEAVY), folder=tmp_path)
    assert sentence in " ".join(printed.split()) and "--config" in printed
    assert printed.rstrip().endswith("HEAVY []")
