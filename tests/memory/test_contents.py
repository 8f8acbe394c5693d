"""Entries drawn from a bank by age, and the pairs that a batch makes with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dml import MemoryBank
from lightning_dml.memory import contents as bank_contents
from lightning_dml.memory.contents import BankContents, pair_figures
from tests.memory.contents_oracle import pairs_by_loop


def a_bank() -> MemoryBank:
    """Twelve slots made in steps 0 to 11, of which some cannot be encoded anew."""
    bank = MemoryBank(14, 3)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        label, index = (-1 if step == 4 else step % 3), (-1 if step == 7 else step)
        row = nn.functional.normalize(torch.randn(1, 3, generator=generator), dim=1)
        bank.enqueue(row, torch.tensor([label]), torch.tensor([index]), None if step == 9 else step)
    return bank


def test_entries_are_drawn_from_all_ages() -> None:
    """A draw over all would miss the oldest, the stalest; an unusable slot would be encoded as another sample."""
    contents = BankContents(a_bank())
    whole = contents.draw(100, torch.Generator().manual_seed(0))
    assert [sorted(quarter.tolist(), reverse=True) for quarter in whole] == [[11, 10, 8], [6, 5], [3, 2], [1, 0]]
    drawn = [contents.draw(6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3)]
    for quarters in drawn:
        assert [len(quarter) for quarter in quarters] == [2, 2, 1, 1]
        for quarter, source in zip(quarters, whole, strict=True):
            assert set(quarter.tolist()) <= set(source.tolist())
            assert len(set(quarter.tolist())) == len(quarter)
    assert torch.equal(torch.cat(drawn[0]), torch.cat(drawn[1]))
    assert len({tuple(torch.cat(quarters).tolist()) for quarters in drawn}) > 1


@pytest.mark.parametrize("columns", [1, 5, 8192])
def test_pairs_are_those_of_a_double_loop(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty slots, own samples and block borders are where such a count goes wrong."""
    monkeypatch.setattr(bank_contents, "COLUMNS", columns)
    bank = a_bank()
    embeddings = nn.functional.normalize(torch.randn(6, 3), dim=1)
    labels, indices = torch.tensor([0, 1, -1, 2, 5, 7]), torch.tensor([0, 40, 3, -1, 5, 41])
    found = pair_figures(bank, embeddings, labels, indices, 0.2)
    expected = pairs_by_loop(bank.state_dict(), embeddings, labels, indices, 0.2)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert (found["hard_negatives"], found["positives"]) == pytest.approx(expected)


def test_a_batch_alone_in_the_bank_is_no_positive_of_itself() -> None:
    """Each row's own copy has the same label and the highest similarity of all."""
    bank = MemoryBank(4, 2)
    bank.enqueue(torch.eye(2), torch.tensor([0, 1]), torch.tensor([5, 6]))
    found = pair_figures(bank, torch.eye(2), torch.tensor([0, 1]), torch.tensor([5, 6]), 0.5)
    assert found == {"hard_negatives": 0.0, "positives": 0.0}
