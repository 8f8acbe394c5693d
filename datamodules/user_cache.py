"""The folder for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`lightning_dml` in the user's cache folder: `XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification asks for relative paths to be passed over.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "lightning_dml"
