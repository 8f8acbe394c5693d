"""Pair losses against a memory: time against the two bare matrix products and against pytorch-metric-learning.

    python benchmarks/losses.py                                        # the whole grid, some minutes
    python benchmarks/losses.py --memory 65536 --batch 64 --classes 11318

For each loss, forward and backward of B anchors against M references of D = 128 columns, in one process: the median
time of ours over that of `A @ R.T` and `S @ R` (the least that such a loss computes), the median time of the same loss
of pytorch-metric-learning over ours, and the peak of resident memory that each adds. Rounds are interleaved. A peer's
case whose tensors would not fit into --peer-gib is left out and marked so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytorch_metric_learning.losses as pml
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.losses import (
    CircleLoss,
    ContrastiveLoss,
    DirectWeightingLoss,
    FastAPLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    TripletLoss,
    curves,
)

if TYPE_CHECKING:
    from benchmarks._measure import added_peak, seconds
else:  # run as a script, this folder is on the path and the one above is not
    from _measure import added_peak, seconds

DIM = 128


@dataclass(frozen=True)
class Contender:
    """A loss of ours, the same of the peer, and how many bytes the peer's largest tensors take.

    `peer_bytes` maps (positive pairs, negative pairs, positives per anchor) to bytes, estimated from its source.
    """

    kind: str
    ours: nn.Module
    peer: nn.Module | None
    peer_bytes: Callable[[int, int, int], int]


def _pairs(positive: int, negative: int, _: int) -> int:
    return 48 * (positive + negative)


CONTENDERS = {
    "contrastive": Contender(
        "separable", ContrastiveLoss(0.5), pml.ContrastiveLoss(1.0, 0.5, distance=CosineSimilarity()), _pairs
    ),
    "direct, exponential": Contender(
        "separable", DirectWeightingLoss(curves.Constant(), curves.Exponential()), None, _pairs
    ),
    "multi-similarity": Contender("softmax", MultiSimilarityLoss(), pml.MultiSimilarityLoss(2.0, 50.0, 0.5), _pairs),
    "circle": Contender("softmax", CircleLoss(0.4, 80.0), pml.CircleLoss(0.4, 80.0), _pairs),
    "NT-Xent": Contender("softmax", NTXentLoss(0.07), pml.NTXentLoss(0.07), lambda p, n, _: 16 * p * n),
    "triplet": Contender(
        "sort",
        TripletLoss(0.1),
        pml.TripletMarginLoss(0.1, distance=CosineSimilarity()),
        lambda p, n, per: 50 * per * n,
    ),
    "FastAP": Contender("sort", FastAPLoss(10), None, _pairs),  # the peer's takes no references
}


def main() -> None:
    """Measures the grid and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--memory", nargs="+", type=int, default=[4096, 16384, 65536, 262144])
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 11318])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-gib", type=float, default=6.0, help="largest case of the peer that is run")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.threads} threads, {DIM} columns, medians of up to {args.rounds} rounds\n")
    print(
        "| loss | kind | batch | memory | classes | ours, ms | / two products | peer / ours | ours adds | peer adds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for batch, memory, classes in itertools.product(args.batch, args.memory, args.classes):
        data = _data(batch, memory, classes)
        for name in args.losses:
            print(_row(name, CONTENDERS[name], data, classes, args), flush=True)


def _data(batch: int, memory: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors of a P x 4 batch and references, unit rows around 11,318 or 100 class centres."""
    centres = F.normalize(torch.randn(classes, DIM), dim=1)
    labels = torch.randperm(classes)[: batch // 4].repeat_interleave(4) if classes >= batch // 4 else None
    labels = torch.arange(batch) % classes if labels is None else labels
    ref_labels = torch.arange(memory) % classes
    anchors, references = (
        F.normalize(centres[c] + 0.1 * torch.randn(len(c), DIM), dim=1) for c in (labels, ref_labels)
    )
    return anchors, labels, references, ref_labels


def _row(
    name: str,
    contender: Contender,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    classes: int,
    args: argparse.Namespace,
) -> str:
    anchors, labels, references, ref_labels = data
    positive = int(torch.bincount(ref_labels, minlength=classes)[labels].sum())
    negative = len(anchors) * len(references) - positive
    needed = contender.peer_bytes(positive, negative, positive // len(anchors))
    peer = None if args.no_peer or needed > args.peer_gib * 2**30 else contender.peer

    def step(loss: nn.Module) -> None:
        leaf = anchors.clone().requires_grad_()
        loss(leaf, labels, ref_emb=references, ref_labels=ref_labels).backward()

    def products() -> None:
        torch.mm(anchors @ references.T, references)

    times: dict[str, list[float]] = {"ours": [], "products": [], "peer": []}
    peaks = {"ours": added_peak(lambda: step(contender.ours))}
    if peer is not None:
        peaks["peer"] = added_peak(lambda: step(peer))
    for _ in range(args.rounds):
        times["products"].append(seconds(products))
        times["ours"].append(seconds(lambda: step(contender.ours)))
        if peer is not None and sum(times["peer"]) < 20:
            times["peer"].append(seconds(lambda: step(peer)))
    medians = {who: statistics.median(values) for who, values in times.items() if values}
    if peer is not None:
        against, adds = f"{medians['peer'] / medians['ours']:.1f}", f"{peaks['peer'] / 2**20:.0f} MiB"
    elif contender.peer is None or args.no_peer:
        against = adds = "-"
    else:
        against, adds = "not run", f"over {args.peer_gib:.0f} GiB"
    cells = [
        name,
        contender.kind,
        len(anchors),
        f"{len(references):,}",
        f"{classes:,}",
        f"{1e3 * medians['ours']:.1f}",
        f"{medians['ours'] / medians['products']:.1f}",
        against,
        f"{peaks['ours'] / 2**20:.0f} MiB",
        adds,
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
