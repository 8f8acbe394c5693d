"""Retrieval metrics: time and memory against a bare faiss search and against pytorch-metric-learning.

    python benchmarks/retrieval.py                                     # about five minutes
    python benchmarks/retrieval.py --shapes sop --rounds 9 --no-peer --search-only
    python benchmarks/retrieval.py --shapes large --rounds 0 --search-only # some ten minutes, see below
    python benchmarks/retrieval.py --shapes tiny                       # seconds, to see that it runs

Rows are unit vectors around random class centres, noisy enough that a row's own class is about as near as the nearest
of the others. In one process and in interleaved rounds: RetrievalMetrics with its default settings, fed in batches with
indices, then computed (every metric that it has); filling and searching a bare IndexFlatIP; and the peer's
AccuracyCalculator (precision@1, MAP@R and R-precision, k="max_bin_count", faiss on the CPU). Times are medians; memory
is the highest rise of the resident size during a call, in which ours counts the copy of the rows that it collects.

The bare search asks for as many neighbours as ours does: the k that ours hands to faiss is recorded during the memory
run (the largest K of Recall@K or R of any query, one more to see ties, and one more where a query is in the gallery
itself).

Two smaller tables follow, of the first shape: the same evaluation with every metric that looks at the nearest
neighbours, with those of the whole ranking, and of an embedding that has collapsed to a point (all neighbours tied);
and compute() by one process and by --ranks of them, with one thread each.

The peer is left out where its tensors would not fit into --peer-gib; it compares every class with every row. Where it
runs, its precision@1 and MAP@R must be ours to 1e-4, or the run fails. Each function runs twice to take its memory.
With `--rounds 0` it runs once in all, and its time is that of this one run: for what takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import faiss
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor
from torch.nn import functional as F

from lightning_dml.retrieval import RetrievalMetrics

if TYPE_CHECKING:
    from benchmarks import _evaluation_ranks
    from benchmarks._measure import added_peak, seconds
else:  # run as a script, this folder is on the path and the one above is not
    import _evaluation_ranks
    from _measure import added_peak, seconds

PEER_SECONDS = 20  # after which the peer sits out the further rounds
PEER_NAMES = {"precision@1": "precision_at_1", "map@r": "mean_average_precision_at_r"}
LIST_METRICS = ("recall", "precision", "ndcg", "map@r", "r_precision")
TOLERANCE = 1e-4
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """The numbers of rows and classes; without a gallery, the queries are searched among themselves."""

    queries: int
    gallery: int | None
    dim: int
    classes: int

    def __str__(self) -> str:
        """The shape as the table names it."""
        against = "" if self.gallery is None else f" against {self.gallery:,}"
        return f"{self.queries:,}{against} x {self.dim}, {self.classes:,} classes"


SHAPES = {
    "sop": Shape(60_502, None, 128, 11_316),
    "inshop": Shape(14_218, 12_612, 128, 3_985),
    "dim512": Shape(20_000, None, 512, 4_000),
    "large": Shape(500_000, None, 64, 25_000),
    "tiny": Shape(1_200, None, 32, 200),
}


class Data:
    """Random rows of a shape, queries first.

    Args:
        shape: what to make.
    """

    def __init__(self, shape: Shape) -> None:
        queries = shape.queries
        self.labels = torch.arange(queries) % shape.classes
        if shape.gallery is not None:
            self.labels = torch.cat([self.labels, torch.arange(shape.gallery) % shape.classes])
        # The nearest of N random rows has a cosine of about 4 / sqrt(D); this noise gives two of a class the same.
        noise = (shape.dim**0.5 / 4 - 1) ** 0.5 / shape.dim**0.5
        centres = F.normalize(torch.randn(shape.classes, shape.dim), dim=1)
        self.rows = F.normalize(centres[self.labels].add_(torch.randn(len(self.labels), shape.dim), alpha=noise), dim=1)
        self.indices = torch.arange(len(self.labels))
        self.is_query = self.indices < queries
        self.is_gallery = ~self.is_query if shape.gallery is not None else self.is_query
        first = 0 if shape.gallery is None else queries
        self.queries, self.query_labels = self.rows[:queries], self.labels[:queries]
        self.gallery, self.gallery_labels = self.rows[first:], self.labels[first:]


def main() -> None:
    """Measures the shapes and prints a Markdown table and how far the peer's values are."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    print(f"{args.threads} threads, batches of {args.batch}, medians of {args.rounds} interleaved rounds\n")
    print(
        "| shape | ours, s | bare search, s | ours / bare | peer, s | peer / ours | ours adds | bare adds | peer adds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    notes, agree = [], True
    for name in args.shapes:
        row, note, close = _measure(SHAPES[name], args)
        print(row, flush=True)
        notes.append(f"{name}: {note}")
        agree = agree and close
    print("", *notes, "", sep="\n")
    if not args.search_only:
        _print_options(SHAPES[args.shapes[0]], args)
        _print_ranks(SHAPES[args.shapes[0]], args)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if not agree:
        sys.exit(f"ours and the peer differ by more than {TOLERANCE}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["sop", "inshop", "dim512"])
    parser.add_argument("--batch", type=int, default=256, help="rows of an update")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-gib", type=float, default=8.0, help="largest case of the peer that is run")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the last comparison")
    parser.add_argument("--search-only", action="store_true", help="leave out what follows the first table")
    return parser.parse_args()


def _measure(shape: Shape, args: argparse.Namespace) -> tuple[str, str, bool]:
    """The table's row, what is to be said below it, and whether the peer's values are close enough to ours."""
    data = Data(shape)
    values: dict[str, dict[str, float]] = {}
    calls: dict[str, Callable[[], object]] = {"ours": lambda: values.update(ours=_ours(data, args.batch))}
    rehearse = args.rounds > 0
    alone: dict[str, float] = {}  # seconds of the memory runs
    peaks: dict[str, int] = {}

    def take_memory(who: str) -> None:
        alone[who] = seconds(lambda: peaks.update({who: added_peak(calls[who], rehearse)}))

    with _recorded_search() as asked:
        take_memory("ours")
    if not asked:
        raise RuntimeError("RetrievalMetrics did not call faiss.knn; the bare search needs to know its k")
    k = max(asked)
    calls["bare"] = partial(_bare, data, k)
    fits = _peer_bytes(data) <= args.peer_gib * 2**30
    if fits and not args.no_peer:
        calls["peer"] = lambda: values.update(peer=_peer(data))
    for who in calls:
        if who != "ours":
            take_memory(who)

    times: dict[str, list[float]] = {who: [] if rehearse else [alone[who]] for who in calls}
    for _ in range(args.rounds):
        for who, call in calls.items():
            if who != "peer" or sum(times[who]) < PEER_SECONDS:
                times[who].append(seconds(call))
    medians = {who: statistics.median(rounds) for who, rounds in times.items()}

    peer_cells = ["-", "-"] if args.no_peer else ["not run", "-"]
    peer_adds = "-" if args.no_peer else f"over {args.peer_gib:g} GiB"
    if "peer" in calls:
        peer_cells = [f"{medians['peer']:.2f}", f"{medians['peer'] / medians['ours']:.2f}"]
        peer_adds = f"{peaks['peer'] / MIB:.0f} MiB"
    cells = [
        str(shape),
        f"{medians['ours']:.2f}",
        f"{medians['bare']:.2f}",
        f"{medians['ours'] / medians['bare']:.3f}",
        *peer_cells,
        *(f"{peaks[who] / MIB:.0f} MiB" for who in ("ours", "bare")),
        peer_adds,
    ]
    note, close = _comparison(values)
    blocks = len(asked) // (1 + rehearse)
    return f"| {' | '.join(cells)} |", f"k = {k} in {blocks} block{'s' * (blocks > 1)}; {note}", close


def _print_options(shape: Shape, args: argparse.Namespace) -> None:
    """The cost of other metrics, and of a collapsed embedding, each against the default ones in interleaved rounds."""
    data, collapsed = Data(shape), Data(shape)
    collapsed.rows = data.rows[:1].expand_as(data.rows)
    calls = {
        "the default metrics": partial(_ours, data, args.batch),
        "all at K, MAP@R, R-precision": partial(_ours, data, args.batch, include=LIST_METRICS),
        "MAP and MRR": partial(_ours, data, args.batch, include=("map", "mrr")),
        "the default ones, collapsed": partial(_ours, collapsed, args.batch),
    }
    times: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(args.rounds):
        for what, call in calls.items():
            times[what].append(seconds(call))
    default = statistics.median(times["the default metrics"])
    print(f"| {shape} | s | of the default |", "|---|---|---|", sep="\n")
    for what, rounds in times.items():
        print(f"| {what} | {statistics.median(rounds):.2f} | {statistics.median(rounds) / default:.2f} |")
    values = calls["the default ones, collapsed"]()
    print("\ncollapsed:", ", ".join(f"{name} {values[name]:.6f}" for name in PEER_NAMES), "\n")


def _print_ranks(shape: Shape, args: argparse.Namespace) -> None:
    """compute() by one process and by several, and whether their values are the same."""
    data = Data(shape)
    columns = (data.rows, data.labels, data.indices, data.is_query, data.is_gallery)
    alone, expected = _evaluation_ranks.compute_seconds(1, columns, args.rounds)
    together, values = _evaluation_ranks.compute_seconds(args.ranks, columns, args.rounds)
    one, several = statistics.median(alone), statistics.median(together)
    print(
        f"{shape}, one thread each: 1 process {one:.2f} s, {args.ranks} processes {several:.2f} s, "
        f"{one / several:.2f} times as fast; values {'equal' if values == expected else 'DIFFER'}"
    )


def _ours(data: Data, batch: int, **options: Any) -> dict[str, float]:
    metrics = RetrievalMetrics(**options)
    columns = (data.rows, data.labels, data.indices, data.is_query, data.is_gallery)
    for part in zip(*(torch.split(column, batch) for column in columns), strict=True):
        metrics.update(*part)
    return metrics.compute()


def _bare(data: Data, k: int) -> tuple[Any, Any]:
    index = faiss.IndexFlatIP(data.gallery.shape[1])
    index.add(data.gallery.numpy())
    distances, positions = index.search(data.queries.numpy(), k)
    return distances, positions


def _peer(data: Data) -> dict[str, float]:
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    among_themselves = bool(data.is_gallery[0])
    gallery: tuple[Tensor, ...] = () if among_themselves else (data.gallery, data.gallery_labels)
    values: dict[str, float] = calculator.get_accuracy(data.queries, data.query_labels, *gallery)
    return values


def _peer_bytes(data: Data) -> int:
    """The bytes that the peer takes, from its source: classes by gallery rows, as int64, and tables of neighbours."""
    counts = torch.bincount(data.gallery_labels)
    return 10 * len(counts) * len(data.gallery) + 48 * int(counts.max()) * len(data.queries)


@contextmanager
def _recorded_search() -> Iterator[list[int]]:
    """Notes the k of every exhaustive search."""
    asked: list[int] = []
    search = faiss.knn

    def recorded(queries: Any, gallery: Any, k: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(k)
        return search(queries, gallery, k, *args, **kwargs)

    with mock.patch.object(faiss, "knn", recorded):
        yield asked


def _comparison(values: dict[str, dict[str, float]]) -> tuple[str, bool]:
    """Our values in words, the peer's difference from them, and whether it is within the tolerance."""
    ours = values["ours"]
    if "peer" not in values:
        return ", ".join(f"{name} {ours[name]:.4f}" for name in PEER_NAMES), True
    away = {name: abs(values["peer"][theirs] - ours[name]) for name, theirs in PEER_NAMES.items()}
    words = ", ".join(f"{name} {ours[name]:.4f} (peer differs by {away[name]:.1e})" for name in PEER_NAMES)
    return words, all(difference <= TOLERANCE for difference in away.values())


if __name__ == "__main__":
    main()
