"""The glyph data set: what it is, how hard it is, and its cache."""

from __future__ import annotations

import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from lightning_dml.datamodules import GlyphsDataModule, glyphs
from lightning_dml.datamodules.seeded_index import SeededIndex
from lightning_dml.errors import InputError

GlyphSet = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]


@pytest.fixture(scope="module")
def glyph_set() -> GlyphSet:
    """Draws once for all tests, since drawing takes seconds."""
    return glyphs.draw_glyphs()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is drawn."""
    folder = tmp_path_factory.mktemp("glyphs")
    GlyphsDataModule(folder).prepare_data()
    return folder


def recall_and_map(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Recall@1 and MAP@R of raw pixels, self left out; every class has 8 images, so R is 7."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    hits = labels[np.argsort(-similarity, axis=1)[:, :7]] == labels[:, None]
    precision = hits.cumsum(1) / np.arange(1, 8)
    return float(hits[:, 0].mean()), float((hits * precision).sum(1).mean() / 7)


def test_what_is_drawn(glyph_set: GlyphSet) -> None:
    """Empty or repeated drawings would make classes that no model can tell, or that any model can."""
    images, labels, characters = glyph_set
    assert images.shape == (9600, 28, 28) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == np.repeat(np.arange(1200), 8).tolist()
    assert len(set(characters)) == 1200 and characters == sorted(characters)
    assert all(unicodedata.category(character)[0] in "LNSP" for character in characters)
    assert (images.reshape(9600, -1).max(1) > 100).all()  # none is empty
    for eight in images.reshape(1200, -1, 784).astype(np.float64):
        distances = ((eight[:, None] - eight) ** 2).sum(-1) + np.eye(8) * 1e9
        assert distances.min() > 0.5 * 255**2


def test_look_alikes_keep_the_lower_code_point(glyph_set: GlyphSet) -> None:
    """A Latin, a Greek and a Cyrillic A would be three classes with one picture."""
    characters = set(glyph_set[2])
    # Greek and Cyrillic capitals that look like A, B, H, and a rho that looks like P.
    assert not characters & set("\u0391\u0410\u0392\u0412\u0397\u041d\u03a1\u0420")
    assert {"A", "B", "H"} <= characters


def test_drawing_again_gives_the_same(glyph_set: GlyphSet) -> None:
    """Numbers in the README can only be reproduced if the data are the same for everyone."""
    images, _, characters = glyphs.draw_glyphs()
    assert np.array_equal(images, glyph_set[0]) and characters == glyph_set[2]


def test_splits(root: Path, glyph_set: GlyphSet) -> None:
    """Labels shifted against names or pictures would make every number meaningless."""
    data = GlyphsDataModule(root)
    data.setup("fit")
    assert data.train_set is not None and data.val_set is not None and data.test_set is data.val_set
    assert data.class_names is not None and sorted(data.class_names) == glyph_set[2]
    assert set(data.train_set.labels.tolist()) == set(range(600))
    assert set(data.val_set.labels.tolist()) == set(range(600, 1200))
    # The picture belongs to the character whose name its label has.
    for position in (0, 1234, 4799):
        name = data.class_names[int(data.val_set.labels[position])]
        first = glyph_set[2].index(name) * 8
        assert np.array_equal(data.eval_image(position), glyph_set[0][first + position % 8])


def test_raw_pixels_are_neither_trivial_nor_hopeless(root: Path) -> None:
    """A data set that pixels solve, or that nothing solves, shows no difference between methods."""
    data = GlyphsDataModule(root)
    data.setup("validate")
    assert data.val_set is not None
    recall, map_at_r = recall_and_map(data.val_set.images, data.val_set.labels)  # type: ignore[attr-defined]
    assert 0.48 < recall < 0.60
    assert 0.23 < map_at_r < 0.34


def test_batches(root: Path) -> None:
    """Batches have the size, the range and the classes that a network expects."""
    data = GlyphsDataModule(root, classes_per_batch=8, samples_per_class=4)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 600 * 2 // 8
    batch = next(iter(loader))
    assert batch["image"].shape == (32, 1, 28, 28) and batch["image"].dtype == torch.float32
    assert batch["image"].min() == -1 and batch["image"].max() > 0.9
    assert batch["label"].unique().numel() == 8


def test_augmentation_is_light_random_and_optional(root: Path) -> None:
    """A shift that pushes the character out of the picture would train on blank images."""
    data, plain = GlyphsDataModule(root), GlyphsDataModule(root, augment=False)
    data.setup("fit")
    plain.setup("fit")
    assert data.train_set is not None and plain.train_set is not None and data.val_set is not None
    still = plain.train_set[0]["image"]
    shaken = [data.train_set[SeededIndex(0, seed)]["image"] for seed in range(20)]
    assert torch.equal(still, plain.train_set[SeededIndex(0, 1)]["image"])
    assert len({tuple(image.flatten().tolist()) for image in shaken}) == 20
    ink = [float((image + 1).sum() / (still + 1).sum()) for image in shaken]
    assert 0.7 < min(ink) and max(ink) < 1.3  # the character stays in the picture
    assert torch.equal(data.val_set[0]["image"], data.val_set[0]["image"])


def test_image_size(root: Path) -> None:
    """A network that needs larger input gets it in training and in evaluation alike."""
    data = GlyphsDataModule(root, image_size=32)
    data.setup("fit")
    assert data.train_set is not None and data.val_set is not None
    assert data.train_set[0]["image"].shape == data.val_set[0]["image"].shape == (1, 32, 32)
    with pytest.raises(InputError, match="image_size must be an integer of at least 1, got 0"):
        GlyphsDataModule(image_size=0)


def refuse_to_draw() -> GlyphSet:
    """Stands in for drawing where the cache should have made it needless."""
    raise AssertionError("drawn again")


def test_the_cache_is_read_and_leaves_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is not read costs seconds at each start; leftovers would pile up."""
    monkeypatch.setattr(glyphs, "draw_glyphs", refuse_to_draw)
    data = GlyphsDataModule(root)
    data.prepare_data()
    data.setup("fit")
    left = [path.name for path in root.iterdir() if not path.name.endswith(".lock")]  # some releases keep the lock
    assert left == [glyphs._cache_name()]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "other"])
def test_a_damaged_cache_is_drawn_again(
    damage: str, root: Path, tmp_path: Path, glyph_set: GlyphSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job killed while writing must not leave a data set that fails, or worse, trains on garbage."""
    path = tmp_path / glyphs._cache_name()
    whole = (root / path.name).read_bytes()
    middle = len(whole) // 2
    contents = {
        "empty": b"",
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 99]) + whole[middle + 99 :],
        "text": b"not a cache",
    }
    if damage == "other":
        np.savez(path, images=np.zeros((2, 28, 28), np.uint8), labels=np.zeros(2, int), points=np.zeros(1, int))
    else:
        path.write_bytes(contents[damage])
    calls = []

    def draw() -> GlyphSet:
        calls.append(1)
        return glyph_set

    monkeypatch.setattr(glyphs, "draw_glyphs", draw)
    data = GlyphsDataModule(tmp_path)
    data.prepare_data()
    assert calls == [1]
    monkeypatch.setattr(glyphs, "draw_glyphs", refuse_to_draw)
    data.setup("fit")
    assert data.train_set is not None and len(data.train_set) == 4800


def test_of_several_processes_one_draws(tmp_path: Path, glyph_set: GlyphSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs of a study start together; each would draw for seconds what the first has drawn."""
    calls = []

    def draw() -> GlyphSet:
        calls.append(1)
        time.sleep(0.3)  # long enough for the other to come by
        return glyph_set

    monkeypatch.setattr(glyphs, "draw_glyphs", draw)
    with ThreadPoolExecutor(2) as pool:  # threads, whose locks exclude each other as those of processes do
        list(pool.map(lambda _: GlyphsDataModule(tmp_path).prepare_data(), range(2)))
    assert calls == [1]


def test_the_cache_name_follows_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Pillow or typeface draws other pictures; an old cache would mix both."""
    names = {glyphs._cache_name()}
    monkeypatch.setattr(glyphs, "pillow_version", "0.0")
    names.add(glyphs._cache_name())
    monkeypatch.setattr(matplotlib, "__version__", "0.0")
    names.add(glyphs._cache_name())
    monkeypatch.setattr(glyphs, "_VERSION", -1)
    names.add(glyphs._cache_name())
    assert len(names) == 4


def test_the_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache goes where XDG says, not into the user's working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert GlyphsDataModule().root == tmp_path / "lightning_dml"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert GlyphsDataModule().root == tmp_path / "home" / ".cache" / "lightning_dml"


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, glyph_set: GlyphSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only home the training still runs, only without a cache."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: glyph_set)
    data = GlyphsDataModule(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"cannot keep the drawings in root .*file"):
        data.prepare_data()
    data.setup("fit")
    assert data.val_set is not None and len(data.val_set) == 4800


def test_too_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the typefaces is told so, instead of training on a smaller data set."""
    monkeypatch.setattr(glyphs, "_DIFFERENT", 1e9)
    with pytest.raises(InputError, match=r"have 0 characters with 8 different drawings, and .* takes 1200"):
        glyphs.draw_glyphs()
