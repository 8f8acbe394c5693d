"""Options that every loss takes from its base: from a config, from Python, and shown by the command line's help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_dml import losses
from lightning_dml.commands.dml_cli import DMLCLI
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss, PairWeightingLoss, RankedListLoss, RankedListMiner
from lightning_dml.losses.weighting import ContrastiveWeighting
from lightning_dml.losses.weighting.lifted import LiftedWeighting
from lightning_dml.parsing import instantiated
from tests.helpers import ROOT

NEEDED: dict[str, dict[str, Any]] = {
    "DirectWeightingLoss": {
        side: {"class_path": "lightning_dml.losses.curves.Constant"} for side in ("positive", "negative")
    }
}
NAMES = [
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), PairWeightingLoss)
    and name != "PairWeightingLoss"
]
OPTIONS = {"reduction": "pairs", "gather": False, "block_bytes": 4096, "validate": False}
MINER = {"class_path": "lightning_dml.losses.TopKMiner", "init_args": {"positives": 2}}


def parsed(name: str, init_args: dict[str, Any]) -> Any:
    """The loss that a config names, as LightningCLI's parser makes it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=nn.Module)
    init_args = {**NEEDED.get(name, {}), **init_args}
    config = {"loss": {"class_path": f"lightning_dml.losses.{name}", "init_args": init_args}}
    return instantiated(parser, parser.parse_object(config)).loss


@pytest.mark.parametrize("name", NAMES)
def test_a_config_sets_the_options_of_every_loss(name: str) -> None:
    """They stand in the base alone; a parser that lost sight of them would refuse every recipe."""
    has_own_miner = name == "GeneralPairWeightingLoss"
    loss = parsed(name, OPTIONS if has_own_miner else {**OPTIONS, "miner": MINER})
    assert {option: getattr(loss, option) for option in OPTIONS} == OPTIONS
    assert isinstance(loss.miner, losses.MultiSimilarityMiner if has_own_miner else losses.TopKMiner)


@pytest.mark.parametrize("name", NAMES)
def test_the_parser_refuses_an_unknown_option(name: str) -> None:
    """A misspelt option that is swallowed trains another loss than the config says."""
    with pytest.raises(ArgumentError, match="'reducton' is not accepted"):
        parsed(name, {"reducton": "pairs"})
    with pytest.raises(ArgumentError, match="weighting"):
        parsed(name, {"weighting": {"class_path": "torch.nn.Identity"}})


def test_the_help_shows_the_options_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for the help of a loss wants all that a config can set."""
    parser = ArgumentParser()
    parser.add_argument("--loss", type=nn.Module)
    with pytest.raises(SystemExit):
        parser.parse_args(["--loss.help=lightning_dml.losses.ContrastiveLoss"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--loss.margin", "--loss.miner", "'pairs'], default: anchors", "bool, default: True", "16777216"):
        assert words in shown
    assert "--loss.validate" in shown and "raw inner products" in shown and "--loss.weighting" not in shown


def test_python_names_an_unknown_option() -> None:
    """The same mistake without a parser."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'reducton'"):
        ContrastiveLoss(reducton="pairs")  # type: ignore[call-arg]


def test_the_command_line_sets_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw inner products are trained from a config as well."""
    monkeypatch.setattr("sys.argv", ["lightning-dml"])
    config = tmp_path / "raw.yaml"
    loss = {"class_path": "lightning_dml.losses.ContrastiveLoss", "init_args": {"margin": 0.3, "validate": False}}
    config.write_text(yaml.safe_dump({"model": {"init_args": {"loss": loss}}}))
    cli = DMLCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=["--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(config), "--trainer.logger=false"],
    )
    assert cli.model.loss.validate is False
    rows, labels = 3 * F.normalize(torch.randn(4, 6), dim=1), torch.arange(4) % 2
    assert torch.isfinite(cli.model.loss(rows, labels))
    with pytest.raises(InputError, match=r"unit length.*validate to False"):
        ContrastiveLoss(0.3)(rows, labels)


def test_the_ranked_list_has_one_order() -> None:
    """Margin and boundary are both distances, and swapped nobody would see it: the miner takes them by name."""
    assert RankedListLoss(0.3, 1.1).weighting.extra_repr().startswith("margin=0.3, alpha=1.1")
    assert RankedListMiner(margin=0.3, alpha=1.1).extra_repr() == "margin=0.3, alpha=1.1"
    with pytest.raises(TypeError, match="positional"):
        RankedListMiner(0.3, 1.1)  # type: ignore[call-arg]


def test_the_options_of_the_base_are_taken_by_name() -> None:
    """A loss made of its parts takes weighting and miner, and nothing else, by place."""
    assert PairWeightingLoss(ContrastiveWeighting(), losses.TopKMiner()).reduction == "anchors"
    with pytest.raises(TypeError, match="positional"):
        PairWeightingLoss(ContrastiveWeighting(), None, "pairs")  # type: ignore[call-arg]


def test_every_measure_defaults_to_similarity() -> None:
    """The engine works on similarities; a loss that silently compares something else is not comparable."""
    parts = [
        ContrastiveLoss(),
        losses.TripletLoss(),
        losses.TripletLoss(scale=2.0),
        losses.LiftedStructureLoss(),
        losses.LiftedStructureLoss("original"),
        losses.GeneralPairWeightingLoss(),
        LiftedWeighting(),
        losses.SemiHardMiner(),
    ]
    assert isinstance(parts[0].weighting, ContrastiveWeighting)
    assert all("measure='similarity'" in repr(part) for part in parts[1:])
