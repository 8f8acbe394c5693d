"""Images loaded per second and memory of the workers, against torchvision's ImageFolder.

    python benchmarks/data.py                                     # some five minutes on two cores
    python benchmarks/data.py --images 6000 --workers 4 --rounds 5
    python benchmarks/data.py --images 128 --rows 20000 --rounds 1 --starts fork   # seconds, to see that it runs

First a folder of JPEGs of the size of Stanford Online Products is made (600 x 450, quality 90, a gradient with noise).
It is read again and again: by a bare DataLoader over ImageFolder, shuffled, and by our ResumableLoader with P x K
batches, from the files and from caches in raw pixels and in JPEG. Transform (the standard recipe's), batch size and
workers are the same. A round goes over all images with each in turn, less the batches that workers have ready when the
clock starts; the rates are medians. The files are warm, they were just written: this is about processors, not disks.

Then the workers' memory: a table of --rows rows that all name a few real files, beside the list of (path, label) tuples
that ImageFolder keeps. Workers visit every row once in random order, reading its path and label as a sample does, and
decode one picture in --every. Private is what only that worker holds; its share divides shared pages by those who share
them (PSS, in which workers that are forked inherit a part of the main process). Both are means over the workers, read
while these live. Each data set is measured in a process of its own. The first row is a data set of hardly any rows,
which the others are compared to. The start is the time from making the iterator to its first batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from lightning_dml.datamodules import PKBatchSampler, ResumableLoader
from lightning_dml.datamodules.images.cache import ImageCache
from lightning_dml.datamodules.images.file_dataset import ImageFileDataset
from lightning_dml.datamodules.images.transforms import image_settings, train_transform
from lightning_dml.datamodules.tables.rows import ImageTable, Texts

PER_CLASS = 8
FILES = 64  # that the rows of the memory measurement name
SETTINGS = image_settings("standard")
MIB = 2**20


def main() -> None:
    """Measures and prints two Markdown tables."""
    args = _arguments()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            print_rates(Path(folder), args)
        if args.rows:
            print_memory(Path(folder) / "few", args)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def print_rates(folder: Path, args: argparse.Namespace) -> None:
    """Prints the images per second of each loader."""
    table = make_images(folder / "images", args.images)
    size = sum(table.path(row).stat().st_size for row in range(len(table)))
    print(f"{len(table):,} JPEGs of 600 x 450, {size / len(table) / 1024:.0f} KiB each; batches of {args.classes} x")
    print(f"{args.per_class}, {args.workers} workers, medians of {args.rounds} interleaved rounds\n")
    transform = train_transform(SETTINGS)
    batch = args.classes * args.per_class
    options: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}

    def ours(cache: ImageCache | None) -> ResumableLoader:
        data = ImageFileDataset(table, transform, cache)
        sampler = PKBatchSampler(table.labels, args.classes, args.per_class, num_batches=len(table) // batch)
        return ResumableLoader(data, sampler, **options)

    caches, built = {}, {}
    for encoding in ("raw", "jpeg"):
        start = time.perf_counter()
        caches[encoding] = build_cache(table, folder / "caches", encoding)
        built[encoding] = time.perf_counter() - start
    pictures = ImageFolder(folder / "images", transform)
    loaders: dict[str, Iterable[Any]] = {
        "ImageFolder, shuffled": DataLoader(pictures, batch, shuffle=True, drop_last=True, **options),
        "ours, files": ours(None),
        **{f"ours, {encoding} cache": ours(cache) for encoding, cache in caches.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for loader in loaders.values():
        next(iter(loader))  # starts the workers, which live on
    for _ in range(args.rounds):
        for name, loader in loaders.items():
            rates[name].append(images_per_second(loader, batch, skip=2 * args.workers))
    bare = statistics.median(rates["ImageFolder, shuffled"])
    print("| loader | images/s | of ImageFolder's | slowest - fastest round | built in, s | on disk, MiB |")
    print("|---|---|---|---|---|---|")
    for name, rounds in rates.items():
        rate = statistics.median(rounds)
        cells = ["", f"{size / MIB:.0f}"]
        for encoding, cache in caches.items():
            if encoding in name:
                cells = [f"{built[encoding]:.1f}", f"{cache.nbytes / MIB:.0f}"]
        spread = f"{min(rounds):.0f} - {max(rounds):.0f}"
        print(f"| {name} | {rate:.0f} | {rate / bare:.2f} | {spread} | {' | '.join(cells)} |")
    print(flush=True)


def print_memory(folder: Path, args: argparse.Namespace) -> None:
    """Prints the memory of a worker, by the way it is started and by the data set."""
    make_images(folder, FILES)
    print(f"{args.rows:,} rows, {args.workers} workers, MiB of each worker\n")
    print("| started by | data set | private | more than without rows | share (PSS) | start, s |")
    print("|---|---|---|---|---|---|")
    for start in args.starts:
        base = 0.0
        for kind in ("none", "list", "table"):
            task = partial(worker_memory, folder, kind, start, args.rows, max(1, args.workers), args.every)
            # A process of its own: what another data set has left on the heap would count for this one.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                memory = pool.submit(task).result()
            base = memory.private if kind == "none" else base
            more = "" if kind == "none" else f"{(memory.private - base) / MIB:.0f}"
            name = {"none": f"{FILES} rows", "list": "list of tuples, as ImageFolder", "table": "ours"}[kind]
            cells = [f"{memory.private / MIB:.0f}", more, f"{memory.share / MIB:.0f}", f"{memory.start:.1f}"]
            print(f"| {start} | {name} | {' | '.join(cells)} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="of the first table; 0 leaves it out")
    parser.add_argument("--classes", type=int, default=16, help="P, classes in a batch")
    parser.add_argument("--per-class", type=int, default=4, help="K, images of each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the second table; 0 leaves it out")
    parser.add_argument("--every", type=int, default=2000, help="rows visited for one picture decoded")
    parser.add_argument("--starts", nargs="+", choices=["fork", "spawn", "forkserver"], default=["fork", "spawn"])
    return parser.parse_args()


def make_images(folder: Path, count: int) -> ImageTable:
    """Writes JPEGs as ImageFolder wants them, and lists them in its order."""
    down, across = np.linspace(0, 150, 450)[:, None, None], np.linspace(0, 80, 600)[None, :, None]
    names = [f"{row // PER_CLASS:06d}/{row:08d}.jpg" for row in range(count)]

    def draw(row: int) -> None:
        rng = np.random.default_rng(row)
        pixels = down * rng.random(3) + across * rng.random(3) + rng.normal(10, 4, (450, 600, 3))
        path = folder / names[row]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, range(count)))
    return ImageTable(folder, Texts(names), np.arange(count) // PER_CLASS)


def build_cache(table: ImageTable, folder: Path, encoding: Literal["raw", "jpeg"]) -> ImageCache:
    """Builds a cache of the pictures as the recipe's first step makes them."""
    return ImageCache.build(
        table,
        folder,
        resize=SETTINGS.resize,
        interpolation=SETTINGS.interpolation,
        encoding=encoding,
        stem=encoding,
        progress=False,
    )


def images_per_second(loader: Iterable[Any], batch: int, skip: int) -> float:
    """Rate over an epoch, after the first `skip` batches, which the workers prepare while nobody waits."""
    batches = iter(loader)
    for _ in range(skip + 1):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    if not count:
        raise SystemExit(f"--images gives no more than the {skip + 1} batches that are skipped: ask for more images")
    return count * batch / (time.perf_counter() - start)


@dataclass(frozen=True)
class Memory:
    """Memory of a worker in bytes (means over the workers), and the seconds until the first batch."""

    private: float
    share: float
    start: float


class ListOfTuples(Dataset[tuple[Any, int]]):
    """A list of (path, label) as ImageFolder keeps it, without the walk over as many files."""

    def __init__(self, samples: list[tuple[str, int]], transform: Callable[[Any], Any]) -> None:
        self.samples = samples
        self.transform = transform

    def __getitem__(self, row: int) -> tuple[Any, int]:
        """A sample as ImageFolder makes it."""
        path, label = self.samples[row]
        return self.transform(default_loader(path)), label

    def visit(self, row: int) -> int:
        """Reads the path and the label of a row, without the picture."""
        path, label = self.samples[row]
        return len(path) + label


class RowVisits(Dataset[int]):
    """Visits rows, and makes one sample in so many.

    Args:
        data: the data set whose memory is measured.
        rows: how many it has.
        every: rows for one sample.
    """

    def __init__(self, data: ListOfTuples | ImageFileDataset, rows: int, every: int) -> None:
        self.data = data
        self.rows = rows
        self.every = every

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> int:
        """Reads the row, or makes a sample of it; returns a number that depends on both."""
        if row % self.every == 0:
            return len(self.data[row])
        if isinstance(self.data, ListOfTuples):
            return self.data.visit(row)
        return len(str(self.data.table.path(row))) + int(self.data.labels[row])


def worker_memory(folder: Path, kind: str, start: str, rows: int, workers: int, every: int) -> Memory:
    """Lets workers visit every row, and reads their memory before they end."""
    torch.set_num_threads(1)
    transform = train_transform(SETTINGS)
    rows = FILES if kind == "none" else rows
    names = (f"{row % FILES // PER_CLASS:06d}/{row % FILES:08d}.jpg" for row in range(rows))
    data: ListOfTuples | ImageFileDataset
    if kind == "table":
        labels = np.arange(rows) // PER_CLASS
        data = ImageFileDataset(ImageTable(folder, Texts(names), labels), transform)
    else:
        data = ListOfTuples([(str(folder / name), row // PER_CLASS) for row, name in enumerate(names)], transform)
    batches = BatchSampler(RandomSampler(range(rows)), max(1, min(1000, rows // (4 * workers))), drop_last=False)
    loader = DataLoader(
        RowVisits(data, rows, min(every, rows // 8)),
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=True,  # they live until they were looked at
        collate_fn=sum,
    )
    begin = time.perf_counter()
    iterator: Any = iter(loader)
    next(iterator)
    first = time.perf_counter() - begin
    for _ in iterator:
        pass
    sums = [_rollup(process.pid) for process in iterator._workers]
    private = statistics.mean(worker["Private_Clean"] + worker["Private_Dirty"] for worker in sums)
    return Memory(private, statistics.mean(worker["Pss"] for worker in sums), first)


def _rollup(process: int) -> dict[str, int]:
    """The kernel's sums over all of a process's memory, in bytes (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


if __name__ == "__main__":
    main()
