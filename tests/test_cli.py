"""The `tdq` command, as a user types it."""

import errno
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from tdq_plugin.cli import app
from tdq_plugin.deploy import halves
from tdq_plugin.grid import activation_grid
from tdq_plugin.recipes import RECIPES
from tdq_plugin.table import ScaleTable


def tdq(*arguments: object) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_help_lists_the_verbs() -> None:
    result = tdq("--help")
    assert result.exit_code == 0
    for verb in ("recipes", "run", "study", "inspect", "doctor"):
        assert verb in result.stdout


def test_recipes_are_listed_with_a_line_each() -> None:
    result = tdq("recipes")
    assert result.exit_code == 0
    for recipe in RECIPES.values():
        assert recipe.name in result.stdout
        assert recipe.description in result.stdout


def test_show_config_prints_yaml_with_the_overrides() -> None:
    result = tdq("run", "digits-classifier", "epochs=3", "--show-config")
    assert result.exit_code == 0
    config = yaml.safe_load(result.stdout)
    assert (config["epochs"], config["name"]) == (3, "digits-classifier")


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = tdq("run", "digits-classifier", f"output={tmp_path}", "--dry-run")
    assert result.exit_code == 0
    assert f"results  {tmp_path / 'digits-classifier'}" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_run_tells_where_the_results_are(tmp_path: Path) -> None:
    result = tdq("run", "digits-classifier", f"output={tmp_path}", "epochs=1", "batch_size=4500")
    assert result.exit_code == 0, result.output
    assert f"Results are in {tmp_path / 'digits-classifier'}" in result.stdout
    weights = tmp_path / "digits-classifier" / "model.safetensors"
    assert weights.is_file()
    (weights.parent / "notes.txt").write_text("precious")
    result = tdq("run", "digits-classifier", f"output={tmp_path}", "epochs=1")
    assert result.exit_code == 1
    assert "exists. Remove it, or choose another folder: name=..., output=..." in result.stderr
    assert (weights.parent / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits-clasifier"], "Did you mean 'digits-classifier'?"),
        (["run", "digits-classifier", "epochs=0"], "epochs = 0: Input should be greater than 0."),
        (["run", "digits-classifier", "epoch=1"], "Unknown key 'epoch'. Known keys: batch_size,"),
        (["run", "digits-classifier", "epochs"], "Override 'epochs' is not of the form key=value."),
        (["run", "digits-classifier", "output=/dev/null"], "/dev/null is not a folder. Choose"),
        (["run", "digits-classifier", "output=/dev/null", "--dry-run"], "is not a folder. Choose"),
        (["study", "digits", "--output", "/dev/null", "--report"], "--output = '/dev/null': "),
        (["inspect", "no/such.safetensors"], "no/such.safetensors is not a readable safetensors"),
    ],
)
def test_a_mistake_is_one_message_without_traceback(arguments: list[str], message: str) -> None:
    result = tdq(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("where", ["elsewhere/file", None])
def test_a_full_disk_is_one_message(
    where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", where)

    monkeypatch.setattr("tdq_plugin.recipes.digits_classifier._save", fail)
    small = ["epochs=1", "batch_size=4500", f"output={tmp_path}"]
    result = tdq("run", "digits-classifier", *small)
    assert result.exit_code == 1
    path = where or tmp_path / "digits-classifier"
    assert result.stderr.splitlines()[-1] == f"error: [Errno 28] No space left on device: '{path}'"


def test_inspect_shows_each_quantizer(tmp_path: Path) -> None:
    scales = torch.tensor([[0.5, 2.0], [0.125, 2.0], [0.25, 2.0]])
    zero_points = torch.tensor([[7.0, 0.0], [9.0, 0.0], [8.0, 0.0]])
    grids = {"conv.input": activation_grid(4), "product.0.1": activation_grid(8, symmetric=True)}
    path = tmp_path / "scales.safetensors"
    ScaleTable(grids, torch.tensor([1.0, 500.0, 999.0]), scales, zero_points).save(path)
    result = tdq("inspect", path)
    assert result.exit_code == 0
    assert "2 quantizers, 3 timesteps 1 .. 999" in result.stdout
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["conv.input", "4", "0.125", "0.5", "4.00", "7", "..", "9"] in rows
    assert ["product.0.1", "8", "2", "2", "1.00", "0"] in rows


def test_doctor_shows_versions_and_adapters() -> None:
    result = tdq("doctor")
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["torch", torch.__version__] in rows
    assert ["torch_ao", "yes"] in rows


@pytest.mark.parametrize(
    ("exact", "said"), [(True, "add products in 32 bits"), (False, "has no VNNI. OpenVINO's")]
)
def test_doctor_tells_whether_int8_is_exact(
    exact: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "has_32_bit_sums", lambda: exact)
    assert said in tdq("doctor").stdout
