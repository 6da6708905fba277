"""What is declared in pyproject.toml is what is in the repository."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomllib

import tdq_plugin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def folder_of(package: str) -> Path:
    """Where setuptools takes a package from: the longest mapped prefix, then the rest."""
    prefix = max((p for p in FOLDERS if f"{package}.".startswith(f"{p}.")), key=len)
    rest = package[len(prefix) :].strip(".").split(".")
    return FOLDERS[prefix].joinpath(*filter(None, rest))


def packages_in(name: str, folder: Path) -> set[str]:
    """Names of the packages below a folder that Python files make."""
    parents = {path.parent.relative_to(folder) for path in folder.rglob("*.py")}
    return {".".join((name, *parent.parts)) for parent in parents}


def test_every_package_is_listed() -> None:
    existing = set().union(*(packages_in(name, folder) for name, folder in FOLDERS.items()))
    assert sorted(SETUPTOOLS["packages"]) == sorted(existing)


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_listed_package_exists(package: str) -> None:
    assert (folder_of(package) / "__init__.py").is_file()


def test_extras_are_installed_from_a_checkout() -> None:
    """The package is not on PyPI; `INSTALL` and the documentation say what works."""
    for folder, pattern in (("docs", "*.md"), ("recipes", "*.py"), ("tdq_plugin", "*cli.py")):
        for path in (ROOT / folder).rglob(pattern):
            text = path.read_text(encoding="utf-8")
            assert "tdq-plugin[" not in text, path
            extras = re.findall(r"(?:INSTALL\.format\('|-e '\.\[)([\w,-]+)['\]]", text)
            assert set(",".join(extras).split(",")) - {""} <= set(
                PROJECT["project"]["optional-dependencies"]
            ), path


def test_data_files_are_listed() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(folder_of(package).glob(pattern)), f"{package}: {pattern} matches nothing"
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
        if path.is_file()
    }
    data = {
        path
        for folder in FOLDERS.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert shipped == data


def test_version_is_written_once_in_two_places() -> None:
    assert PROJECT["project"]["version"] == tdq_plugin.__version__


def test_adapters_are_declared() -> None:
    declared = PROJECT["project"]["entry-points"]["tdq_plugin.adapters"]
    folders = {path.parent.name for path in (ROOT / "adapters").glob("*/__init__.py")}
    assert {name.rpartition(".")[2] for name in declared.values()} <= folders
    installed = {entry.name for entry in entry_points(group="tdq_plugin.adapters")}
    assert set(declared) <= installed
