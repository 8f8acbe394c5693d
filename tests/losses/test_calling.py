"""Calls of a loss as training makes them: rows of a memory that another library's loss may see, and precision."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss
from lightning_dml.losses.calling import Rows, call_loss, references_for


def rows(count: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Unit rows of four classes, numbered from 0."""
    embeddings = F.normalize(torch.randn(count, 5), dim=1).to(dtype)
    return Rows(embeddings, torch.arange(count) % 4, torch.arange(count))


def memory() -> Rows:
    """A bank in half precision: three samples of the batch, an empty slot, two unnumbered rows and others."""
    bank = rows(20, torch.bfloat16)
    bank.labels[7] = -1
    indices = torch.arange(20) + 100
    indices[:3], indices[[7, 8, 9]] = torch.arange(3), -1
    return bank._replace(indices=indices)


class Recording(nn.Module):
    """Another library's loss that keeps what it is called with."""

    def forward(self, embeddings: Tensor, labels: Tensor, **references: Any) -> Tensor:
        """Any value with a gradient."""
        self.references = references
        return embeddings.sum()


def test_another_librarys_loss_sees_only_what_may_be_a_pair() -> None:
    """A sample's own copy would be its easiest positive, and empty slots a class of their own."""
    batch, bank, loss = rows(6), memory(), Recording()
    call_loss(loss, batch, bank)
    others = [place for place in range(20) if place > 2 and place != 7]
    assert torch.equal(loss.references["ref_labels"], bank.labels[others])
    assert torch.equal(loss.references["ref_emb"], bank.embeddings[others].float())  # in the anchors' dtype
    call_loss(loss, batch)
    assert loss.references == {}


def test_a_loss_of_ours_gets_everything() -> None:
    """It knows indices and empty slots, and converts a bank part by part."""
    batch, bank, loss = rows(6), memory(), ContrastiveLoss(0.2)
    assert references_for(loss, bank, batch.indices) is bank
    expected = loss(batch.embeddings, batch.labels, *bank[:2], indices=batch.indices, ref_indices=bank.indices)
    assert torch.equal(call_loss(loss, batch, bank), expected)
    assert torch.equal(call_loss(loss, batch), loss(batch.embeddings, batch.labels))


def test_a_bank_of_the_batch_alone_gives_no_loss() -> None:
    """The first steps with a bank hold little else; the gradient must still be there."""
    batch = rows(6)
    anchors = batch._replace(embeddings=batch.embeddings.requires_grad_())
    value = call_loss(pml.NTXentLoss(), anchors, Rows(*(column.detach() for column in batch)))
    torch.autograd.backward(value)
    assert value == 0 and torch.equal(anchors.embeddings.grad, torch.zeros(6, 5))  # type: ignore[arg-type]


def test_another_librarys_loss_is_not_called_with_a_share() -> None:
    """It would train against a part of the memory, another one on every rank."""
    with pytest.raises(InputError, match=r"NTXentLoss knows nothing of ranks.*sharded=False"):
        call_loss(pml.NTXentLoss(), rows(6), memory(), sharded=True)
