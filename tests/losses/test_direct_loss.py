"""Halves of losses: both of one give its gradient back; of two, each side is its own loss's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import torch
from hypothesis import given, settings
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml import losses
from lightning_dml.commands.dml_cli import DMLCLI
from lightning_dml.errors import InputError
from lightning_dml.losses import (
    ContrastiveLoss,
    DirectWeightingLoss,
    FromLoss,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    PairWeightingLoss,
    curves,
    direct_loss,
    pair_weights,
)
from lightning_dml.losses.base import Reduction
from tests.helpers import ROOT, LargestTensor, run_ranks
from tests.losses.cases import (
    LOSSES,
    MINED,
    OURS,
    THEIRS,
    anchors_and_references,
    own_share,
    tangential,
    value_and_gradients,
)
from tests.losses.oracle import batches, gradients

LIFTED = losses.LiftedStructureLoss(variant="original", measure="distance")
COUPLED: dict[str, PairWeightingLoss] = {
    "lifted, original": LIFTED,
    "lifted, original, mined": losses.LiftedStructureLoss(
        variant="original", measure="distance", miner=losses.ThresholdMiner(0.9, 0.0)
    ),
}

IN_BATCH_ONLY: dict[str, Callable[[], nn.Module]] = {
    "fastap": pml.FastAPLoss,
    "ranked list": lambda: pml.RankedListLoss(margin=0.4, Tn=1.0, Tp=0.0),
    "smooth ap": pml.SmoothAPLoss,
}


def whole(loss: nn.Module, **settings: Any) -> DirectWeightingLoss:
    """The loss put together again of its halves, of two copies as they come from a config."""
    return DirectWeightingLoss(FromLoss(copy.deepcopy(loss)), {"from_loss": copy.deepcopy(loss)}, **settings)


@pytest.mark.parametrize("reduction", get_args(Reduction))
@pytest.mark.parametrize("name", [*OURS, *COUPLED])
@settings(max_examples=12)
@given(batch=batches(duplicates=False))
def test_both_halves_of_a_loss_give_its_gradient(name: str, reduction: Reduction, batch: dict[str, Any]) -> None:
    """The study compares halves of losses; a half that is off would be taken for a finding."""
    loss = copy.deepcopy((OURS | COUPLED)[name])
    loss.reduction = reduction
    if name in COUPLED:
        batch = {key: value for key, value in batch.items() if not key.startswith("ref_")}
    for blocks in (1, 2**24):  # a row at a time, and all
        again = whole(loss, reduction=reduction, block_bytes=blocks)
        _, *expected = gradients(copy.deepcopy(loss), batch)
        for ours, right in zip(gradients(again, batch)[1:], expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def in_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without its references."""
    return {key: value for key, value in batch.items() if not key.startswith("ref_")}


def ordinary(unlabelled: bool = False) -> dict[str, Any]:
    """Sixteen anchors of four classes, and twenty references of five."""
    generator = torch.Generator().manual_seed(5)
    labels, ref_labels = torch.arange(16) % 4, torch.arange(20) % 5
    if unlabelled:
        labels[[3, 12]], ref_labels[[0, 7]] = -1, -1
    return {
        "embeddings": F.normalize(torch.randn(16, 5, dtype=torch.float64, generator=generator), dim=1),
        "labels": labels,
        "ref_emb": F.normalize(torch.randn(20, 5, dtype=torch.float64, generator=generator), dim=1),
        "ref_labels": ref_labels,
    }


def turned(loss: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The gradient of the anchors, as far as it turns them."""
    leaf = batch["embeddings"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(**{**batch, "embeddings": leaf}), leaf)
    assert gradient.any()
    return tangential(gradient, batch["embeddings"])


@pytest.mark.parametrize("name", THEIRS | IN_BATCH_ONLY)
def test_both_halves_of_another_librarys_loss_give_its_gradient(name: str) -> None:
    """The method is for any loss, and what is measured must be as exact as a formula."""
    loss = (THEIRS | IN_BATCH_ONLY)[name]()
    again = DirectWeightingLoss(FromLoss(loss), FromLoss(loss))
    for batch in (in_batch(ordinary()), *([ordinary()] if name in THEIRS else [])):
        expected = turned(loss, batch)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(turned(again, batch), expected, rtol=1e-9, atol=1e-9 * scale)


def test_unlabelled_rows_are_not_shown_to_another_librarys_loss() -> None:
    """It would take the label -1 of empty slots for a class of its own."""
    loss = pml.NTXentLoss(0.2)
    for batch in (ordinary(unlabelled=True), in_batch(ordinary(unlabelled=True))):
        known, columns = batch["labels"] != -1, ordinary(unlabelled=True)["ref_labels"] != -1
        ours = turned(DirectWeightingLoss(FromLoss(loss), FromLoss(loss)), batch)
        assert not ours[~known].any()
        fewer = {key: value[columns if key.startswith("ref_") else known] for key, value in batch.items()}
        torch.testing.assert_close(ours[known], turned(loss, fewer), rtol=1e-9, atol=1e-9)


def test_each_side_is_its_own_losss() -> None:
    """The positives of one loss with the negatives of another, each over the pairs that its own miner keeps."""
    batch = ordinary()
    pull, push = MultiSimilarityLoss(2.0, 10.0, 0.5), ContrastiveLoss(0.1, miner=MultiSimilarityMiner(0.05))
    theirs = pml.TripletMarginLoss(0.2)
    positive = batch["labels"][:, None] == batch["ref_labels"]
    for pulls, pushes in ((pull, push), (push, pull), (theirs, push), (pull, theirs)):
        expected = torch.where(positive, pair_weights(pulls, **batch), pair_weights(pushes, **batch))
        ours = pair_weights(DirectWeightingLoss(FromLoss(pulls), FromLoss(pushes)), **batch)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        curve = pair_weights(DirectWeightingLoss(FromLoss(pulls), curves.Step(0.2)), **batch)
        torch.testing.assert_close(curve[positive], expected[positive], rtol=1e-9, atol=1e-9)
        step = (batch["embeddings"] @ batch["ref_emb"].T > 0.2)[~positive].double() / len(positive)
        torch.testing.assert_close(curve[~positive], step)
        curve = pair_weights(DirectWeightingLoss(curves.Constant(), FromLoss(pushes)), **batch)
        torch.testing.assert_close(curve[~positive], expected[~positive], rtol=1e-9, atol=1e-9)
        assert torch.equal(curve[positive], torch.full_like(curve[positive], -1 / len(positive)))


def test_the_direct_losss_miner_comes_first() -> None:
    """A grid of mining x halves means the same mining in each column."""
    batch = ordinary()
    miner = losses.TopKMiner(2, 3)
    loss = MultiSimilarityLoss(2.0, 10.0, 0.5)
    ours = whole(loss, miner=miner)
    expected: PairWeightingLoss = MultiSimilarityLoss(2.0, 10.0, 0.5, miner=miner)
    torch.testing.assert_close(pair_weights(ours, **batch), pair_weights(expected, **batch), rtol=0, atol=1e-12)
    lifted = DirectWeightingLoss(
        FromLoss(LIFTED), FromLoss(copy.deepcopy(LIFTED)), miner=losses.ThresholdMiner(0.9, 0.0)
    )
    expected = losses.LiftedStructureLoss(variant="original", measure="distance", miner=losses.ThresholdMiner(0.9, 0.0))
    weights, right = pair_weights(lifted, **in_batch(batch)), pair_weights(expected, **in_batch(batch))
    torch.testing.assert_close(weights, right, rtol=0, atol=1e-12)
    measured = DirectWeightingLoss(FromLoss(pml.NTXentLoss()), curves.Step(0.2), miner=miner)
    assert torch.equal(pair_weights(measured, **batch) < 0, pair_weights(ContrastiveLoss(miner=miner), **batch) < 0)
    theirs = FromLoss(pml.NTXentLoss())
    mask = pair_weights(DirectWeightingLoss(theirs, theirs, miner=miner), **batch) != 0
    assert torch.equal(mask, pair_weights(ContrastiveLoss(-1.0, miner=miner), **batch) != 0)


def test_no_table_of_all_pairs_is_made() -> None:
    """Halves of our losses must train against a memory that a table of all pairs would not fit beside."""
    anchors, references = F.normalize(torch.randn(32, 4), dim=1), F.normalize(torch.randn(4096, 4), dim=1)
    for loss in (whole(losses.SupConLoss()), whole(ContrastiveLoss())):
        loss.block_bytes = 2 * 4 * 4096
        watch = LargestTensor()
        with watch:
            loss(anchors.requires_grad_(), torch.arange(32) % 4, references, torch.arange(4096) % 4).backward()
        assert watch.entries <= 4 * 4096 < 32 * 4096


def test_separable_halves_stay_separable() -> None:
    """Against sharded references that is the difference between rows of anchors and all similarities sent."""
    assert whole(ContrastiveLoss()).weighting.separable
    assert not whole(ContrastiveLoss(miner=MultiSimilarityMiner())).weighting.separable
    assert not DirectWeightingLoss(curves.Constant(), FromLoss(losses.SupConLoss())).weighting.separable


RANKED = ("contrastive", "multi-similarity", "fastap", "semi-hard", "batch hard", "nt-xent")


def on_rank(rank: int, ranks: int) -> dict[str, list[Any]]:
    """Each loss and its halves: in-batch, against all references, and against shares of them."""
    anchors, references = anchors_and_references(ranks, rank)
    results: dict[str, list[Any]] = {}
    for name in RANKED:
        for reduction in get_args(Reduction):
            loss = copy.deepcopy((LOSSES | MINED)[name])
            loss.reduction = reduction
            for kind, given_references in (("in-batch", {}), ("memory", references), ("shares", own_share(references))):
                variants = loss, whole(loss, reduction=reduction)
                pair = [value_and_gradients(variant, anchors, given_references) for variant in variants]
                results[f"{name}, {reduction}, {kind}"] = pair
    results["lifted"] = [value_and_gradients(loss, anchors, {}) for loss in (LIFTED, whole(LIFTED))]
    theirs = pml.NTXentLoss(0.2)
    both = DirectWeightingLoss(FromLoss(theirs), FromLoss(theirs))
    results["theirs"] = [value_and_gradients(both, anchors, {}), value_and_gradients(both, anchors, references)]
    with pytest.raises(InputError, match="ref_sharded=True needs weights that come row by row"):
        value_and_gradients(both, anchors, own_share(references))
    return results


def test_halves_train_on_ranks_as_their_loss_does() -> None:
    """Statistics, draws and counts of a half cross ranks as those of a loss do."""
    everywhere = run_ranks(2, on_rank)
    for results in everywhere:
        theirs = results.pop("theirs")
        assert all(np.isfinite(gradient).all() for _, (gradient,) in theirs)
        for name, ((_, right), (_, ours)) in results.items():
            np.testing.assert_allclose(ours[0], right[0], rtol=0, atol=1e-9, err_msg=name)


def their_batch(rank: int, ranks: int) -> Any:
    """The gradient of another library's loss from its halves, this rank's rows."""
    anchors, _ = anchors_and_references(2, 0) if ranks == 2 and rank == 0 else anchors_and_references(2, 1)
    loss = pml.MultiSimilarityLoss(2.0, 10.0, 0.5)
    (_, (gradient,)) = value_and_gradients(DirectWeightingLoss(FromLoss(loss), FromLoss(loss)), anchors, {})
    return gradient


def test_another_librarys_loss_sees_the_batches_of_all_ranks() -> None:
    """Its in-batch weights are those of one process with the whole batch; DDP takes the mean over two ranks."""
    parts = [anchors_and_references(2, rank)[0] for rank in range(2)]
    embeddings = torch.cat([part["embeddings"] for part in parts]).requires_grad_()
    labels = torch.cat([part["labels"] for part in parts])
    loss = pml.MultiSimilarityLoss(2.0, 10.0, 0.5)
    both = DirectWeightingLoss(FromLoss(loss), FromLoss(loss))
    (expected,) = torch.autograd.grad(both(embeddings, labels), embeddings)
    ours = np.concatenate(run_ranks(2, their_batch)) / 2
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-9)


CONFIG = """
model:
  init_args:
    loss:
      class_path: lightning_dml.losses.DirectWeightingLoss
      init_args:
        positive:
          class_path: lightning_dml.losses.FromLoss
          init_args:
            from_loss: {class_path: lightning_dml.losses.MultiSimilarityLoss, init_args: {alpha: 3.0}}
        negative:
          from_loss:
            class_path: lightning_dml.losses.ContrastiveLoss
            init_args: {margin: 0.3, miner: {class_path: lightning_dml.losses.MultiSimilarityMiner}}
    memory_loss:
      class_path: lightning_dml.losses.DirectWeightingLoss
      init_args:
        positive: {from_loss: {class_path: pytorch_metric_learning.losses.NTXentLoss, init_args: {temperature: 0.2}}}
        negative: {class_path: lightning_dml.losses.curves.Step, init_args: {threshold: 0.4}}
"""


def test_halves_come_from_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's axes are configs: both forms, ours and another library's, with curves beside them."""
    monkeypatch.setattr("sys.argv", ["lightning-dml"])
    config = tmp_path / "halves.yaml"
    config.write_text(CONFIG)
    quickstart = ROOT / "configs/quickstart.yaml"
    cli = DMLCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=["--config", str(quickstart), "--config", str(config), "--trainer.logger=false"],
    )
    right = DirectWeightingLoss(
        FromLoss(MultiSimilarityLoss(alpha=3.0)), FromLoss(ContrastiveLoss(0.3, miner=MultiSimilarityMiner()))
    )
    batch = ordinary()
    assert torch.equal(pair_weights(cli.model.loss, **batch), pair_weights(right, **batch))
    right = DirectWeightingLoss(FromLoss(pml.NTXentLoss(0.2)), curves.Step(0.4))
    assert torch.equal(pair_weights(cli.model.memory_loss, **batch), pair_weights(right, **batch))


def test_halves_resume() -> None:
    """A half's own miner that draws must go on where it stood."""
    loss = whole(losses.TripletLoss(0.2, miner=losses.SemiHardMiner(measure="distance", seed=4)))
    batch = ordinary()
    loss(**batch)
    state, expected = copy.deepcopy(loss.state_dict()), loss(**batch)
    again = whole(losses.TripletLoss(0.2, miner=losses.SemiHardMiner(measure="distance", seed=4)))
    assert not torch.equal(again(**batch), expected)
    again.load_state_dict(state)
    assert torch.equal(again(**batch), expected)


def nested() -> DirectWeightingLoss:
    """A direct loss with a measured side."""
    return DirectWeightingLoss(FromLoss(pml.NTXentLoss()), curves.Step())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FromLoss(curves.Step()), "from_loss must be a loss module.*Step"),  # type: ignore[arg-type]
        (lambda: DirectWeightingLoss({"from_los": ContrastiveLoss()}, curves.Step()), r"positive.*'from_los'"),  # type: ignore[arg-type]
        (lambda: DirectWeightingLoss(curves.Constant(), ContrastiveLoss()), r"negative.*FromLoss\(ContrastiveLoss"),
        (
            lambda: DirectWeightingLoss(FromLoss(losses.MarginLoss(learn_beta=True)), curves.Step()),
            "positive has parameters that require a gradient",
        ),
        (lambda: DirectWeightingLoss(curves.Constant(), FromLoss(pml.ProxyNCALoss(4, 5))), "negative has parameters"),
        (lambda: DirectWeightingLoss(curves.Constant(), FromLoss(nested())), "negative is from a DirectWeightingLoss"),
        (lambda: FromLoss(ContrastiveLoss())(torch.ones(2)), "FromLoss is a side of DirectWeightingLoss"),
        (lambda: whole(LIFTED)(**ordinary()), "OriginalLiftedWeighting couples the rows.*in-batch only"),
        (lambda: whole(pml.FastAPLoss())(**ordinary()), "FastAPLoss has no weights of pairs.*in-batch"),
        (
            lambda: whole(pml.ProxyNCALoss(4, 5).requires_grad_(False))(**in_batch(ordinary())),
            "ProxyNCALoss has no weights of pairs.*proxies",
        ),
        (
            lambda: whole(pml.SignalToNoiseRatioContrastiveLoss())(**ordinary()),
            "SignalToNoise.* depends on more than inner products",
        ),
        (
            lambda: losses.weighting.DirectWeighting(nested().weighting.positive, curves.Step())(  # type: ignore[arg-type]
                torch.ones(1, 1), torch.ones(1, 1).bool(), torch.zeros(1, 1).bool()
            ),
            "statistics from DirectWeightingLoss",
        ),
    ],
)
def test_what_is_no_half_is_refused(build: Callable[[], object], words: str) -> None:
    """A side that cannot be must stop a study before its first run, and say what to do."""
    with pytest.raises(InputError, match=words):
        build()


def test_too_many_references_to_measure_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured against a full memory, a loss would take hundreds of gigabytes and die without a word."""
    loss = whole(pml.NTXentLoss())
    monkeypatch.setattr(direct_loss, "MEASURED_REFERENCES", 19)
    with pytest.raises(InputError, match=r"ref_emb has 20 rows.*NTXentLoss.*at most 19"):
        loss(**ordinary())
    monkeypatch.setattr(direct_loss, "MEASURED_REFERENCES", 20)
    assert torch.isfinite(loss(**ordinary()))
