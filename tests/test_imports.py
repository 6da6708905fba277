"""Law 8: the core imports no framework besides torch, and the command's help not even torch."""

import json
import subprocess
import sys

import pytest

FRAMEWORKS = {
    "accelerate",
    "brevitas",
    "diffusers",
    "matplotlib",
    "nncf",
    "onnxruntime",
    "openvino",
    "pydantic",
    "torchao",
    "torchmetrics",
    "torchvision",
    "transformers",
    "typer",
}


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_public_names_need_torch_only() -> None:
    modules = imported_by("from tdq_plugin import *")
    assert "tdq_plugin.attach" in modules
    assert not top_level(modules) & FRAMEWORKS
    assert "torch.ao.quantization" not in modules - imported_by("import torch")


def test_a_framework_would_be_noticed() -> None:
    modules = imported_by("from tdq_plugin import *\nimport tdq_plugin.recipes.config")
    assert top_level(modules) & FRAMEWORKS == {"pydantic"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    modules = imported_by(
        "from tdq_plugin.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as exit: assert not exit.code"
    )
    assert not top_level(modules) & {"torch", "diffusers"}


SHADOWED = """
import importlib, types
import tdq_plugin
for name in {submodules!r}:
    importlib.import_module("tdq_plugin." + name)
wrong = [n for n in tdq_plugin.__all__ if isinstance(getattr(tdq_plugin, n), types.ModuleType)]
assert not wrong, wrong
"""


def test_no_public_function_is_hidden_by_its_module() -> None:
    """`import tdq_plugin.freeze` must leave `tdq_plugin.freeze(...)` callable."""
    import tdq_plugin

    submodules = [name for name in tdq_plugin.__all__ if _is_module(f"tdq_plugin.{name}")]
    assert "freeze" in submodules
    imported_by(SHADOWED.format(submodules=submodules))


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_an_unknown_name() -> None:
    import tdq_plugin

    with pytest.raises(AttributeError, match="no attribute 'attache'"):
        _ = tdq_plugin.attache
    with pytest.raises(AttributeError, match="'tdq_plugin' has no attribute '_private'"):
        _ = tdq_plugin._private
