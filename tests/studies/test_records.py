"""What is kept of a finished run, and reports that are made from nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import RECIPES
from tdq_plugin.studies.records import load_record, portable, save_record
from tdq_plugin.studies.results import FinishedRun, ScaleHistory
from tdq_plugin.studies.run_folder import read_report

METHODS = {"TDQ": ("tdq", "int8", 0.25, 0.5), "dynamic": ("dynamic", "fake", 0.75, 1.0)}


def test_a_record_has_all_that_reports_show(
    make_run: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    scales = {0: torch.rand(3, 2), 400: torch.rand(3, 2)}
    history = ScaleHistory(["a", "b"], torch.tensor([0.0, 8.0, 16.0]), scales)
    run = replace(make_run("one", "W4A4", 3, METHODS), scales=history)
    save_record(tmp_path / "one.safetensors", run)
    record = load_record(tmp_path / "one.safetensors")
    assert record.name == "one"
    assert (record.config, record.report) == (portable(run.config), run.report)
    assert record.curves == run.curves
    assert record.images.keys() == {"float32", "tdq.int8", "dynamic.fake"}
    for name, images in record.images.items():
        torch.testing.assert_close(images, run.images[name], rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert record.scales is not None
    assert record.scales.layers == history.layers
    assert list(record.scales.scales) == [0, 400]
    assert torch.equal(record.scales.scales[400], scales[400])


def test_a_run_that_has_kept_nothing_but_numbers(
    make_run: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    run = replace(make_run("one", "W4A4", 3, METHODS), curves={}, images={})
    save_record(tmp_path / "one.safetensors", run)
    record = load_record(tmp_path / "one.safetensors")
    assert (record.report, record.curves, record.images) == (run.report, {}, {})
    assert record.scales is None


def test_a_command_names_models_of_the_package_as_a_checkout_does(
    make_run: Callable[..., FinishedRun],
) -> None:
    command = make_run("one", "W4A4", 3, METHODS).report["command"]
    assert command == "tdq run demo seed=3 model=recipes/assets/mine"


def test_a_record_agrees_with_its_run(make_run: Callable[..., FinishedRun], tmp_path: Path) -> None:
    """Else every report would write it anew."""
    save_record(tmp_path / "one.safetensors", make_run("one", "W4A4", 3, METHODS))
    record = load_record(tmp_path / "one.safetensors")
    assert read_report(tmp_path / "runs" / "one") == record.report


def test_a_configuration_keeps_no_path_of_this_machine() -> None:
    config = {
        "model": str(RECIPES / "assets" / "ddim-digits"),
        "output": "/data/runs",
        "trained": "/data/runs/first",
        "name": "/data/runs-of-mine",
    }
    assert portable(config) == {
        "model": "{recipes}/assets/ddim-digits",
        "trained": "{runs}/first",
        "name": "/data/runs-of-mine",
    }


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_file_that_is_no_record(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, path, {"format": "tdq-scale-table"})
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"one\.safetensors is no record of a run: .* Remove it"):
        load_record(path)


def test_a_record_of_another_version(make_run: Callable[..., FinishedRun], tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_record(path, make_run("one", "W4A4", 3, METHODS))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"x": torch.zeros(1)}, path, {**metadata, "version": "2"})
    with pytest.raises(ConfigError, match=r"that this release reads: .*'2'.* Update tdq-plugin"):
        load_record(path)
