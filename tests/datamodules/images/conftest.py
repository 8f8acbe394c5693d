"""A table of images for the caches, and a count of the files that are opened."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from lightning_dml.datamodules.tables.rows import ImageTable, Texts


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    """Six pictures of several shapes, kinds and modes, two of them parts of one file, some smaller than RESIZE."""
    rng = np.random.default_rng(0)
    names = ["a.jpg", "b/1.png", "c.jpg", "d.png", "b/1.png", "ü.png"]
    shapes = {"a.jpg": (90, 60), "b/1.png": (40, 130), "c.jpg": (64, 64), "d.png": (10, 25), "ü.png": (24, 30)}
    for name, (height, width) in shapes.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Smooth, as photographs are, so that JPEG can come near.
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).convert("L" if name == "d.png" else "RGB").save(path)
    whole = {name: [0, 0, width, height] for name, (height, width) in shapes.items()}
    boxes = np.array([whole[name] for name in names], np.int32)
    boxes[4] = 30, 5, 100, 40
    return ImageTable(tmp_path / "images", Texts(names), np.arange(6), boxes)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each image file is opened, by name."""
    counts: Counter[str] = Counter()
    real = Image.open

    def counting(source: Any, *args: Any) -> ImageFile.ImageFile:
        if isinstance(source, Path):
            counts[source.name] += 1
        return real(source, *args)

    monkeypatch.setattr(Image, "open", counting)
    return counts
