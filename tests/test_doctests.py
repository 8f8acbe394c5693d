"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lightning_dml
import lightning_dml.callbacks
import lightning_dml.datamodules

PACKAGES = (lightning_dml, lightning_dml.callbacks, lightning_dml.datamodules)
MODULES = sorted(
    {
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.name.endswith("__main__")
    }
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    """Examples are what people copy; a stale one costs them an hour."""
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {**vars(module), "torch": importlib.import_module("torch")}
    assert doctest.testmod(module, optionflags=flags, extraglobs=names).failed == 0


def test_there_are_examples() -> None:
    """Had the finder stopped seeing the modules, the test above would pass on nothing."""
    finder = doctest.DocTestFinder()
    count = sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert count >= 15
