"""The wheel, built from a copy of the sources and used from an empty folder, where no file of the repository helps."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT

SOURCES = {
    "lightning_dml": "lightning_dml",
    "callbacks": "lightning_dml/callbacks",
    "datamodules": "lightning_dml/datamodules",
}
MODULES = [
    "lightning_dml",
    "lightning_dml.losses",
    "lightning_dml.memory",
    "lightning_dml.modules",
    "lightning_dml.retrieval",
    "lightning_dml.callbacks",
    "lightning_dml.datamodules",
]

# An editable install answers for every module of ours that the wheel lacks; Python runs this file before anything else.
ISOLATION = f"""
import os, sys

def foreign(name):
    return name.startswith(("__editable___lightning_dml", "__editable__.lightning_dml"))

sys.meta_path[:] = [finder for finder in sys.meta_path if not foreign(getattr(finder, "__module__", ""))]
sys.path_hooks[:] = [hook for hook in sys.path_hooks if not foreign(getattr(hook, "__module__", ""))]
sys.path[:] = [entry for entry in sys.path if not foreign(entry) and os.path.realpath(entry) != {str(ROOT.resolve())!r}]
"""

IMPORT_ALL = f"""
import importlib, importlib.metadata, json

report = {{}}
for name in {MODULES!r}:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        report[name] = {{"file": None, "names": [], "missing": [f"{{type(error).__name__}}: {{error}}"]}}
        continue
    names = list(getattr(module, "__all__", []))
    missing = []
    for public in names:
        try:
            getattr(module, public)
        except Exception as error:
            missing.append(f"{{public}}: {{type(error).__name__}}: {{error}}")
    report[name] = {{"file": module.__file__, "names": names, "missing": missing}}
scripts = importlib.metadata.distribution("lightning-dml").entry_points
report["scripts"] = {{script.name: script.value for script in scripts if script.group == "console_scripts"}}
print(json.dumps(report))
"""


@dataclass(frozen=True)
class Installed:
    """A wheel, the folder that it is installed in, and an empty folder to work in."""

    wheel: Path
    site: Path
    work: Path
    isolation: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Python where `lightning_dml` can only come from the wheel."""
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.isolation), str(self.site)]),
            "PYTHONNOUSERSITE": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "OMP_NUM_THREADS": "2",
        }
        return run([sys.executable, *arguments], cwd=self.work, env=env)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and keeps what it printed."""
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


def checked(command: list[str], **options: Any) -> None:
    """Runs a command that must succeed."""
    done = run(command, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Builds the wheel and installs it alone."""
    tmp = tmp_path_factory.mktemp("packaging")
    source, site, work, isolation = (tmp / name for name in ("source", "site", "work", "isolation"))
    for folder in (source, work, isolation):
        folder.mkdir()
    # A copy: a build leaves build/ and egg-info behind, and takes up what an earlier one left there.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (isolation / "sitecustomize.py").write_text(ISOLATION, encoding="utf-8")

    # From `work`: a folder named build in the repository would shadow the module of that name.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp / "dist"), str(source)]
    checked(build, cwd=work)
    (wheel,) = (tmp / "dist").iterdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    checked([*pip, "--no-deps", "--no-index", "--target", str(site), str(wheel)], cwd=work)
    return Installed(wheel, site, work, isolation)


@pytest.fixture(scope="module")
def report(installed: Installed) -> dict[str, Any]:
    """The outcome of importing every public name from the wheel, by module."""
    done = installed.python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_every_folder_of_sources_is_a_listed_package() -> None:
    """The list in pyproject.toml is written by hand: a new folder that is not in it is missing from the wheel alone."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\npackages = [")[2].partition("]")[0]
    folders = {
        ".".join([target.replace("/", "."), *path.parent.relative_to(ROOT / folder).parts])
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert ast.literal_eval(f"[{text}]") == sorted(folders)


def test_the_wheel_holds_the_library_and_nothing_else(installed: Installed) -> None:
    """Every source file is in it, in its place, and no folder named callbacks, datamodules or tests on top."""
    names = zipfile.ZipFile(installed.wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_dml"}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert "lightning_dml/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_imports_from_the_wheel(installed: Installed, report: dict[str, Any], module: str) -> None:
    """Modules and names come from the installed wheel itself."""
    assert report[module]["missing"] == []
    assert report[module]["names"]
    folder = installed.site.joinpath(*module.split("."))
    assert Path(report[module]["file"]).resolve() == (folder / "__init__.py").resolve()


def test_the_wheel_installs_the_command(report: dict[str, Any]) -> None:
    """`lightning-dml` starts what `python -m lightning_dml` starts."""
    assert report["scripts"] == {"lightning-dml": "lightning_dml.cli:main"}


def test_a_module_that_the_wheel_lacks_does_not_come_from_the_repository(installed: Installed) -> None:
    """Without this the editable install could stand in for a file that the wheel has lost."""
    hidden = installed.site / "lightning_dml" / "callbacks"
    aside = installed.work / "callbacks-aside"
    hidden.rename(aside)
    try:
        done = installed.python("-c", "import lightning_dml.callbacks")
    finally:
        aside.rename(hidden)
    assert "No module named 'lightning_dml.callbacks'" in done.stderr


def test_the_command_lists_its_subcommands(installed: Installed) -> None:
    """Lightning's four subcommands and ours are there."""
    done = installed.python("-m", "lightning_dml", "--help")
    assert done.returncode == 0, done.stderr
    for subcommand in ("fit", "validate", "test", "predict", "bank", "curves", "study"):
        assert f"\n  {subcommand} " in done.stdout


@pytest.mark.slow
def test_the_quickstart_trains_from_the_wheel(installed: Installed) -> None:
    """Two batches of training and validation end with a retrieval metric on disk."""
    config = ROOT / "configs" / "quickstart.yaml"
    limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2}
    options = [f"--trainer.{name}={limit}" for name, limit in limits.items()]
    done = installed.python("-m", "lightning_dml", "fit", "--config", str(config), *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (metrics,) = installed.work.rglob("metrics.csv")
    assert "val/recall@1" in metrics.read_text(encoding="utf-8").splitlines()[0].split(",")
