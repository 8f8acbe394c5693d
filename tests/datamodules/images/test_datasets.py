"""The data sets: what a sample is, whose randomness it uses, and what a broken file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.datamodules.images.file_dataset import ImageFileDataset
from lightning_dml.datamodules.seeded_index import SeededIndex
from lightning_dml.datamodules.tables.rows import ImageTable, Texts
from lightning_dml.errors import InputError

GREY = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


def to_tensor(image: Any) -> Tensor:
    """A plain picture in [0, 1], so that colours can be checked by eye."""
    converted: Tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])(image)
    return converted


def file_set(paths: list[Path], labels: list[int]) -> ImageFileDataset:
    """Files by their whole paths."""
    return ImageFileDataset(ImageTable(Path(), Texts(str(path) for path in paths), np.array(labels)), to_tensor)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One file per colour mode that real folders mix: RGB, grey and with transparency."""
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    Image.new("RGB", (5, 4), (255, 0, 51)).save(paths[0])
    Image.new("L", (5, 4), 51).save(paths[1])
    Image.new("RGBA", (5, 4), (0, 51, 255, 9)).save(paths[2])
    return paths


def test_array_samples() -> None:
    """The keys and dtypes that module and callback rely on, alone and collated."""
    data = ArrayDataset(GREY, [7, 8, 9], lambda image: image.float())
    sample = data[2]
    assert len(data) == 3 and set(sample) == {"image", "label", "index"}
    assert sample["image"].shape == (1, 4, 5) and torch.equal(sample["image"][0], torch.from_numpy(GREY[2]).float())
    assert (sample["label"], sample["index"]) == (9, 2)
    batch = default_collate([data[0], data[2]])
    assert batch["image"].shape == (2, 1, 4, 5)
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["label"].tolist() == [7, 9] and batch["index"].tolist() == [0, 2]


def test_a_transform_in_place_does_not_reach_the_array() -> None:
    """Otherwise every epoch would augment the result of the last one."""
    images = GREY.copy()
    data = ArrayDataset(images, [0, 0, 0], lambda image: image.fill_(0).float())
    assert data[1]["image"].sum() == 0
    data.picture(1)[:] = 0
    assert np.array_equal(images, GREY)


def test_file_samples_are_rgb(files: list[Path]) -> None:
    """A grey or transparent file among colour ones would break the batch."""
    data = file_set(files, [0, 0, 1])
    colours = [data[row]["image"][:, 0, 0].tolist() for row in range(3)]
    assert colours == [pytest.approx(colour) for colour in ([1, 0, 0.2], [0.2, 0.2, 0.2], [0, 0.2, 1])]
    assert data[0]["image"].shape == (3, 4, 5)
    picture = data.picture(0)
    assert picture.shape == (4, 5, 3) and picture.dtype == np.uint8 and picture[0, 0].tolist() == [255, 0, 51]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_is_named_with_its_row(workers: int, files: list[Path]) -> None:
    """Among a million files the user must learn which one to remove, also from a worker."""
    files[1].write_bytes(files[1].read_bytes()[:40])
    loader = DataLoader(file_set(files, [0, 0, 1]), num_workers=workers)
    with pytest.raises(InputError, match=r"cannot read image .*b\.png \(row 1 of the data set\).* remove the file"):
        list(loader)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_what_is_no_image_or_no_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    """Empty, misnamed and missing files are reported alike, by path."""
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.jpg \(row 0 "):
        file_set([path], [0])[0]


def test_a_seeded_index_decides_the_random_transform_and_nothing_else() -> None:
    """Resumed runs repeat their augmentation through this seed, and it must not touch the model's randomness."""
    data = ArrayDataset(GREY, [0, 1, 2], lambda image: torch.rand(4))
    before = torch.random.get_rng_state()
    first, other = data[SeededIndex(1, 5)]["image"], data[SeededIndex(1, 6)]["image"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, data[SeededIndex(1, 5)]["image"]) and not torch.equal(first, other)
    assert type(data[SeededIndex(1, 5)]["index"]) is int
    # A plain index draws from the global generator.
    assert not torch.equal(data[1]["image"], data[1]["image"])
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_a_seeded_index_does_not_seed_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding CUDA per sample would be slow and, in a forked worker, an error."""

    def refuse(seed: int) -> None:
        raise AssertionError("the GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    ArrayDataset(GREY, [0, 1, 2], lambda image: torch.rand(4))[SeededIndex(1, 5)]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GREY, [0, 1], "images and labels must be as many, got 3 and 2"),
        (GREY.astype(np.float32), [0, 1, 2], "images must be uint8 .* got float32"),
        (GREY[0], [0, 1, 2, 3], r"images must be uint8 of shape \(N, H, W\)"),
        (GREY, [0.0, 1.0, 2.0], "labels must be a vector of integers"),
    ],
)
def test_array_errors(images: Any, labels: list[int], message: str) -> None:
    """Floats in [0, 1] or a missing dimension would train on nearly black pictures."""
    with pytest.raises(InputError, match=message):
        ArrayDataset(images, labels, torch.Tensor.float)


def test_a_sample_has_what_the_table_knows(files: list[Path]) -> None:
    """Roles, cameras and super-classes reach the metrics by way of the batch."""
    table = ImageTable(
        files[0].parent,
        Texts(path.name for path in files),
        np.array([0, 0, 1]),
        is_query=np.array([True, False, False]),
        is_gallery=np.array([False, True, True]),
        groups=np.array([4, -1, 5]),
        super_labels=np.array([2, 2, 3]),
    )
    data = ImageFileDataset(table, to_tensor)
    (batch,) = DataLoader(data, batch_size=3)
    assert batch["is_query"].dtype == batch["is_gallery"].dtype == torch.bool
    assert batch["is_query"].tolist() == [True, False, False] and batch["is_gallery"].tolist() == [False, True, True]
    assert batch["group"].tolist() == [4, -1, 5] and batch["super_label"].tolist() == [2, 2, 3]
    assert set(file_set(files, [0, 0, 1])[0]) == {"image", "label", "index"}


def test_boxes_are_cropped(files: list[Path]) -> None:
    """A box is the object; the rest of the image is not to be learned."""
    boxes = np.array([[1, 0, 4, 2], [0, 0, 0, 0], [2, 1, 5, 4]], np.int32)
    table = ImageTable(files[0].parent, Texts(path.name for path in files), np.array([0, 0, 1]), boxes=boxes)
    data = ImageFileDataset(table, to_tensor)
    assert [tuple(data[row]["image"].shape[1:]) for row in range(3)] == [(2, 3), (4, 5), (3, 3)]
    assert data.picture(0).shape == (2, 3, 3)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_get_the_data_set(method: str, files: list[Path]) -> None:
    """Python 3.14 no longer forks by default."""
    loader = DataLoader(
        ImageFileDataset(file_set(files, [0, 0, 1]).table, to_tensor), num_workers=2, multiprocessing_context=method
    )
    assert [int(batch["label"]) for batch in loader] == [0, 0, 1]
