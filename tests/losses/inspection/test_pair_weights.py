"""`pair_weights`: for every loss, the weights times the references are the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml import losses
from lightning_dml.errors import InputError
from lightning_dml.losses import MultiSimilarityMiner, pair_weights
from tests.losses.cases import tangential

OURS = {
    "contrastive": losses.ContrastiveLoss(0.2, reduction="pairs"),
    "multi-similarity, mined": losses.MultiSimilarityLoss(miner=MultiSimilarityMiner(), reduction="active_anchors"),
    "triplet": losses.TripletLoss(0.2),
    "nt-xent": losses.NTXentLoss(0.2),
    "supcon": losses.SupConLoss(0.2),
    "circle": losses.CircleLoss(),
    "fastap": losses.FastAPLoss(),
    "margin": losses.MarginLoss(),
    "lifted, original": losses.LiftedStructureLoss(variant="original", measure="distance"),
}
THEIRS = {
    "contrastive": pml.ContrastiveLoss(1.0, 0.3, distance=CosineSimilarity()),
    "multi-similarity": pml.MultiSimilarityLoss(2.0, 10.0, 0.5),
    "triplet on distance": pml.TripletMarginLoss(0.2),
    "nt-xent": pml.NTXentLoss(0.2),
}


def data() -> dict[str, Any]:
    """Twelve anchors of four classes, twenty references."""
    generator = torch.Generator().manual_seed(5)
    return {
        "embeddings": F.normalize(torch.randn(12, 5, dtype=torch.float64, generator=generator), dim=1),
        "labels": torch.arange(12) % 4,
        "ref_emb": F.normalize(torch.randn(20, 5, dtype=torch.float64, generator=generator), dim=1),
        "ref_labels": torch.arange(20) % 5,
    }


def gradient(loss: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Gradient of the anchors, by autograd."""
    leaf: Tensor = batch["embeddings"].clone().requires_grad_()
    value: Tensor = loss(**{**batch, "embeddings": leaf})
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", OURS)
def test_our_weights_make_the_gradient(name: str) -> None:
    """The weights that are looked at must be those that train, the reduction included."""
    in_batch = {key: value for key, value in data().items() if not key.startswith("ref_")}
    weights = pair_weights(OURS[name], **in_batch)
    expected = gradient(OURS[name], in_batch)
    torch.testing.assert_close((weights + weights.T) @ in_batch["embeddings"], expected, rtol=1e-9, atol=1e-9)
    if name != "lifted, original":
        weights = pair_weights(OURS[name], **data())
        torch.testing.assert_close(weights @ data()["ref_emb"], gradient(OURS[name], data()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", THEIRS)
def test_weights_of_other_losses_are_measured(name: str) -> None:
    """The second paper's method is for any loss, and another library's shows only its value."""
    batch = data()
    weights = pair_weights(THEIRS[name], **batch)
    assert weights.shape == (12, 20)
    expected = gradient(THEIRS[name], batch)
    ours = tangential(weights @ batch["ref_emb"], batch["embeddings"])
    torch.testing.assert_close(ours, tangential(expected, batch["embeddings"]), rtol=1e-9, atol=1e-9)
    in_batch = {key: value for key, value in batch.items() if not key.startswith("ref_")}
    weights = pair_weights(THEIRS[name], **in_batch)
    assert torch.equal(weights, weights.T)
    ours = tangential((weights + weights.T) @ in_batch["embeddings"], in_batch["embeddings"])
    expected = tangential(gradient(THEIRS[name], in_batch), in_batch["embeddings"])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_measured_weights_are_the_closed_form() -> None:
    """The same loss of both libraries has the same weights, and signs tell pull from push."""
    measured = pair_weights(pml.MultiSimilarityLoss(2.0, 10.0, 0.5), **data())
    torch.testing.assert_close(
        measured, pair_weights(losses.MultiSimilarityLoss(2.0, 10.0, 0.5), **data()), atol=1e-9, rtol=1e-9
    )
    positive = data()["labels"][:, None] == data()["ref_labels"]
    assert (measured[positive] < 0).all() and (measured[~positive] > 0).all()


def test_proxy_losses_have_no_weights_of_pairs_of_samples() -> None:
    """A matrix of zeros, or a crash deep in another library, would be no answer."""
    with pytest.raises(InputError, match=r"ProxyNCALoss.*proxies"):
        pair_weights(pml.ProxyNCALoss(4, 5), data()["embeddings"], data()["labels"])


def test_indices_are_ours_alone() -> None:
    """Silently ignored indices would leave copies of a sample in."""
    with pytest.raises(InputError, match="takes no indices"):
        pair_weights(THEIRS["nt-xent"], **data(), indices=torch.arange(12))


def test_looking_at_halves_does_not_change_what_they_draw() -> None:
    """A callback that logs weights would otherwise make another run of every run that it watches."""
    loss = losses.TripletLoss(0.2, miner=losses.SemiHardMiner(measure="distance", seed=4))
    direct = losses.DirectWeightingLoss(losses.FromLoss(loss), losses.curves.Step(0.2))
    expected = pair_weights(direct, **data())
    assert expected.any() and torch.equal(pair_weights(direct, **data()), expected)
