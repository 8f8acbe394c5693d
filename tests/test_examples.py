"""The examples run as they stand, the README's first one too."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from tests.helpers import ROOT

PATH = ROOT / "examples/subclass.py"


def test_a_foreign_module_uses_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback promises to work with any LightningModule; this is the proof that people read."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("subclass", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=3)
    assert trainer.global_step == 150
    assert len(trainer.lightning_module.memory_bank) == 2048
    assert 0.05 < float(trainer.callback_metrics["val/recall@1"]) <= 1


def test_it_is_short() -> None:
    """An example that does not fit a screen is not read."""
    assert len(PATH.read_text().splitlines()) < 60


SMALL: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "limit_train_batches": 3,
    "limit_val_batches": 2,
}


def test_the_first_example_of_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the first code that anybody copies; only its trainer is held to a few batches here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", partial(pl.Trainer, **SMALL))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("max_epochs=20", "max_epochs=1")
    assert len([line for line in example.splitlines() if line.strip()]) <= 9
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["trainer"].global_step == 3
    assert "Recall@1" in capsys.readouterr().out


def test_the_first_screen_of_the_readme_has_commands_picture_and_code() -> None:
    """A reader decides within a screen."""
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    for wanted in ("make quickstart", "make test", "<img src=", "```python", "trainer.fit"):
        assert any(line.startswith(wanted) for line in screen), wanted


def test_links_of_the_documents_lead_somewhere() -> None:
    """Relative links to files and to headings, which a move breaks without a word."""
    broken = []
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            path = page.parent / target if target else page
            if not path.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and path.suffix == ".md" and anchor not in _anchors(path):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    """The headings of a page as links name them, and the modules whose documentation it holds."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    titles = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return titles | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
