"""Figures of runs that leave more than rows: layers over time, scales over training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tdq_plugin.grid import activation_grid
from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.studies.definition import Part
from tdq_plugin.studies.figures import FIGURES, labelled
from tdq_plugin.studies.results import FinishedRun, Group, Method, groups_of
from tdq_plugin.studies.run_folder import load_run
from tdq_plugin.study import temporal_dynamics
from tdq_plugin.table import ScaleTable

PNG = b"\x89PNG"


def layers_run(folder: Path) -> FinishedRun:
    timesteps = torch.tensor([0.0, 250.0, 500.0, 750.0])
    still, moving = torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    layers = {
        name: {
            "low": (-values).tolist(),
            "high": values.tolist(),
            "deviation": values.tolist(),
            "static_error": [0.2] * 4,
            "timestep_error": [0.1] * 4,
        }
        for name, values in {"still": still, "moving": moving}.items()
    }
    deviations = torch.stack([still, moving])
    report = {
        "command": "tdq run demo",
        "bits": "W4A4",
        "timesteps": timesteps.tolist(),
        "layers": layers,
        "temporal_dynamics": temporal_dynamics(timesteps, deviations, deviations).as_dict(),
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.json").write_text("{}")
    return load_run(folder)


def test_ranges_and_their_correlation(tmp_path: Path) -> None:
    run = layers_run(tmp_path / "ranges")
    bands, correlations = FIGURES["ranges"]([], [run])
    (errors,) = FIGURES["rounding_errors"]([], [run])
    assert all(picture.png.startswith(PNG) for picture in (bands, correlations, errors))
    assert "Over 0.5 in 50% of the layers" in correlations.caption
    assert "is 2.50 in the median layer" in correlations.caption


def test_the_scales_during_training_come_from_the_run(
    make_run: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    run = make_run("trained", "W4A4", 0, {"TDQ": ("tdq", "fake", 0.1, 0.2)})
    assert FIGURES["training"]([], [run]) == []
    folder = tmp_path / "runs" / "trained"
    grids = {"a": activation_grid(4), "b": activation_grid(4)}
    for step in (0, 10):
        scales = torch.tensor([[0.1, 0.1], [0.1 + step, 0.1]])
        table = ScaleTable(grids, torch.tensor([0.0, 500.0]), scales, torch.zeros(1, 2))
        table.save(folder / "scales" / "tdq" / f"{step}.safetensors")
    (picture,) = FIGURES["training"]([], [load_run(folder)])
    assert picture.png.startswith(PNG)
    assert "The 2 layers" in picture.caption


def test_quality_over_the_number_of_steps(make_run: Callable[..., FinishedRun]) -> None:
    runs = []
    for steps in (100, 10):
        run = make_run(f"{steps}", "W4A4", 0, {"TDQ": ("tdq", "fake", 0.1, 0.2)})
        runs.append(replace(run, config={**run.config, "steps": steps}))
    values = {"title": "x", "question": "x", "paper": "x", "group_by": "steps"}
    part = Part.model_validate({**values, "runs": [{"recipe": "any", "name": "any"}]})
    groups = groups_of(part, runs)
    assert [group.name for group in groups] == ["100", "10"]
    distance, error = FIGURES["steps"](groups, runs)
    assert distance.png.startswith(PNG)
    assert distance.png != error.png


def test_images_of_the_float_model_come_first(
    make_run: Callable[..., FinishedRun], pipeline: Path
) -> None:
    run = make_run("one", "W4A4", 0, {"TDQ": ("tdq", "fake", 0.1, 0.2)})
    model = load_float_model(pipeline)
    noise = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(9))
    expected = sample(model.denoise, scheduler_with(model.scheduler, 2), noise)
    torch.testing.assert_close(run.images[run.FLOAT], expected, rtol=1e-4, atol=1e-4)
    (picture,) = FIGURES["samples"]([Group("W4A4", (run,))], [run])
    assert picture.png.startswith(PNG)


def test_what_no_run_has_kept_is_not_drawn(make_run: Callable[..., FinishedRun]) -> None:
    methods = {"TDQ": ("tdq", "int8", 0.1, 0.2)}
    first, second = (make_run(f"{seed}", "W4A4", seed, methods) for seed in (0, 1))
    first = replace(first, curves={}, images={})
    assert FIGURES["errors"]([Group("W4A4", (first,))], [first]) == []
    assert FIGURES["samples"]([Group("W4A4", (first,))], [first]) == []
    both = [Group("W4A4", (first, second))]
    assert len(FIGURES["errors"](both, [first, second])) == 1
    assert len(FIGURES["samples"](both, [first, second])) == 1


def test_ratios_are_to_the_same_draw_of_static_lsq(make_run: Callable[..., FinishedRun]) -> None:
    methods = {"TDQ": ("tdq", "int8", 0.1, 0.2), "static LSQ": ("lsq", "int8", 0.2, 0.2)}
    runs = [make_run(f"{seed}", "W4A4", seed, methods) for seed in (0, 1)]
    (picture,) = FIGURES["error_ratios"]([Group("W4A4", tuple(runs))], runs)
    assert picture.png.startswith(PNG)

    def with_twice_the_error_of(*names: str) -> bytes:
        curves = {
            name: curve._replace(errors=[2 * error for error in curve.errors])
            for name, curve in runs[1].curves.items()
            if name in names
        }
        other = replace(runs[1], curves={**runs[1].curves, **curves})
        (picture,) = FIGURES["error_ratios"]([Group("W4A4", (runs[0], other))], runs)
        return picture.png

    assert with_twice_the_error_of("tdq.int8", "lsq.int8") == picture.png
    assert with_twice_the_error_of("tdq.int8") != picture.png


def test_ratios_need_static_lsq(make_run: Callable[..., FinishedRun]) -> None:
    run = make_run("one", "W4A4", 0, {"TDQ": ("tdq", "int8", 0.1, 0.2)})
    assert FIGURES["error_ratios"]([Group("W4A4", (run,))], [run]) == []


def test_no_figure_needs_a_finished_run_or_one_of_its_kind(
    make_run: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    layers = layers_run(tmp_path / "ranges")
    rows = make_run("rows", "W4A4", 0, {"TDQ": ("tdq", "int8", 0.1, None)})
    rows = replace(rows, report={**rows.report, "noise_floor": {}}, curves={}, images={})
    for make in FIGURES.values():
        assert make([], []) == []
    kinds = {"ranges", "rounding_errors"}
    for name, make in FIGURES.items():
        assert make([], [layers] if name not in kinds else [rows]) == []
    for name in FIGURES.keys() - kinds - {"steps"}:
        assert FIGURES[name]([Group("W4A4", (rows,))], [layers, rows]) == []
    mixed = [Group("W4A4", (rows,))]
    assert len(FIGURES["ranges"](mixed, [rows, layers])) == 2


def test_a_distance_without_a_noise_floor(make_run: Callable[..., FinishedRun]) -> None:
    run = make_run("one", "W4A4", 0, {"TDQ": ("tdq", "int8", 0.1, 0.2)})
    with_floor, without = (
        FIGURES["distances"]([Group("W4A4", (one,))], [one])
        for one in (run, replace(run, report={**run.report, "noise_floor": {}}))
    )
    assert with_floor[0].png != without[0].png


def test_what_is_simulated_is_not_decided_by_the_order() -> None:
    int8, fake, alone = (
        Method("TDQ", "int8", {}), Method("TDQ", "fake", {}), Method("PTQ4DM", "fake", {})
    )  # fmt: skip
    for methods in ([int8, fake, alone], [fake, alone, int8]):
        labels = labelled(methods)
        assert (labels["TDQ"], labels["TDQ, simulated"]) == (int8, fake)
        assert labels["PTQ4DM"] is alone
