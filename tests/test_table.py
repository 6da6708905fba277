"""The scale table: its checks, and a file that comes back bit-equal or is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tdq_plugin.files
from tdq_plugin.errors import ScaleError, TableFormatError
from tdq_plugin.grid import activation_grid
from tdq_plugin.table import FORMAT_VERSION, ScaleTable, load_table

GRIDS = {"down.0.conv1.input": activation_grid(8), "product.0.1": activation_grid(4, True)}


def table(seed: int = 0, timesteps: int = 50, moving: bool = False) -> ScaleTable:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(timesteps, 2, generator=generator) + 1e-6
    zeros = torch.tensor([[128.0, 0.0]]).repeat(timesteps if moving else 1, 1)
    return ScaleTable(GRIDS, torch.arange(float(timesteps)) * 20, scales, zeros)


def equal(first: ScaleTable, second: ScaleTable) -> bool:
    return list(first.grids.items()) == list(second.grids.items()) and all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("timesteps", "scales", "zero_points")
    )


@pytest.mark.parametrize("moving", [False, True])
def test_a_saved_table_is_bit_equal(tmp_path: Path, moving: bool) -> None:
    path = tmp_path / "new" / "scales.safetensors"
    table(moving=moving).save(path)
    assert equal(load_table(path), table(moving=moving))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_table_of_slices_is_saved(tmp_path: Path) -> None:
    whole = table()
    part = ScaleTable(GRIDS, whole.timesteps[::2], whole.scales[::2], whole.zero_points)
    part.save(tmp_path / "part.safetensors")
    assert equal(load_table(tmp_path / "part.safetensors"), part)


def test_saving_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    for seed in range(2):
        table(seed).save(path)
    assert equal(load_table(path), table(1))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "scales.safetensors"
    table().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TableFormatError, match=r"scales.safetensors is not a readable safetensors"):
        load_table(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TableFormatError, match=r"absent.safetensors is not a readable"):
        load_table(tmp_path / "absent.safetensors")


def test_another_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TableFormatError, match=r"no scale table \(.* {'format': 'pt'}"):
        load_table(tmp_path / "model.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(TableFormatError, match=r"no scale table \(its metadata is {}\)"):
        load_table(tmp_path / "bare.safetensors")


def write(path: Path, tensors: dict[str, Tensor], **changes: str) -> None:
    grids = {"conv": [0, 255, False]}
    metadata = {"format": "tdq-scale-table", "version": "1", "grids": json.dumps(grids)}
    save_file(tensors, path, metadata | changes)


TENSORS = {
    "timesteps": torch.tensor([1.0, 2.0]),
    "scales": torch.ones(2, 1),
    "zero_points": torch.zeros(1, 1),
}


def test_the_format_is_what_this_file_says(tmp_path: Path) -> None:
    write(tmp_path / "scales.safetensors", TENSORS)
    loaded = load_table(tmp_path / "scales.safetensors")
    assert loaded.grids == {"conv": activation_grid(8)}
    assert FORMAT_VERSION == 1


def test_a_newer_version(tmp_path: Path) -> None:
    write(tmp_path / "scales.safetensors", TENSORS, version="2")
    with pytest.raises(TableFormatError, match=r"version '2'; this release reads version 1. Upd"):
        load_table(tmp_path / "scales.safetensors")


@pytest.mark.parametrize(
    "grids", ["{", "[]", '{"conv": 3}', '{"conv": [0]}', '{"conv": [0, 9999, false]}', "null"]
)
def test_metadata_that_describes_no_grids(tmp_path: Path, grids: str) -> None:
    write(tmp_path / "scales.safetensors", TENSORS, grids=grids)
    with pytest.raises((TableFormatError, ScaleError)):
        load_table(tmp_path / "scales.safetensors")


@pytest.mark.parametrize("missing", list(TENSORS))
def test_a_missing_tensor(tmp_path: Path, missing: str) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != missing}
    write(tmp_path / "scales.safetensors", tensors)
    with pytest.raises(TableFormatError, match=f"not a complete scale table: KeyError.*{missing}"):
        load_table(tmp_path / "scales.safetensors")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_not_positive_and_finite(tmp_path: Path, wrong: float) -> None:
    scales = torch.tensor([[1.0], [wrong]])
    write(tmp_path / "scales.safetensors", TENSORS | {"scales": scales})
    with pytest.raises(ScaleError, match=f"A scale of 'conv' is {wrong}; it must be positive"):
        load_table(tmp_path / "scales.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": torch.ones(3, 1)}, r"shape \(3, 1\), but there are 2 timesteps and 1 quant"),
        ({"zero_points": torch.zeros(3, 1)}, r"\(3, 1\); expected \(1, 1\) or \(2, 1\)"),
        ({"zero_points": torch.full((1, 1), 0.5)}, r"'conv' is 0.5; it must be one of the codes 0"),
        ({"zero_points": torch.full((1, 1), 256.0)}, r"256.0; it must be one .* 0 .. 255"),
        ({"timesteps": torch.tensor([2.0, 1.0])}, r"\[2.0, 1.0\]... do not ascend"),
        ({"timesteps": torch.tensor([2.0, 2.0])}, r"do not ascend"),
        ({"timesteps": torch.tensor([2.0, float("nan")])}, r"do not ascend"),
        ({"timesteps": torch.tensor([[1.0], [2.0]])}, r"do not ascend"),
        ({"scales": torch.ones(2, 1).half()}, "The scales are torch.float16; a table is float32"),
        ({"timesteps": torch.tensor([1, 2])}, "The timesteps are torch.int64; a table is float32"),
        ({"timesteps": torch.ones(0), "scales": torch.ones(0, 1)}, r"do not ascend"),
    ],
)
def test_values_that_are_no_table(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ScaleError, match=message):
        ScaleTable({"conv": activation_grid(8)}, **(TENSORS | changes))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scales.safetensors"
    table(0).save(path)

    def no_space(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tdq_plugin.files, "_flush_to_disk", no_space)
    with pytest.raises(OSError, match="No space left"):
        table(1).save(path)
    assert equal(load_table(path), table(0))
    assert list(tmp_path.iterdir()) == [path]


SAVE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_table import table
tables = [table(seed, timesteps=20_000) for seed in (0, 1)]
while True:
    for each in tables:
        each.save(sys.argv[2])
        print(flush=True)
"""


def test_a_kill_leaves_the_old_or_the_new_table(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    expected = [table(seed, timesteps=20_000) for seed in (0, 1)]
    interrupted = 0
    for moment in range(3):
        command = [sys.executable, "-c", SAVE_FOREVER, str(Path(__file__).parent), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.0007 * moment)
            os.kill(child.pid, signal.SIGKILL)
        loaded = load_table(path)
        assert any(equal(loaded, candidate) for candidate in expected)
        interrupted += len(list(tmp_path.iterdir())) > 1
    # At least one kill must have come in the middle of a write, else this test proves nothing.
    assert interrupted
