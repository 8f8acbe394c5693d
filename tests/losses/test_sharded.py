"""References that are spread over two and three real ranks against the same call with all of them on every rank."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_dml import losses
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, PairWeightingLoss
from lightning_dml.losses.sharded import bytes_sent
from tests.helpers import run_ranks
from tests.losses.cases import (
    DIM,
    LOSSES,
    MINED,
    REFERENCES,
    SIZES,
    ValueAndGradients,
    anchors_and_references,
    grad_of,
    net,
    own_share,
    value_and_gradients,
)
from tests.tolerances import rounding

BY_SHARES, BY_ROWS = "contrastive", "multi-similarity"  # one of each path


def both(
    loss: PairWeightingLoss, rank: int, ranks: int, references: int = REFERENCES, calls: int = 1
) -> list[ValueAndGradients]:
    """Results with all references on every rank, and with shares."""
    anchors, whole = anchors_and_references(ranks, rank, references)
    return [value_and_gradients(loss, anchors, rows, calls) for rows in (whole, own_share(whole))]


def every_loss(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """Named losses in every reduction, and miners."""
    results = {}
    for name, loss in (LOSSES | MINED).items():
        for reduction in get_args(losses.base.Reduction):
            loss.reduction = reduction
            results[f"{name}, {reduction}"] = both(loss, rank, ranks, calls=2 if name in MINED else 1)
        loss.reduction = "anchors"
    return results


def blocks(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """The whole set on every rank, and shares in blocks of one anchor, of two or three, and of all."""
    anchors, whole = anchors_and_references(ranks, rank)
    results = {}
    for name in (BY_SHARES, BY_ROWS, "semi-hard", "margin, learned"):
        loss = copy.deepcopy((LOSSES | MINED)[name])
        results[name] = [value_and_gradients(loss, anchors, whole)]
        for block_bytes in (1, 600, 2**24):
            loss.block_bytes = block_bytes
            results[name].append(value_and_gradients(loss, anchors, own_share(whole)))
    return results


def few_references(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """Less references than ranks, so that shares are empty, and none at all."""
    return {
        f"{name}, {count}": both((LOSSES | MINED)[name], rank, ranks, count)
        for name in (BY_SHARES, BY_ROWS, "semi-hard", "margin, learned")
        for count in (0, 1, 2)
    }


def in_float32(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """Float32 as it is trained in, under autocast, and with a bank of bfloat16."""
    anchors, whole = anchors_and_references(ranks, rank)
    anchors["embeddings"], whole["ref_emb"] = anchors["embeddings"].float(), whole["ref_emb"].float()
    results = {}
    for name in (BY_SHARES, BY_ROWS, "nt-xent"):
        loss = LOSSES[name]
        results[name] = [value_and_gradients(loss, anchors, rows) for rows in (whole, own_share(whole))]
        with torch.autocast("cpu", torch.bfloat16):
            results[name].append(value_and_gradients(loss, anchors, own_share(whole)))
        half = {**whole, "ref_emb": whole["ref_emb"].bfloat16()}
        results[f"{name}, half a bank"] = [value_and_gradients(loss, anchors, rows) for rows in (half, own_share(half))]
    return results


def unwanted(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """Rank 0 wants no gradient and the others do, then nobody does, and then the samples are not numbered."""
    anchors, whole = anchors_and_references(ranks, rank)
    bare = {name: rows for name, rows in whole.items() if name != "ref_indices"}
    return {
        f"{name}, {case}": [
            value_and_gradients(LOSSES[name], anchors, rows, wants=wants) for rows in (refs, own_share(refs))
        ]
        for name in (BY_SHARES, BY_ROWS)
        for case, refs, wants in (("others", whole, rank > 0), ("nobody", whole, False), ("bare", bare, True))
    }


def through_ddp(rank: int, ranks: int) -> dict[str, list[ValueAndGradients]]:
    """A network's weights after DDP has averaged."""
    anchors, whole = anchors_and_references(ranks, rank)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = sum(SIZES[ranks][:rank])
    results: dict[str, list[ValueAndGradients]] = {}
    for name in (BY_SHARES, BY_ROWS):
        for references in (whole, own_share(whole)):
            model = DistributedDataParallel(net())
            embeddings = F.normalize(model(x[start : start + SIZES[ranks][rank]]), dim=1)
            value = LOSSES[name](**{**anchors, "embeddings": embeddings}, **references)
            value.backward()
            gradients = [grad_of(parameter).numpy() for parameter in model.parameters()]
            results.setdefault(name, []).append((float(value.detach()), gradients))
    return results


@contextmanager
def sending() -> Iterator[list[int]]:
    """Bytes that this rank sends to others in gathers and exchanges, call by call."""
    sent: list[int] = []
    gather, all_to_all = dist.all_gather, dist.all_to_all_single

    def counted_gather(parts: list[Tensor], own: Tensor) -> None:
        sent.append((len(parts) - 1) * own.nbytes)
        gather(parts, own)

    def counted_exchange(out: Tensor, blocks: Tensor) -> None:
        sent.append(blocks.nbytes // len(blocks) * (len(blocks) - 1))
        all_to_all(out, blocks)

    with mock.patch.object(dist, "all_gather", counted_gather):
        with mock.patch.object(dist, "all_to_all_single", counted_exchange):
            yield sent


def traffic(rank: int, ranks: int) -> dict[str, tuple[int, int, int]]:
    """Traffic of each case: what was sent, what the formula says, and the most in one go."""
    anchors, whole = anchors_and_references(ranks, rank)
    results = {}
    for name in (BY_SHARES, BY_ROWS):
        for counting, wants, indexed in ((False, True, True), (True, True, False), (False, False, True)):
            loss = copy.deepcopy(LOSSES[name])
            loss.reduction = "pairs" if counting else "anchors"
            loss.block_bytes = 2 * REFERENCES * 8  # two anchors of a rank at a time
            references = own_share({key: rows for key, rows in whole.items() if indexed or key != "ref_indices"})
            with sending() as sent:
                value_and_gradients(loss, anchors, references, wants=wants)
            expected = bytes_sent(
                anchors=max(SIZES[ranks]),
                references=REFERENCES,
                dim=DIM,
                ranks=ranks,
                separable=name == BY_SHARES,
                counting=counting,
                indexed=indexed,
                gradient=wants,
                itemsize=8,
            )
            results[f"{name}, counting {counting}, gradient {wants}"] = sum(sent), expected, max(sent)
    return results


def refused(rank: int, ranks: int) -> dict[str, str]:
    """Errors that the ranks get for calls that cannot be."""
    anchors, whole = anchors_and_references(ranks, rank)
    own, loss = own_share(whole), ContrastiveLoss(0.2)
    backwards = {name: rows[ranks - 1 - rank :: ranks] for name, rows in whole.items()}
    unnumbered = {**own, "ref_indices": own["ref_indices"] if rank else None}
    calls: dict[str, Callable[[], Tensor]] = {
        "order": lambda: loss(**anchors, **backwards, ref_sharded=True),
        "indices": lambda: loss(**anchors, **unnumbered),
        "gather": lambda: ContrastiveLoss(0.2, gather=False)(**anchors, **own),
        "gradient": lambda: loss(**anchors, **{**own, "ref_emb": own["ref_emb"].clone().requires_grad_()}),
        "missing": lambda: loss(**anchors, ref_sharded=True),
        "coupled": lambda: losses.LiftedStructureLoss(variant="original", measure="distance")(**anchors, **own),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
            errors[name] = "accepted"
        except InputError as error:
            errors[name] = str(error)
    return errors


PARTS = (every_loss, blocks, few_references, in_float32, unwanted, through_ddp, traffic, refused)


def on_rank(rank: int, ranks: int) -> dict[str, Any]:
    """Everything in one set of processes: starting them takes longer than the cases."""
    return {part.__name__: part(rank, ranks) for part in PARTS}


@functools.cache
def outcomes(ranks: int) -> list[dict[str, Any]]:
    """Results of each rank, of all cases."""
    return run_ranks(ranks, on_rank)


def same(ranks: int, part: Callable[..., Any], tolerance: float, may_vanish: bool = False) -> None:
    """Compares the first call of each case with the others, on every rank; `tolerance` is at magnitude 1."""
    cases = [outcome[part.__name__] for outcome in outcomes(ranks)]
    for case in cases[0]:
        moved = 0.0
        for rank, results in enumerate(cases):
            (value, gradients), *others = results[case]
            moved += sum(abs(gradient).sum() for gradient in gradients)
            bound = tolerance * max(1.0, abs(value), *(abs(gradient).max(initial=0) for gradient in gradients))
            for other, other_gradients in others:
                assert other == pytest.approx(value, rel=0, abs=bound), (case, rank)
                assert len(other_gradients) == len(gradients), (case, rank)
                for ours, right in zip(other_gradients, gradients, strict=True):
                    assert ours.shape == right.shape
                    assert abs(ours - right).max(initial=0) <= bound, (case, rank)
        assert may_vanish or moved > 0, f"{case} has no gradient and compares nothing"


@pytest.mark.parametrize("ranks", [2, 3])
def test_spread_references_train_as_whole_ones_do(ranks: int) -> None:
    """A memory is spread for its size alone; for any loss, miner and reduction the training must be the same."""
    same(ranks, every_loss, 1e-9)


@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_make_no_difference(ranks: int) -> None:
    """The anchors at a time are a matter of memory alone, and ranks with few must join in every block."""
    same(ranks, blocks, 1e-9)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_without_references_join_in(ranks: int) -> None:
    """A queue that has just begun to fill has fewer rows than there are ranks; nobody may wait or divide by them."""
    same(ranks, few_references, 1e-9, may_vanish=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_single_precision_agrees(ranks: int) -> None:
    """Training runs in float32 and under autocast: neither may compute the similarities in less."""
    # Eight products of a similarity, whose rounding the exponential of rate 10 multiplies by that, the sum over the
    # references of an anchor, and that over anchors: the shares add in another order. bfloat16 would be off by 0.004.
    same(ranks, in_float32, rounding(10 * DIM + REFERENCES + 16))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_on_who_wants_gradients(ranks: int) -> None:
    """A rank with frozen embeddings that skipped an exchange would hang the others."""
    same(ranks, unwanted, 1e-9, may_vanish=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_average_of_ddp_is_the_gradient(ranks: int) -> None:
    """DDP's own collectives run in the backward pass, where the loss must have none to mix in."""
    same(ranks, through_ddp, 1e-9)
    first, *rest = (outcome["through_ddp"] for outcome in outcomes(ranks))
    for other in rest:
        for name, calls in first.items():
            for (_, gradients), (_, others) in zip(calls, other[name], strict=True):
                assert all((ours == right).all() for ours, right in zip(gradients, others, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_as_much_is_sent_as_the_formula_says(ranks: int) -> None:
    """Traffic decides whether a memory is worth spreading, and a block must bound what is held for it."""
    for outcome in outcomes(ranks):
        for case, (sent, expected, most) in outcome["traffic"].items():
            assert sent == expected, case
            longest = -(-REFERENCES // ranks)
            if case.startswith(BY_ROWS):
                assert most <= (ranks - 1) * max(2 * longest, max(SIZES[ranks]) * DIM) * 8, case


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("order", "round robin"),
        ("indices", "on every rank"),
        ("gather", "gather=False"),
        ("gradient", "detach it"),
        ("missing", "needs ref_emb"),
        ("coupled", "in-batch only"),
    ],
)
def test_calls_that_cannot_be_are_refused_on_every_rank(ranks: int, case: str, message: str) -> None:
    """One rank that raises while others wait is a job that stands still until the time-out."""
    for outcome in outcomes(ranks):
        assert message in outcome["refused"][case]


def test_one_process_holds_the_only_share() -> None:
    """The same script must run on one GPU."""
    anchors, whole = anchors_and_references(2, 1)
    for name in (BY_SHARES, BY_ROWS):
        (value, (gradient,)), (other, (other_gradient,)) = (
            value_and_gradients(LOSSES[name], anchors, rows) for rows in (whole, {**whole, "ref_sharded": True})
        )
        assert other == value
        assert (other_gradient == gradient).all()
    assert bytes_sent(64, 1000, 128, ranks=1, separable=False) == 0


def test_one_process_refuses_what_many_would() -> None:
    """A mistake should show on the desk, not first on the cluster."""
    anchors, whole = anchors_and_references(2, 1)
    with pytest.raises(InputError, match="detach it"):
        ContrastiveLoss()(**anchors, **{**whole, "ref_emb": whole["ref_emb"].requires_grad_()}, ref_sharded=True)
    with pytest.raises(InputError, match="needs ref_emb"):
        ContrastiveLoss()(**anchors, ref_sharded=True)
