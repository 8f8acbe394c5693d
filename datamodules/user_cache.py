"""The user's cache folder, for files that can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """The folder `lightning_dml` in `XDG_CACHE_HOME` or `~/.cache`; without a home, in the temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():  # the XDG specification says to ignore relative paths
        return Path(base) / "lightning_dml"
    try:
        return Path.home() / ".cache" / "lightning_dml"
    except RuntimeError:  # a container whose user has no entry and no home
        return Path(tempfile.gettempdir()) / "lightning_dml"
