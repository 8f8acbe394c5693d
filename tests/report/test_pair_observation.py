"""Pairs of a step: references and points drawn evenly, ranks asked apart, and forces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dml import MemoryBank
from lightning_dml.losses import (
    GeneralPairWeightingLoss,
    MultiSimilarityLoss,
    ObservedWeights,
)
from lightning_dml.losses.calling import Rows
from lightning_dml.losses.inspection.observed import ObservedSide, thinned
from lightning_dml.report.pair_observation import drawn_from, figures_of, observe


def a_bank(rows: int = 40, share: tuple[int, int] = (0, 1)) -> MemoryBank:
    """Rows whose index is their slot; every fifth is empty."""
    bank = MemoryBank(rows, 3, share=share)
    embeddings = nn.functional.normalize(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(rows) % 4
    labels[::5] = -1
    bank.enqueue(embeddings, labels, torch.arange(rows))
    return bank


def test_entries_of_a_large_bank_are_drawn_evenly() -> None:
    """The newest rows alone would show fresh negatives; an empty slot is nobody's negative."""
    bank, device = a_bank(), torch.device("cpu")
    every = drawn_from(bank, 100, 0, 7, device)
    assert every.indices.tolist() == [slot for slot in range(40) if slot % 5]
    times = torch.zeros(40)
    for step in range(400):
        drawn = drawn_from(bank, 8, 0, step, device)
        assert len(set(drawn.indices.tolist())) == 8
        assert torch.equal(drawn.embeddings, bank.embeddings[drawn.indices])
        assert torch.equal(drawn.labels, bank.labels[drawn.indices])
        times[drawn.indices] += 1
    assert bool((times[::5] == 0).all())
    rest = times[torch.arange(40) % 5 != 0]
    assert float(rest.min()) > 60 and float(rest.max()) < 140  # 100 each, with a deviation of about 9
    again = [
        drawn_from(bank, 8, seed, step, device).indices.tolist() for seed, step in ((1, 2), (1, 2), (2, 2), (1, 3))
    ]
    assert again[0] == again[1] and again[0] != again[2] and again[0] != again[3]


def test_the_points_of_a_figure_are_drawn_evenly() -> None:
    """Pairs stand in the order of their anchors: the first of them would show a few anchors and pass for all."""

    def side(pairs: int) -> ObservedSide:
        numbers = torch.arange(pairs, dtype=torch.float64)
        return ObservedSide(numbers, numbers + 0.5, 7.0 * pairs, pairs, torch.tensor([pairs]))

    observed = ObservedWeights(side(40), side(60), torch.tensor([-1.0, 1.0]), 10)
    for name, pairs in (("positives", 40), ("negatives", 60)):
        times, every = torch.zeros(pairs), getattr(observed, name)
        for seed in range(400):
            drawn = getattr(thinned(observed, pairs // 5, seed), name)
            assert len(set(drawn.similarity.tolist())) == len(drawn.similarity) == pairs // 5
            assert torch.equal(drawn.weight, drawn.similarity + 0.5)
            assert (drawn.force, drawn.pairs, drawn.counts.tolist()) == (every.force, pairs, [pairs])
            times[drawn.similarity.long()] += 1
        assert float(times.min()) > 48 and float(times.max()) < 112  # 80 each, with a deviation of 8
        few, again, other = (getattr(thinned(observed, 8, seed), name).similarity.tolist() for seed in (1, 1, 2))
        assert few == again and few != other
        assert torch.equal(getattr(thinned(observed, pairs, 0), name).similarity, every.similarity)


def test_a_loss_that_keeps_to_its_rank_is_asked_rank_by_rank() -> None:
    """Its training knows no pairs across ranks, and DDP takes the mean of what the ranks have."""
    generator = torch.Generator().manual_seed(1)
    embeddings = nn.functional.normalize(torch.randn(8, 3, generator=generator), dim=1)
    batch = Rows(embeddings, torch.arange(8) % 2, torch.arange(8))
    loss = MultiSimilarityLoss(gather=False)
    found = observe(loss, batch, None, [3, 0, 5])
    assert found is not None
    expected = [observe(loss, Rows(*(column[rows] for column in batch)), None, [0]) for rows in (slice(3), slice(3, 8))]
    for name in ("positives", "negatives"):
        ours, parts = getattr(found, name), [getattr(part, name) for part in expected]
        assert ours.force == pytest.approx(sum(part.force for part in parts) / 3)
        assert ours.force == pytest.approx(float(ours.weight.sum()))
        assert torch.equal(ours.similarity, torch.cat([part.similarity for part in parts]))
        assert ours.pairs == int(ours.counts.sum()) == sum(part.pairs for part in parts)
    together = observe(MultiSimilarityLoss(), batch, None, [3, 0, 5])
    assert together is not None and together.negatives.pairs > found.negatives.pairs


def test_forces_carry_the_factor_and_no_minus_zero() -> None:
    """`-0.0` in a table reads like a mistake."""
    batch = Rows(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    figures = figures_of(observe(GeneralPairWeightingLoss(), batch, None, [2]), 3.0)
    assert str(figures["positive_force"]) == "0.0"
    assert figures["negative_similarity"] == 0
