"""Names that users give, as a figure is to show them."""

from __future__ import annotations


def as_text(name: str) -> str:
    """A name as matplotlib shows it: no mathematics between dollars, and in the legend even if it begins with `_`."""
    return ("\N{ZERO WIDTH SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")
