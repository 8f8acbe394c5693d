"""Figures with their numbers as files that appear only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save_figure(figure: Figure, path_stem: str | Path, write_table: Callable[[Path], None]) -> list[Path]:
    """Writes a figure as PNG and SVG, and its numbers as CSV, each aside and then renamed.

    The same figure makes the same files: no date is in them.

    Args:
        figure: the figure.
        path_stem: path without a suffix; folders are made.
        write_table: writes the numbers to the path that it is given.

    Returns:
        The three paths.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "csv")]
    with matplotlib.rc_context({"svg.hashsalt": "lightning-dml"}):
        _aside(paths[0], lambda path: figure.savefig(path, format="png", dpi=150))
        _aside(paths[1], lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    _aside(paths[2], write_table)
    return paths


def _aside(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def as_text(name: str) -> str:
    """A name as matplotlib shows it: no mathematics between dollars, and in the legend even if it begins with `_`."""
    return ("\N{ZERO WIDTH SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")
