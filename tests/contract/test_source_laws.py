"""Laws 7 and 8, read off the source: safe files, and a light import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for room in ("tdq_plugin", "adapters", "recipes") for path in (ROOT / room).rglob("*.py")
)
FRAMEWORKS = {
    "accelerate", "brevitas", "diffusers", "matplotlib", "nncf", "numpy.testing", "onnx",
    "onnxruntime", "openvino", "torchao", "torchvision", "transformers", "yaml",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_a_pickle(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"pickle", "dill", "joblib"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert options.get("weights_only") == "True", f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_written_atomically(path):
    """Whoever saves tensors does so through `tdq_plugin.files`."""
    text = path.read_text(encoding="utf-8")
    saves = any(call in text for call in ("torch.save(", "save_file(", "json.dump("))
    assert not saves or "atomic_f" in text


def test_import_is_light():
    code = "import sys, tdq_plugin.api; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert not loaded & FRAMEWORKS
    assert not [name for name in loaded if name.startswith("tdq_plugin.adapters.")]
