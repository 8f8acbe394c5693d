"""Files that appear only when they are whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: str | Callable[[Path], None]) -> None:
    """Writes a text, or what `write` makes of the path that it is given, aside and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        if isinstance(write, str):
            aside.write_text(write, encoding="utf-8")
        else:
            write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
