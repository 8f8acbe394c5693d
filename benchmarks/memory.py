"""The cost of a memory: step time, enqueueing, memory added and bytes sent, beside pytorch-metric-learning's.

    python benchmarks/memory.py                                   # some minutes
    python benchmarks/memory.py --model test_resnet --sizes 0 1024 --rounds 2

Four tables. 1: one training step (forward, contrastive loss in the batch, backward, AdamW) with no bank, with an online
bank of each size (enqueue and the loss against the bank), with the peer's CrossBatchMemory in its place, and once with
the momentum encoder, whose further forward pass is the price of momentum keys and not of the bank. Rounds are
interleaved, and ratios are of medians and of the quietest rounds. Images are small so that a step takes seconds; the
cost of the bank does not depend on them, so at 224 x 224 its share of a step is smaller. 2: memory. 3: enqueueing
alone. 4: bytes that a rank receives in a step, counted in real processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss as PeerContrastiveLoss
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor
from torch.nn import functional as F

from lightning_dml import Embedder
from lightning_dml.losses import ContrastiveLoss
from lightning_dml.memory import MemoryBank, MomentumEncoder

if TYPE_CHECKING:
    from benchmarks import _traffic
    from benchmarks._measure import added_peak, seconds
else:  # run as a script, this folder is on the path and the one above is not
    import _traffic
    from _measure import added_peak, seconds

CLASSES = 11318  # of SOP's training set
MARGIN = 0.5
PEER_BYTES = 48  # that the peer's loss takes for a pair, from its source
MIB = 2**20

LossTerm = Callable[[Tensor], Tensor]
"""Maps the embeddings of the batch to the loss against a memory, which it also feeds."""


def main() -> None:
    """Measures and prints the four tables."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    batch = Batch(args)
    terms, stored = _terms(batch, args)
    print(_step_table(batch, terms, args), end="\n\n", flush=True)
    print(_memory_table(batch, terms, stored), end="\n\n", flush=True)
    del terms
    sizes = [size for size in args.sizes if size >= args.batch]
    if sizes:
        print(_enqueue_table(sizes, args), end="\n\n", flush=True)
    if args.ranks > 1:
        print(_traffic_table(args), end="\n\n")
    print(f"{time.perf_counter() - start:.0f} s in all")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=96, help="side of the images")
    parser.add_argument("--sizes", nargs="+", type=int, default=[0, 8192, 65536, 1_000_000])
    parser.add_argument("--momentum-size", type=int, default=65536, help="bank of the momentum encoder's step; 0: none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=200, help="of what takes microseconds or milliseconds")
    parser.add_argument("--peer-gib", type=float, default=4.0, help="largest case of the peer that is run")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the last table; 1 leaves it out")
    parser.add_argument("--traffic-sizes", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Batch:
    """One batch of P x 4 images, the embedder, and a step on them.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.images = torch.randn(args.batch, 3, args.image, args.image)
        self.labels = torch.randperm(CLASSES)[: -(-args.batch // 4)].repeat_interleave(4)[: args.batch]
        self.indices = torch.arange(args.batch)
        self.embedder = Embedder(args.model, dim=args.dim)
        self.optimizer = torch.optim.AdamW(self.embedder.parameters(), lr=1e-5)
        self.loss = ContrastiveLoss(MARGIN)
        self.leaf = F.normalize(torch.randn(args.batch, args.dim), dim=1).requires_grad_()

    def step(self, term: LossTerm | None) -> None:
        """Trains on the batch, with a term against a memory or without."""
        self.optimizer.zero_grad()
        embeddings = self.embedder(self.images)
        total = self.loss(embeddings, self.labels, indices=self.indices)
        if term is not None:
            total = total + term(embeddings)
        total.backward()
        self.optimizer.step()

    def term_alone(self, term: LossTerm) -> None:
        """The term with its gradient for the embeddings, without the embedder."""
        self.leaf.grad = None
        term(self.leaf).backward()  # type: ignore[no-untyped-call]


def _terms(batch: Batch, args: argparse.Namespace) -> tuple[dict[str, LossTerm | None], dict[str, int]]:
    """The steps to compare by name, "no bank" first, and the bytes that each one's memory holds."""
    terms: dict[str, LossTerm | None] = {"no bank": None}
    stored = {"no bank": 0}
    for size in args.sizes:
        if size:
            name = f"bank of {size:,}"
            terms[name] = _online(batch, _full_bank(size, args.dim))
            stored[name] = size * (4 * args.dim + 24)
    for size in args.sizes:
        if args.batch <= size <= args.peer_gib * 2**30 / PEER_BYTES / args.batch:
            name = f"peer, {size:,}"
            terms[name] = _peer(batch, size, args.dim)
            stored[name] = size * (4 * args.dim + 8)
    if args.momentum_size:
        name = f"momentum keys, bank of {args.momentum_size:,}"
        terms[name] = _momentum(batch, _full_bank(args.momentum_size, args.dim))
        stored[name] = args.momentum_size * (4 * args.dim + 24)
    return terms, stored


def _full_bank(size: int, dim: int, policy: str = "queue", average: float = 0.0) -> MemoryBank:
    bank = MemoryBank(size, dim, policy=policy, average=average)
    indices = torch.arange(size)
    bank.enqueue(F.normalize(torch.randn(size, dim), dim=1), indices % CLASSES, indices)
    return bank


def _online(batch: Batch, bank: MemoryBank) -> LossTerm:
    def term(embeddings: Tensor) -> Tensor:
        bank.enqueue(embeddings.detach(), batch.labels, batch.indices)
        return _against(batch, bank, embeddings)

    return term


def _momentum(batch: Batch, bank: MemoryBank) -> LossTerm:
    encoder = MomentumEncoder(batch.embedder)

    def term(embeddings: Tensor) -> Tensor:
        encoder.update(batch.embedder)
        bank.enqueue(encoder(batch.images), batch.labels, batch.indices)
        return _against(batch, bank, embeddings)

    return term


def _against(batch: Batch, bank: MemoryBank, embeddings: Tensor) -> Tensor:
    value: Tensor = batch.loss(
        embeddings, batch.labels, bank.embeddings, bank.labels, indices=batch.indices, ref_indices=bank.indices
    )
    return value


def _peer(batch: Batch, size: int, dim: int) -> LossTerm:
    memory = _full_peer(size, dim)

    def term(embeddings: Tensor) -> Tensor:
        value: Tensor = memory(embeddings, batch.labels)
        return value

    return term


def _full_peer(size: int, dim: int) -> CrossBatchMemory:
    memory = CrossBatchMemory(PeerContrastiveLoss(1.0, MARGIN, distance=CosineSimilarity()), dim, memory_size=size)
    memory.add_to_memory(F.normalize(torch.randn(size, dim), dim=1), torch.arange(size) % CLASSES, size)
    return memory


def _step_table(batch: Batch, terms: dict[str, LossTerm | None], args: argparse.Namespace) -> str:
    times: dict[str, list[float]] = {name: [] for name in terms}
    for number in range(args.rounds + 1):
        for name, term in terms.items():
            once = seconds(partial(batch.step, term))
            if number:  # the first round is to warm up
                times[name].append(once)
    lines = [
        f"One training step of {args.model} (dim {args.dim}) on {args.batch} images of {args.image} x {args.image}, "
        f"{args.threads} threads, {args.rounds} interleaved rounds:",
        "",
        "| step | median, s | / no bank, medians | / no bank, quietest | its memory's part, ms | 1 + part / no bank |",
        "|---|---|---|---|---|---|",
    ]
    base = times["no bank"]
    for name, rounds in times.items():
        ratios = statistics.median(rounds) / statistics.median(base), min(rounds) / min(base)
        cells = [f"{statistics.median(rounds):.3f}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}", "-", "-"]
        if (term := terms[name]) is not None:
            alone = _alone(batch, term, args)
            cells[3:] = [f"{1e3 * alone:.1f}", f"{1 + alone / statistics.median(base):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _alone(batch: Batch, term: LossTerm, args: argparse.Namespace) -> float:
    """Seconds of the memory's part; a step of seconds varies by more than that, so its ratio is the sharper one."""
    times = [seconds(partial(batch.term_alone, term))]
    while len(times) < args.repeats and sum(times) < 3:
        times.append(seconds(partial(batch.term_alone, term)))
    return statistics.median(times)


def _memory_table(batch: Batch, terms: dict[str, LossTerm | None], stored: dict[str, int]) -> str:
    lines = [
        "Memory: what is kept, and the peak that enqueueing and the loss against it add, forward and backward:",
        "",
        "| memory | kept, MiB | adds at most, MiB |",
        "|---|---|---|",
    ]
    for name, term in terms.items():
        if term is not None and not name.startswith("momentum"):
            peak = added_peak(partial(batch.term_alone, term))
            lines.append(f"| {name} | {stored[name] / MIB:.0f} | {peak / MIB:.1f} |")
    return "\n".join(lines)


def _enqueue_table(sizes: list[int], args: argparse.Namespace) -> str:
    lines = [
        f"Enqueueing {args.batch} rows of {args.dim} columns, microseconds, medians of {args.repeats}, interleaved:",
        "",
        "| bank | queue | samples | samples, averaged | peer | bare copy of the rows | queue / peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        ways = _ways_in(size, args.batch, args.dim)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for place in torch.randint(size - args.batch + 1, (args.repeats,)).tolist():
            indices = torch.arange(place, place + args.batch)
            for name, way in ways.items():
                times[name].append(seconds(partial(way, indices)))
        medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        cells = [f"{size:,}", *(f"{value:.0f}" for value in medians.values())]
        lines.append(f"| {' | '.join(cells)} | {medians['queue'] / medians['peer']:.2f} |")
    return "\n".join(lines)


def _ways_in(size: int, batch: int, dim: int) -> dict[str, Callable[[Tensor], object]]:
    """Makes functions that bring a batch of samples into full memories, given the samples' indices."""
    rows, labels = F.normalize(torch.randn(batch, dim), dim=1), torch.arange(batch)
    queue, samples = _full_bank(size, dim), _full_bank(size, dim, "samples")
    averaged = _full_bank(size, dim, "samples", average=0.5)
    peer = _full_peer(size, dim)
    plain = torch.zeros(size, dim)

    def copy(indices: Tensor) -> None:
        plain[indices[0] : indices[-1] + 1] = rows

    return {
        "queue": lambda indices: queue.enqueue(rows, labels, indices),
        "samples": lambda indices: samples.enqueue(rows, labels, indices),
        "samples, averaged": lambda indices: averaged.enqueue(rows, labels, indices),
        "peer": lambda indices: peer.add_to_memory(rows, labels, batch),
        "copy": copy,
    }


def _traffic_table(args: argparse.Namespace) -> str:
    lines = [
        f"Bytes that a rank receives in a step from {args.ranks - 1} other, {args.batch} rows of {args.dim} columns on "
        "each, without the model's gradients; the peer in its DistributedLossWrapper, where each rank computes the "
        "loss of all ranks' rows:",
        "",
        "| mode | loss | bank | rows in | loss | collectives | in all | by the formula |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _traffic.measure(args.ranks, args.batch, args.dim, args.traffic_sizes):
        expected = _traffic.formula(row, args.ranks, args.batch, args.dim)
        cells = [row.mode, row.loss, *(f"{value:,}" for value in row[2:])]
        lines.append(f"| {' | '.join(cells)} | {row.enqueue + row.loss_bytes:,} | {expected:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
