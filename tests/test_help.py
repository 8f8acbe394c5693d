"""The help: every command with a sentence, there without torch, short for trainings, and true."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningArgumentParser

import lightning_dml
from lightning_dml.cli import main
from lightning_dml.commands.dml_cli import DMLCLI, SETTINGS, DMLParser
from lightning_dml.commands.help_words import asks_for_all
from lightning_dml.commands.short_help import CALLBACKS, help_of_command
from lightning_dml.commands.table import BY_NAME, COMMANDS
from lightning_dml.datamodules import FolderDataModule
from lightning_dml.modules import Embedder, MetricLearningModule
from tests.helpers import ROOT

LIGHTNINGS = [command.name for command in COMMANDS if command.run is None]
SLOW_TO_LOAD = ["pytorch_lightning", "torch", "timm", "faiss", "matplotlib", "jsonargparse"]


def printed_help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Calls the command line in this process and returns what it printed; argparse's help ends with status 0."""
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_program_lists_its_commands(folder: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    """Nobody looks for a command in an epilogue."""
    printed = printed_help(capsys, word)
    assert str(lightning_dml.__doc__) in printed
    for command in COMMANDS:
        assert re.search(rf"^  {command.name} +{re.escape(command.summary)}$", printed, re.MULTILINE)
    assert set(DMLCLI.subcommands()) <= set(BY_NAME)


AT_ONCE = [["--help"], ["--help", "fit"], *([name, "-h"] for name in BY_NAME), ["nope"], []]


@pytest.mark.parametrize("arguments", AT_ONCE, ids=" ".join)
def test_a_help_loads_nothing_slow(arguments: list[str]) -> None:
    """Torch and Lightning take seconds; the help does without them, and so does the error for a wrong command."""
    code = (
        "import sys\nfrom lightning_dml.cli import main\n"
        "try:\n    main()\nfinally:\n"
        f"    print([name for name in {SLOW_TO_LOAD!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    refused = arguments in (["nope"], [])
    assert done.returncode == (2 if refused else 0)
    assert (len(done.stderr.splitlines()) == 1) == refused


def test_python_m_gives_the_same_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs start the program as a module."""
    command = [sys.executable, "-m", "lightning_dml", "fit", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == printed_help(capsys, "fit", "--help")


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_a_short_help_fits_the_screen_and_shows_how_to_call(name: str) -> None:
    """550 lines of Lightning's are no help."""
    lines = help_of_command(name).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 115
    assert lines[0].startswith(f"usage: lightning-dml {name} ")
    examples = [line.split()[1:] for line in lines if line.startswith(f"  lightning-dml {name} --config")]
    assert examples
    for example in examples:
        for word in example:
            assert not word.startswith("configs/") or (ROOT / word).is_file()


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_a_short_help_names_what_exists(
    name: str, folder: Path, parsers: dict[str, LightningArgumentParser], options_of_classes: set[str]
) -> None:
    """A help is read in place of the sources: an option that was renamed must not live on in it."""
    text = help_of_command(name)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w.]*", text)) - {"--OPTION"}
    known = {*parsers[name]._option_string_actions, *options_of_classes, "--help", "--model.loss.margin"}
    assert options - known == set()
    assert {"--config", "--ckpt_path", "--data.root", "--model.loss", "--seed_everything"} <= options
    for public in set(re.findall(r"\b[A-Z]\w*(?:DataModule|Loss|Embedder|Module|Callback)\b", text)):
        if public != "LightningModule":
            assert any(hasattr(module, public) for module in OURS), public


OURS = [importlib.import_module(f"lightning_dml.{name}") for name in ("callbacks", "datamodules", "losses", "modules")]


def test_the_help_of_fit_has_every_callback_of_ours() -> None:
    """A callback that is not named is not found."""
    callbacks = importlib.import_module("lightning_dml.callbacks")
    assert {name for name, _ in CALLBACKS} == set(callbacks.__all__)


@pytest.fixture(scope="module")
def parsers() -> dict[str, LightningArgumentParser]:
    """The parser of each command that LightningCLI runs."""

    class ParsersAlone(DMLCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = {"seed_everything": False, "subcommand": None}

        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    cli = ParsersAlone(LightningModule, LightningDataModule, **SETTINGS, parser_class=DMLParser)
    return {name: cast(DMLParser, parser) for name, parser in cli._subcommand_parsers.items()}


@pytest.fixture(scope="module")
def options_of_classes() -> set[str]:
    """The options behind --model and --data, of the classes that the short help is about."""
    options = set()
    for key, owner in {
        "model": MetricLearningModule,
        "model.embedder": Embedder,
        "model.optimizer": torch.optim.AdamW,
        "data": FolderDataModule,
    }.items():
        parser = ArgumentParser()
        parser.add_class_arguments(owner, key, fail_untyped=False)
        options |= set(parser._option_string_actions)
    return options


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["fit", "--help", "all"], True),
        (["fit", "--model.help", "MetricLearningModule", "all"], True),
        (["fit", "--data.help=FolderDataModule", "all"], True),
        (["fit", "--help"], False),
        (["fit", "--model.help", "all", "x"], False),
        (["fit", "--config", "all"], False),
        (["all"], False),
        ([], False),
    ],
)
def test_all_is_a_word_behind_a_request_for_help(arguments: list[str], wanted: bool) -> None:
    """A config may be called all."""
    assert asks_for_all(arguments) == wanted


def test_the_help_of_a_class_leaves_out_the_modules_of_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An embedder may be any module: more than a thousand names, three times, hide what the options are."""
    short = printed_help(capsys, "fit", "--model.help", "MetricLearningModule")
    assert len(short.splitlines()) < 150
    assert "--model.memory_loss" in short and "torch.optim.AdamW" in short
    whole = printed_help(capsys, "fit", "--model.help", "MetricLearningModule", "all")
    assert "torch.nn.Identity" in whole and "torch.nn.Identity" not in short
    assert len(whole.splitlines()) > 1000


def test_all_of_a_training_is_lightnings_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the short help leaves out stands behind one word."""
    printed = printed_help(capsys, "fit", "--help", "all")
    assert "--trainer.accumulate_grad_batches" in printed and "--ckpt_path" in printed


def test_the_config_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short help sends there."""
    printed = printed_help(capsys, "fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--print_config")
    assert "use_distributed_sampler: false" in printed and "model_name: test_resnet" in printed


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The near word is what was meant nearly always."""
    with pytest.raises(SystemExit) as stop:
        main(["fitt", "--config", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "lightning-dml: error: 'fitt' is no command of lightning-dml, did you mean fit?\n"
    with pytest.raises(SystemExit):
        main(["zzz"])
    assert "take one of fit, validate, test" in capsys.readouterr().err
