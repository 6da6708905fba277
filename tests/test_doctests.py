"""The examples in the docstrings, run under the names that modules have once installed.

pytest's own collector would import `adapters/` and `recipes/` by their folders, a second time and
under other names.
"""

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

PACKAGES = ("tdq_plugin", "tdq_plugin.adapters", "tdq_plugin.recipes")


def modules() -> list[str]:
    names = set(PACKAGES)
    for package in PACKAGES:
        path = import_module(package).__path__
        names.update(module.name for module in walk_packages(path, f"{package}."))
    return sorted(names)


def import_or_skip(name: str):
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tdq_plugin"):
            raise
        return pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(import_or_skip(name), optionflags=doctest.ELLIPSIS)
    assert not failed


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for name in ("timestep", "fake_quantize", "grid", "ranges", "files", "scales.generator")
        for test in finder.find(import_module(f"tdq_plugin.{name}"))
        if test.examples
    ]
    assert len(found) >= 6
