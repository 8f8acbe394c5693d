"""The import arrows of the library, read from the source: nothing imports upward, and there are no circles."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from pytorch_lightning import Callback

from lightning_dml import callbacks
from tests.helpers import ROOT

PACKAGE = "lightning_dml"
FOLDERS = {PACKAGE: "lightning_dml", f"{PACKAGE}.callbacks": "callbacks", f"{PACKAGE}.datamodules": "datamodules"}

# From the bottom up; a part may import from its own row and from the rows above it.
LAYERS = (
    (PACKAGE,),  # the package's own __init__, whose lazy table is no import
    ("checks", "cores", "distributed", "errors", "files", "labels", "parsing", "seeds"),
    ("losses", "memory", "retrieval"),
    ("report",),  # below the callbacks, which draw with it while a training runs
    ("lightning_repairs",),
    ("modules",),
    ("callbacks", "datamodules"),
    ("study",),
    ("commands",),
    ("cli", "__main__"),
)
HEIGHTS = {part: height for height, parts in enumerate(LAYERS) for part in parts}
WITHOUT_LIGHTNING = {
    PACKAGE,
    *(part for parts in LAYERS[1:4] for part in parts),
}
LIGHTNING_AND_TIMM = {"lightning", "lightning_fabric", "pytorch_lightning", "timm"}
ONLY_IN_THE_REPOSITORY = {"callbacks", "datamodules", "tests"}  # folders here, no packages of that name in the wheel


@dataclass(frozen=True)
class Import:
    """`module` imports `target` in line `line`; `target` is a module wherever the sources tell."""

    module: str
    target: str
    line: int


@dataclass(frozen=True)
class Sources:
    """The modules of a tree and every import among them and out of them."""

    modules: frozenset[str]
    imports: tuple[Import, ...]


def read_sources(root: Path) -> Sources:
    """Reads every file of the three folders under `root`."""
    paths = {
        _module_name(prefix, path.relative_to(root / folder)): path
        for prefix, folder in FOLDERS.items()
        for path in sorted((root / folder).rglob("*.py"))
    }
    trees = {module: ast.parse(path.read_text(encoding="utf-8"), str(path)) for module, path in paths.items()}
    lazy = _lazy_names(trees[PACKAGE])
    imports = [
        Import(module, _home(target, name, trees, lazy), line)
        for module, tree in trees.items()
        for target, name, line in _raw_imports(module, paths[module].name == "__init__.py", tree)
    ]
    return Sources(frozenset(trees), tuple(imports))


def violations(sources: Sources) -> list[str]:
    """Every import that the layers forbid, and every module that has no layer, as a sentence."""
    unplaced = sorted(module for module in sources.modules if _part(module) not in HEIGHTS)
    found = [f"{module} has no layer: give it one in LAYERS" for module in unplaced]
    for imported in sources.imports:
        top, where = imported.target.partition(".")[0], f"{imported.module}:{imported.line} imports {imported.target}"
        if top in ONLY_IN_THE_REPOSITORY:
            found.append(f"{where}, which the wheel does not have")
        elif top in LIGHTNING_AND_TIMM and _part(imported.module) in WITHOUT_LIGHTNING:
            found.append(f"{where}, which {_part(imported.module)} must do without")
        elif top == PACKAGE and HEIGHTS.get(_part(imported.target), 0) > HEIGHTS.get(
            _part(imported.module), len(LAYERS)
        ):
            found.append(f"{where}, which is above it")
    return found


def circle(sources: Sources) -> list[str]:
    """One circle of imports, first module again at its end; empty when there is none."""
    graph: dict[str, set[str]] = {module: set() for module in sources.modules}
    for imported in sources.imports:
        if imported.target in graph:
            graph[imported.module].add(imported.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))  # graphlib lists the imported before the importer
    return []


def _module_name(prefix: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join([prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _raw_imports(module: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[str, str | None, int]]:
    """(module named, name taken from it, line) of every import, also within functions and `if TYPE_CHECKING`."""
    exempt = set(_type_checking_imports(tree)) if module == PACKAGE else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom) and node not in exempt:
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield base, alias.name, node.lineno


def _type_checking_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [
        node
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    ]


def _lazy_names(tree: ast.Module) -> dict[str, str]:
    """The homes of the names that the package's own __init__ offers without importing them."""
    return {
        alias.asname or alias.name: node.module or "" for node in _type_checking_imports(tree) for alias in node.names
    }


def _home(target: str, name: str | None, modules: Container[str], lazy: dict[str, str]) -> str:
    """The module that an import reaches: a submodule taken by name, a lazy name's home, or the module itself."""
    if name is not None and f"{target}.{name}" in modules:
        return f"{target}.{name}"
    if target == PACKAGE and name in lazy:
        return lazy[name]
    return target


@pytest.fixture(scope="module")
def library() -> Sources:
    """The sources of this repository."""
    return read_sources(ROOT)


def test_the_reader_sees_the_whole_library(library: Sources) -> None:
    """An empty reading would pass every other test here."""
    parts = {"losses", "memory", "retrieval", "modules", "callbacks", "datamodules"}
    assert parts <= {_part(module) for module in library.modules}
    assert any(imported.target == "torch" for imported in library.imports)


def test_no_module_imports_upward(library: Sources) -> None:
    """Each part imports from its own layer and those below, and the lower ones do without Lightning and timm."""
    assert violations(library) == []


def test_no_modules_import_in_a_circle(library: Sources) -> None:
    """The imports between files, those within functions too, form no circle."""
    found = circle(library)
    assert not found, " -> ".join(found)


def public_definitions(root: Path, folder: str) -> dict[str, set[str]]:
    """Public functions, classes and constants of each file of a folder."""
    found = {}
    for path in sorted((root / folder).rglob("*.py")):
        names = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        found[path.name] = {name for name in names if not name.startswith("_")}
    return found


def test_callbacks_hold_callbacks_and_nothing_else() -> None:
    """A reader who opens `callbacks/` finds one Callback in each file, and no piece that others need."""
    found = public_definitions(ROOT, "callbacks")
    assert found.pop("__init__.py") == set()
    assert all(len(names) == 1 for names in found.values()), found
    for names in found.values():
        assert issubclass(getattr(callbacks, *names), Callback)


def test_no_test_module_imports_another() -> None:
    """Cases that several test files share stand in a `cases.py` beside them, so that each file runs by itself."""
    found = [
        f"{path.relative_to(ROOT)} imports {node.module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("tests.")
        and (
            str(node.module).rpartition(".")[2].startswith("test_")
            or any(alias.name.startswith("test_") for alias in node.names)
        )
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["lightning_dml", "callbacks", "datamodules"])
def test_rooms_are_small(folder: str) -> None:
    """No folder holds more than 15 files beside its `__init__`, and no file more than 400 lines."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    counts = Counter(path.parent for path in paths if path.name != "__init__.py")
    assert [f"{path.relative_to(ROOT)}: {count} files" for path, count in counts.items() if count > 15] == []
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > 400] == []


LAZY_ROOT = (
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_dml.modules import Embedder as Embedder\n"
)
CLEAN = {
    "lightning_dml/__init__.py": LAZY_ROOT,
    "lightning_dml/errors.py": "",
    "lightning_dml/losses/__init__.py": "from lightning_dml.losses.engine import run\n",
    "lightning_dml/losses/engine.py": "import torch\nfrom .. import errors\n",
    "lightning_dml/modules/__init__.py": "import timm\nfrom lightning_dml.losses import run\nEmbedder = run\n",
    "callbacks/__init__.py": "from lightning_dml import Embedder\nfrom .report import draw\n",
    "callbacks/report.py": "from lightning_dml.modules import Embedder\n",
    "datamodules/__init__.py": "",
    "lightning_dml/cli.py": "import lightning_dml.callbacks\n",
}


def plant(root: Path, changes: dict[str, str] | None = None) -> Sources:
    """Writes the clean small library under `root`, with some files changed, and reads it."""
    for name, text in {**CLEAN, **(changes or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_sources(root)


def test_the_checker_passes_a_clean_library(tmp_path: Path) -> None:
    """The planted tests below start from sources in which nothing is wrong."""
    sources = plant(tmp_path)
    assert violations(sources) == []
    assert circle(sources) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from lightning_dml.modules import Embedder", "lightning_dml.losses.engine:1 imports lightning_dml.modules"),
        ("import lightning_dml.callbacks.report", "imports lightning_dml.callbacks.report, which is above it"),
        ("def f():\n    from lightning_dml import modules", ":2 imports lightning_dml.modules, which is above it"),
        ("if TYPE_CHECKING:\n    from ..modules import Embedder", ":2 imports lightning_dml.modules, which is above"),
        ("from lightning_dml import Embedder", "imports lightning_dml.modules, which is above it"),
        ("import pytorch_lightning as pl", "imports pytorch_lightning, which losses must do without"),
        ("from timm.layers import Mlp", "imports timm.layers, which losses must do without"),
        ("from callbacks.report import draw", "imports callbacks.report, which the wheel does not have"),
    ],
)
def test_the_checker_finds_a_planted_import(tmp_path: Path, text: str, said: str) -> None:
    """A forbidden import is found wherever it stands and however it is written."""
    found = violations(plant(tmp_path, {"lightning_dml/losses/engine.py": text}))
    assert len(found) == 1
    assert said in found[0]


def test_the_checker_finds_a_module_without_a_layer(tmp_path: Path) -> None:
    """A new part of the library has to be given a layer."""
    assert violations(plant(tmp_path, {"lightning_dml/odds.py": ""})) == [
        "lightning_dml.odds has no layer: give it one in LAYERS"
    ]


def test_the_checker_exempts_nothing_of_the_package_but_its_lazy_table(tmp_path: Path) -> None:
    """An import that `import lightning_dml` would really make counts."""
    sources = plant(tmp_path, {"lightning_dml/__init__.py": f"{LAZY_ROOT}import lightning_dml.losses\n"})
    assert violations(sources) == ["lightning_dml:4 imports lightning_dml.losses, which is above it"]


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("from lightning_dml.callbacks import draw", {"lightning_dml.callbacks"}),
        ("def f():\n    from . import draw", {"lightning_dml.callbacks"}),
        ("from .other import later", {"lightning_dml.callbacks.other"}),
        ("import lightning_dml.callbacks.report", set()),
    ],
)
def test_the_checker_finds_a_planted_circle(tmp_path: Path, text: str, modules: set[str]) -> None:
    """A circle is found through a package, within a function, between siblings, and of one module alone."""
    other = "import lightning_dml.callbacks.report"
    found = circle(plant(tmp_path, {"callbacks/report.py": text, "callbacks/other.py": other}))
    assert found[0] == found[-1]
    assert set(found) == {"lightning_dml.callbacks.report"} | modules
