"""The PTQ recipe from configuration to report, on a tiny DDIM with random weights."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import tdq_plugin as tdq
from tdq_plugin.deploy import load_int8, lower_to_int8
from tdq_plugin.errors import ConfigError, LookupRuleError
from tdq_plugin.observe import Observation
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.calibration import pooled_as_ptq4dm
from tdq_plugin.recipes.evaluation import denoiser
from tdq_plugin.recipes.evaluation.denoiser import Evaluator
from tdq_plugin.recipes.evaluation.sampling import image_shape, sample, scheduler_with
from tdq_plugin.recipes.frameworks import load_framework, torch_ao
from tdq_plugin.recipes.ptq import quantize as ptq_quantize
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.schema import METRICS, validate_report
from tdq_plugin.weights import WeightQuantizer

pytestmark = pytest.mark.whole

INT8, FAKE = ["minmax", "lsq", "tdq"], ["ptq4dm", "lsq", "tdq", "dynamic"]
SMALL = [
    "threads=1",
    "bits=W4A8",
    "steps=4",
    f"int8_methods=[{', '.join(INT8)}]",
    f"fake_methods=[{', '.join(FAKE)}]",
    "calibration.images=4",
    "reconstruction.iterations=2",
    "reconstruction.batch_size=4",
    "evaluation.samples=100",
    "evaluation.trajectories=16",
    "correction.methods=[tdq]",
    "correction.images=8",
    "latency_rounds=2",
]
SEEN, UNSEEN = [0, 250, 500, 750], [125, 375, 625, 875]
PTQ = find_recipe("ddim-digits-ptq")


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return PTQ.run(PTQ.configure(overrides))


def test_the_report_has_a_row_for_every_method_and_execution(report: dict[str, Any]) -> None:
    validate_report(report)
    rows = {(row["method"], row["execution"]) for row in report["rows"]}
    expected = {(METHODS[name].title, "int8") for name in INT8}
    expected |= {(METHODS[name].title, "fake") for name in FAKE}
    expected |= {("TDQ, corrected", "int8")}
    assert rows == expected | {("float32", "float32")}
    assert len(report["rows"]) == len(rows)
    assert set(report["methods"]) == {METHODS[name].title for name in (*INT8, *FAKE)}
    for row in report["rows"][1:]:
        assert row["samples"] == 100
        assert "digit classifier" in row["feature_space"]
        known = {metric for metric in METRICS if row[metric] is not None}
        assert all(row[metric] > 0 for metric in known)
        # The correction belongs to the sampler's timesteps.
        corrected = row["method"].endswith("corrected")
        assert set(METRICS) - known == ({"trajectory_mse_unseen"} if corrected else set())


def test_the_report_tells_where_its_numbers_come_from(report: dict[str, Any]) -> None:
    assert (report["recipe"], report["seed"], report["bits"]) == ("ddim-digits-ptq", 0, "W4A8")
    assert {"python", "torch", "diffusers", "tdq-plugin"} <= set(report["versions"])
    assert report["noise_floor"]["frechet_distance_to_float"] > 0
    dynamics = report["temporal_dynamics"]
    assert dynamics["timesteps"] == 4 * len(PTQ.configure().calibration.shifts)
    assert len(dynamics["std_ratio"]["per_layer"]) == dynamics["layers"]
    assert dynamics["std_ratio"]["median"] >= 1


def test_the_command_of_the_report_gives_the_same_configuration(
    report: dict[str, Any], overrides: list[str]
) -> None:
    program, verb, name, *repeated = shlex.split(report["command"])
    assert (program, verb) == ("tdq", "run")
    again = find_recipe(name).configure([*repeated, overrides[-1]])
    assert again == PTQ.configure(overrides)


def test_latency_is_relative_to_static_int8(report: dict[str, Any]) -> None:
    latency = report["latency"]
    assert latency["static_int8"] == 1.0
    assert min(latency[name] for name in ("float32", "tdq_int8", "dynamic_int8")) > 0
    assert latency["unit"] == "ratio to static_int8, median of paired runs"


def test_size_is_that_of_the_saved_model(
    report: dict[str, Any], finished: Path, unet: UNet2DModel
) -> None:
    saved = [file.stat().st_size for file in (finished / "model").rglob("*") if file.is_file()]
    parameters = sum(p.numel() for p in unet.parameters())
    assert report["size_bytes"] == {"float32": 4 * parameters, "int8": sum(saved)}


def test_the_page_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(references) >= 3
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not re.search(r"<link|<script|url\(|@import", page)


@pytest.mark.parametrize("name", ["lsq", "tdq"])
def test_int8_and_fake_quantization_agree(report: dict[str, Any], name: str) -> None:
    int8, fake = (
        next(
            row
            for row in report["rows"]
            if (row["method"], row["execution"]) == (METHODS[name].title, execution)
        )
        for execution in ("int8", "fake")
    )
    # Not equal: where float rounding moves one activation to the next code, an image's output
    # changes by about 1 %. The mean over 16 images and several timesteps evens this out.
    for metric in ("trajectory_mse", "trajectory_mse_unseen"):
        assert int8[metric] == pytest.approx(fake[metric], rel=0.01)


def test_the_saved_model_is_the_lowered_one(finished: Path, unet: UNet2DModel) -> None:
    x, t = torch.randn(3, *image_shape(unet)), torch.tensor([0, 250, 750])
    prepared = load_framework("torch_ao").prepare(unet, CalibrationSet(x, t), Bits(4, 8))
    state = RunState(finished, json.loads((finished / "config.json").read_text()))
    lowered = lower_to_int8(MethodStates(state, prepared).load("tdq"))
    folder = finished / "model"
    fresh = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    loaded = load_int8(folder / "int8", fresh, (x, t))
    with torch.no_grad():
        assert torch.equal(loaded(x, t), lowered(x, t))
        for timestep in SEEN:
            assert torch.equal(loaded(x, timestep), lowered(x, timestep))


def test_trained_methods_round_weights_themselves_and_others_do_not(
    finished: Path, unet: UNet2DModel
) -> None:
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 250])
    model = load_framework("torch_ao").prepare(unet, CalibrationSet(x, t), Bits(4, 8))
    original = model.conv_in.weight.clone()
    state = RunState(finished, json.loads((finished / "config.json").read_text()))
    states = MethodStates(state, model)
    weights = {name: states.load(name).conv_in.weight.clone() for name in INT8}
    assert torch.equal(weights["minmax"], original)
    assert not torch.equal(weights["lsq"], original)
    assert not torch.equal(weights["tdq"], original)
    # What was learned is a code: rounding it again changes nothing.
    states.load("tdq")
    assert torch.equal(model.conv_in.weight_fake_quant(weights["tdq"]), weights["tdq"])


def test_ptq4dm_has_weights_of_its_own_and_leaves_the_others_theirs(
    finished: Path, unet: UNet2DModel
) -> None:
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 250])
    model = load_framework("torch_ao").prepare(unet, CalibrationSet(x, t), Bits(4, 8))
    quantizers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, WeightQuantizer)
    }
    before = {path: (q.grid, q.scale.detach().clone()) for path, q in quantizers.items()}
    state = RunState(finished, json.loads((finished / "config.json").read_text()))
    states = MethodStates(state, model)
    states.load("ptq4dm")
    for path, quantizer in quantizers.items():
        weight = model.get_parameter(path.replace("weight_fake_quant", "weight")).detach()
        low, high = weight.flatten(1).aminmax(dim=1)
        codes = quantizer.grid.quant_max - quantizer.grid.quant_min
        expected = (high.clamp(min=0) - low.clamp(max=0)) / codes
        torch.testing.assert_close(quantizer.scale.detach(), expected)
    assert any(quantizer.zero_point.any() for quantizer in quantizers.values())
    states.load("lsq")
    for path, (grid, scale) in before.items():
        assert quantizers[path].grid == grid
        assert torch.equal(quantizers[path].scale.detach(), scale)
        assert not quantizers[path].zero_point.any()


@pytest.mark.parametrize("adapter", ["brevitas", "nncf", "pt2e"])
def test_ptq4dm_needs_a_framework_that_leaves_weights_alone(
    adapter: str, overrides: list[str]
) -> None:
    pytest.importorskip({"pt2e": "torchao"}.get(adapter, adapter))
    config = PTQ.configure([*overrides, f"adapter={adapter}", "name=other"])
    with pytest.raises(
        ConfigError, match=rf"^adapter = '{adapter}' sets .*\['ptq4dm'\] have .* adapter=torch_ao"
    ):
        PTQ.plan(config)


def test_ptq4dm_draws_timesteps_in_the_middle_more_often() -> None:
    timesteps = torch.tensor([0.0, 200.0, 400.0, 1000.0])
    values = timesteps[:, None].repeat(1, 1000)
    limits = torch.stack([timesteps - 1, timesteps + 1], dim=1)
    pooled = pooled_as_ptq4dm(Observation(timesteps, limits, torch.zeros(4), values))
    counts = [int((pooled.values == t).sum()) for t in timesteps]
    # exp(-(x - 0.4)^2 / (2 0.25^2)) at 0, 0.2, 0.4 and 1.
    assert counts == [278, 726, 1000, 56]
    assert pooled.limits.tolist() == [[-1, 1001]]


def test_a_framework_that_rounds_weights_itself_cannot_learn_it(overrides: list[str]) -> None:
    config = PTQ.configure([*overrides, "reconstruction.learn_rounding=true"])
    assert config.learns_rounding(load_framework("torch_ao"))
    rounds_itself = SimpleNamespace(learns_rounding=False)
    with pytest.raises(ConfigError, match=r"torch_ao rounds weights itself.*false or null"):
        config.learns_rounding(rounds_itself)
    assert not PTQ.configure(overrides).learns_rounding(rounds_itself)


def test_the_saved_model_has_the_timesteps_of_its_sampler(finished: Path) -> None:
    evaluated = tdq.load_table(finished / "tables" / "tdq.safetensors")
    assert evaluated.timesteps.tolist() == sorted(SEEN + UNSEEN)
    folder = finished / "model"
    fresh = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    x = torch.randn(2, *image_shape(fresh))
    model = load_int8(folder / "int8", fresh, (x, torch.tensor([0, 250])))
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert sample(model, scheduler_with(scheduler, 4), x).isfinite().all()
    with torch.no_grad(), pytest.raises(LookupRuleError, match="125"):
        model(x, 125)


def test_the_saved_model_comes_with_its_correction(finished: Path) -> None:
    correction = tdq.load_correction(finished / "model" / "output_correction.safetensors")
    assert correction.timesteps.tolist() == SEEN
    assert correction.offsets.shape[1:] == (1, 16, 16)


def test_an_interrupted_run_goes_on(
    overrides: list[str], report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PTQ.configure([*overrides, "name=interrupted"])
    with monkeypatch.context() as patch:
        trained = count_calls(patch, ptq_quantize, "apply_method", interrupt_at=4)
        with pytest.raises(KeyboardInterrupt):
            PTQ.run(config)
    begun = ["MinMax", "PTQ4DM", "static LSQ", "TDQ"]
    assert [call[1].title for call in trained] == begun
    with monkeypatch.context() as patch:
        trained = count_calls(patch, ptq_quantize, "apply_method")
        count_calls(patch, denoiser, "sample", interrupt_at=5)
        with pytest.raises(KeyboardInterrupt):
            PTQ.run(config)
    assert [call[1].title for call in trained] == ["TDQ", "dynamic"]
    with monkeypatch.context() as patch:
        trained = count_calls(patch, ptq_quantize, "apply_method")
        drawn = count_calls(patch, denoiser, "sample")
        folder = PTQ.run(config)
    assert (len(trained), len(drawn)) == (0, 4)
    assert json.loads((folder / "report.json").read_text())["rows"] == report["rows"]


def count_calls(
    patch: pytest.MonkeyPatch, module: Any, name: str, interrupt_at: int | None = None
) -> list[tuple[Any, ...]]:
    """Note the arguments of a function's calls, and interrupt one of them, counted from 1."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(module, name, counted)
    return calls


def test_a_kill_while_saving_leaves_the_rows(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    count_calls(monkeypatch, torch_ao, "save_int8", interrupt_at=1)
    with pytest.raises(KeyboardInterrupt):
        PTQ.run(PTQ.configure(overrides))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_folder_belongs_to_one_configuration(finished: Path, overrides: list[str]) -> None:
    other = PTQ.configure([*overrides, f"name={finished.name}", "reconstruction.iterations=3"])
    for start in (PTQ.plan, PTQ.run):
        with pytest.raises(
            ConfigError,
            match=r"holds a run with other settings: name=.*, reconstruction\.iterations=2, not 3",
        ):
            start(other)


def test_the_float_model_has_no_error(unet: UNet2DModel) -> None:
    scheduler = DDIMScheduler()
    noise = torch.randn(8, *image_shape(unet), generator=torch.Generator().manual_seed(0))

    def denoiser(x: torch.Tensor, t: Any) -> torch.Tensor:
        return unet(x, t, return_dict=False)[0]

    ordinary = scheduler_with(scheduler, 4)
    images = sample(denoiser, ordinary, noise, batch_size=8)
    evaluator = Evaluator(
        denoiser,
        ordinary,
        scheduler_with(scheduler, 4, offset=125),
        noise=noise,
        images=images,
        other_images=-images,
        trajectory_noise=noise[:2],
        features=lambda batch: batch.flatten(1)[:, :4],
        data=noise,
    )
    assert evaluator.seen_trajectories.timesteps.tolist() == SEEN[::-1]
    assert evaluator.unseen_trajectories.timesteps.tolist() == UNSEEN[::-1]
    result = evaluator.evaluate(denoiser)
    assert result.timesteps == SEEN[::-1]
    errors = [metric for metric in METRICS if "mse" in metric]
    assert {result.metrics[metric] for metric in errors} == {0.0}
    wrong = evaluator.evaluate(lambda x, t: denoiser(x, t) + (t == 0))
    assert wrong.metrics["t0_mse"] == pytest.approx(1.0)
    assert wrong.metrics["trajectory_mse"] == 0.0


def test_bits_and_steps_can_be_chosen() -> None:
    config = PTQ.configure(["bits=W4A4", "steps=50"])
    assert (config.widths, config.steps) == (Bits(4, 4), 50)
    assert config.run_folder == Path("runs/ddim-digits-ptq-torch_ao-W4A4-50steps-seed0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=W9A9", r"^bits = 'W9A9': write bits of weights and activations as W8A4"),
        ("steps=501", r"^steps = 501: Input should be less than or equal to 500"),
        ("latency_rounds=1", r"^latency_rounds = 1: Input should be greater than or equal to 2"),
        (
            "name=x-{draw}",
            r"^name = 'x-\{draw\}': only \{seed\}, \{adapter\}, \{bits\}, \{steps\} are",
        ),
        ("int8_methods=[tdq, tdk]", r"^int8_methods = .*\['tdk'\] are no methods; choose .*'lsq'"),
        ("fake_methods=[tdk]", r"^fake_methods = \['tdk'\]: .*are no methods"),
        ("training.tdk={learning_rate: 1}", r"^training\.tdk\.weight_at_zero is missing"),
        ("training.tdq.learning_rate=0", r"^training\.tdq\.learning_rate = 0: .*greater than 0"),
        ("training={}", r"^training = .*'lsq'.* are trained and have no entry"),
        ("training.tdk={learning_rate: 1, weight_at_zero: 1}", r"^training = .*'tdk'.* no methods"),
        ("calibration.shifts=[0, 0.5]", r"^calibration = .*0\.5 later are those of the test"),
        ("calibration.shifts=[1]", r"^calibration\.shifts\.0 = 1: Input should be less than 1"),
        ("calibration.images=3", r"^calibration = .*fewer images than shifts"),
        ("int8_methods=[lsq]", r"^int8_methods = \['lsq'\]: lsq and tdq are needed.*$"),
        ("int8_methods=[lsq, tdq, dynamic]", r"\]: \['dynamic'\] have no table .* fake_methods\.$"),
        (
            "int8_methods=[lsq, tdq, ptq4dm]",
            r"\]: \['ptq4dm'\] have weights with zero points, .* fake_methods\.$",
        ),
        ("calibration.images=0", r"^calibration\.images = 0: Input should be greater than 0"),
        ("reconstruction.granularity=x", r"^reconstruction\.granularity = 'x': Input should be"),
        (
            "correction.methods=[dynamic]",
            r"^correction = .*\['dynamic'\] are not among int8_methods",
        ),
        ("evaluation.seed=0", r"^evaluation = .*calibration would see the noise of the test"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = PTQ.configure([override]).run_folder


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = PTQ.configure([f"model={tmp_path / 'none'}", f"output={tmp_path / 'runs'}"])
    for start in (PTQ.plan, PTQ.run):
        with pytest.raises(ConfigError, match=r"none' is neither the folder of a saved"):
            start(config)
    assert not config.run_folder.exists()


def test_dry_run_prints_the_plan(overrides: list[str]) -> None:
    config = PTQ.configure([*overrides, "name=planned"])
    plan = str(PTQ.plan(config))
    for expected in (
        r"quantizers +\d+ activations, W4A8, by torch_ao, rounding of weights learned",
        r"methods +MinMax, PTQ4DM, static LSQ, TDQ, dynamic",
        r"calibration +16 samples of 4 trajectories of 4 DDIM steps",
        r"steps +2 in batches of 4 for each of: static LSQ, TDQ",
        r"memory +\d+\.\d+ GB: ",
        r"evaluation +100 images by 4 DDIM steps in each of 8 rows",
        r"results +.*planned",
    ):
        assert re.search(expected, plan)
    assert not config.run_folder.exists()
