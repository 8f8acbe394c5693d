"""Small copies of the official data sets: the same files in the same formats, with few classes and tiny images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.datamodules.tables.splits import Tables

Counts = int | Sequence[int]  # images of each class

KINDS = (
    "bicycle",
    "cabinet",
    "chair",
    "coffee_maker",
    "fan",
    "kettle",
    "lamp",
    "mug",
    "sofa",
    "stapler",
    "table",
    "toaster",
)


def make_cub(
    root: Path,
    classes: Sequence[int] = (1, 2, 101, 102),
    images: Counts = 3,
    pictures: bool = True,
    newline: str = "\n",
) -> Path:
    """The folder `CUB_200_2011` in `root`; every picture has a box of 6 x 7 at (1, 1)."""
    folder = root / "CUB_200_2011"
    names = {number: f"{number:03}.Bird_{number}" for number in classes}
    paths, numbers = [], []
    for number, place in _images(classes, images):
        numbers.append(number)
        paths.append(f"{names[number]}/Bird_{place + 1:04}_{len(numbers)}.jpg")
    ids = range(1, len(paths) + 1)
    lines = {
        "images.txt": [f"{number} {path}" for number, path in zip(ids, paths, strict=True)],
        "image_class_labels.txt": [f"{image} {number}" for image, number in zip(ids, numbers, strict=True)],
        "bounding_boxes.txt": [f"{image} 1.0 1.0 6.0 7.0" for image in ids],
        "classes.txt": [f"{number} {name}" for number, name in names.items()],
        # For classification; retrieval must not look at it.
        "train_test_split.txt": [f"{image} {image % 2}" for image in ids],
    }
    for name, content in lines.items():
        _write(folder / name, content, newline)
    return _paint(folder, [f"images/{path}" for path in paths], pictures)


def make_cars(root: Path, classes: Sequence[int] = (1, 98, 99, 196), images: Counts = 3, pictures: bool = True) -> Path:
    """The folder `cars196` in `root`, in the first layout; boxes are 3, 2, 8, 8 in pixels counted from 1."""
    folder = root / "cars196"
    rows = [
        {"relative_im_path": f"car_ims/{place:06}.jpg", **_car_box(number), "test": np.uint8(place % 2)}
        for place, (number, _) in enumerate(_images(classes, images), start=1)
    ]
    _write_mat(folder / "cars_annos.mat", rows, range(1, 197))
    return _paint(folder, [row["relative_im_path"] for row in rows], pictures)


def make_cars_devkit(
    root: Path,
    classes: Sequence[int] = (1, 98, 99, 196),
    images: Counts = 4,
    labels: str = "cars_test_annos_withlabels.mat",
    pictures: bool = True,
) -> Path:
    """The folder `stanford_cars` in `root`, in the later layout; the images alternate between its two parts."""
    folder = root / "stanford_cars"
    pairs = list(_images(classes, images))
    paths = []
    for part, file in enumerate(("devkit/cars_train_annos.mat", labels)):
        names = [f"{place + 1:05}.jpg" for place in range(len(pairs[part::2]))]
        rows = [{**_car_box(number), "fname": name} for name, (number, _) in zip(names, pairs[part::2], strict=True)]
        _write_mat(folder / file, rows)
        paths += [f"{('cars_train', 'cars_test')[part]}/{name}" for name in names]
    _write_mat(folder / "devkit/cars_meta.mat", None, range(1, 197))
    return _paint(folder, paths, pictures)


def make_sop(
    root: Path,
    train: Sequence[int] = (1, 2, 3),
    test: Sequence[int] = (11_319, 11_320),
    images: Counts = 2,
    test_images: Counts | None = None,
    pictures: bool = True,
    newline: str = "\n",
) -> Path:
    """The folder `Stanford_Online_Products` in `root`; product n is of the kind n modulo 12, plus 1."""
    folder = root / "Stanford_Online_Products"
    paths = []
    for name, classes, counts in (
        ("train", train, images),
        ("test", test, images if test_images is None else test_images),
    ):
        lines = ["image_id class_id super_class_id path"]
        for number, place in _images(classes, counts):
            paths.append(f"{KINDS[number % 12]}_final/{110_000_000_000 + number}_{place}.JPG")
            lines.append(f"{len(paths)} {number} {number % 12 + 1} {paths[-1]}")
        _write(folder / f"Ebay_{name}.txt", lines, newline)
    return _paint(folder, paths, pictures)


def make_in_shop(
    root: Path,
    train: Sequence[int] = (2, 5),
    test: Sequence[int] = (1, 7_982),
    images: Counts = 3,
    queries: Counts = 1,
    gallery: Counts = 2,
    partition: str = "list_eval_partition.txt",
    pictures_in: str = ".",
    pictures: bool = True,
) -> Path:
    """The folder `In-shop Clothes Retrieval Benchmark` in `root`, its columns padded as they are published."""
    folder = root / "In-shop Clothes Retrieval Benchmark"
    paths, lines = [], []
    for status, classes, counts in (("train", train, images), ("query", test, queries), ("gallery", test, gallery)):
        for number, place in _images(classes, counts):
            item = f"id_{number:08}"
            path = f"img/WOMEN/Dresses/{item}/{place:02}_{status[0]}_front.jpg"
            paths.append(f"{pictures_in}/{path}")
            lines.append(f"{path:<70} {item} {status:<11}")
    _write(folder / partition, [str(len(paths)), "image_name item_id evaluation_status", *lines])
    return _paint(folder, paths, pictures)


def make_vehicle_id(
    root: Path,
    train: Sequence[int] = (23, 7),
    tests: Mapping[int, Sequence[int]] | None = None,
    images: Counts = 3,
    test_images: Mapping[int, Counts] | None = None,
    pictures: bool = True,
) -> Path:
    """The folder `VehicleID_V1.0` in `root`; an image is called by its vehicle and place, so test lists share some."""
    folder = root / "VehicleID_V1.0"
    tests = {800: (40, 31), 1_600: (31, 50, 40), 2_400: (60, 31, 50, 70)} if tests is None else tests
    paths: dict[str, None] = {}
    for name, classes, counts in (
        ("train_list", train, images),
        *((f"test_list_{size}", chosen, (test_images or {}).get(size, images)) for size, chosen in tests.items()),
    ):
        names = [(f"{number * 100 + place:07}", number) for number, place in _images(classes, counts)]
        _write(folder / "train_test_split" / f"{name}.txt", [f"{image} {number}" for image, number in names])
        paths.update((f"image/{image}.jpg", None) for image, _ in names)
    return _paint(folder, list(paths), pictures)


def make_inaturalist(
    root: Path,
    train: Sequence[str] = ("Fungi/5", "Aves/2761", "Aves/40"),
    test: Sequence[str] = ("Plantae/6000", "Aves/3"),
    images: Counts = 2,
    test_images: Counts | None = None,
    lists: str = "Inat_dataset_splits",
    pictures: bool = True,
    newline: str = "\n",
) -> Path:
    """The folder `Inaturalist` in `root`, with the lists of the Smooth-AP authors."""
    folder = root / "Inaturalist"
    paths = []
    for name, classes, counts in (
        ("train", train, images),
        ("test", test, images if test_images is None else test_images),
    ):
        lines = [f"train_val2018/{species}/{place:032x}.jpg" for species, place in _images(classes, counts)]
        _write(folder / lists / f"Inaturalist_{name}_set1.txt", lines, newline)
        paths += lines
    return _paint(folder, paths, pictures)


def spread(images: int, classes: int) -> list[int]:
    """Numbers of images of so many classes that add up to a total."""
    return [images // classes + (number < images % classes) for number in range(classes)]


def edit(file: Path, old: str, new: str) -> None:
    """Exchanges a text that must be in the file, once."""
    content = file.read_bytes().decode()
    assert old in content
    file.write_bytes(content.replace(old, new, 1).encode())


def rows_of(table: ImageTable, names: Sequence[str]) -> list[tuple[str, str]]:
    """The full path and the class name of every row, in order."""
    return [(table.path(row).as_posix(), names[label]) for row, label in enumerate(table.labels)]


def tables_by_name(tables: Tables | None) -> dict[str, ImageTable]:
    """Evaluation sets by name; a single one is called `val`."""
    assert tables is not None
    return dict(tables) if isinstance(tables, Mapping) else {"val": tables}


def _images(classes: Sequence[Any], counts: Counts) -> Iterator[tuple[Any, int]]:
    """Pairs of a class and the place of one of its images."""
    numbers = [counts] * len(classes) if isinstance(counts, int) else counts
    return ((name, place) for name, number in zip(classes, numbers, strict=True) for place in range(number))


def _write(file: Path, lines: Sequence[str], newline: str = "\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((newline.join(lines) + newline).encode())


def _paint(folder: Path, paths: Sequence[str], pictures: bool) -> Path:
    """Writes JPEGs of 8 x 9 to 40 x 31 pixels, no two of one colour."""
    for number, path in enumerate(paths if pictures else ()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        size = (8 + number * 7 % 33, 9 + number * 5 % 23)
        Image.new("RGB", size, (number * 9 % 256, number * 5 % 256, 120)).save(folder / path)
    return folder


def _car_box(number: int) -> dict[str, Any]:
    corners = zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), (3, 2, 8, 8), strict=True)
    return {**{name: np.uint16(corner) for name, corner in corners}, "class": np.uint8(number)}


def _write_mat(file: Path, rows: Sequence[Mapping[str, Any]] | None, named: Sequence[int] = ()) -> None:
    """Annotations are a 1 x N struct array and names a 1 x C cell array, as MATLAB wrote them."""
    from scipy.io import savemat

    variables: dict[str, Any] = {}
    if rows is not None:
        table = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
        for place, row in enumerate(rows):
            table[0, place] = tuple(row.values())
        variables["annotations"] = table
    if named:
        variables["class_names"] = np.array([[f"Make Model {number}" for number in named]], object)
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(str(file), variables)
