"""Figures with their numbers as files that appear only when they are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lightning_dml.files import write_whole


def save_figure(figure: Figure, path_stem: str | Path, write_table: Callable[[Path], None]) -> list[Path]:
    """Writes a figure as PNG and SVG, and its numbers as CSV; each file appears only when it is whole.

    The same figure makes the same files: no date is in them.

    Args:
        figure: the figure.
        path_stem: path without a suffix; folders are made.
        write_table: writes the numbers to a path.

    Returns:
        The three paths.

    Raises:
        UnwritableFile: an InputError and an OSError; if a file cannot be written. The old one is then as it was.
    """
    stem = Path(path_stem)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "csv")]
    with matplotlib.rc_context({"svg.hashsalt": "lightning-dml"}):
        write_whole(paths[0], lambda path: figure.savefig(path, format="png", dpi=150))
        write_whole(paths[1], lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    write_whole(paths[2], write_table)
    return paths


def as_text(name: str) -> str:
    """A name for matplotlib to show: no mathematics between dollars, and in the legend even if it begins with `_`."""
    return ("\N{ZERO WIDTH SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")
