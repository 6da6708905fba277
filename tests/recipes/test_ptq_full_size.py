"""The full-size PTQ recipes: tiny from end to end, after a kill, and their plans."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import tdq_plugin as tdq
from tdq_plugin.deploy import load_int8
from tdq_plugin.errors import CalibrationError, ConfigError, TableMismatchError
from tdq_plugin.export_cli import architecture
from tdq_plugin.recipes import correction, find_recipe
from tdq_plugin.recipes.correction import row_title
from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.ptq import full_size as ptq_full_size
from tdq_plugin.recipes.ptq import quantize as ptq_quantize
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.weights import WeightQuantizer

pytestmark = pytest.mark.whole

CIFAR, CHURCHES = find_recipe("ddim-cifar10-ptq"), find_recipe("ldm-churches-ptq")
DIGITS = ["data={source: digits}", "evaluation.features=digits"]
SMALL = [
    *DIGITS,
    "threads=1",
    "batch_size=4",
    "methods=[ptq4dm, lsq, learned_table, tdq, dynamic]",
    "weights=adaround",
    "calibration.images=4",
    "reconstruction.iterations=2",
    "reconstruction.batch_size=4",
    "correction.methods=[lsq]",
    "correction.images=4",
    "evaluation.samples=100",
    "evaluation.steps=2",
]
ROWS = ["float32", "ptq4dm", "lsq", "lsq_corrected", "learned_table", "tdq", "dynamic"]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return CIFAR.run(CIFAR.configure([*overrides, "name=whole"]))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_there_is_a_row_for_the_float_model_and_every_method(finished: Path) -> None:
    found = results(finished)
    assert [row["model"] for row in found["rows"]] == ROWS
    assert all(row["frechet_distance"] > 0 for row in found["rows"])
    assert all(row["inception_score"] >= 1 for row in found["rows"])
    assert "not the FID" in found["feature_space"]
    distances = [row["frechet_distance"] for row in found["rows"]]
    assert len(set(distances)) == len(distances)


def test_the_command_gives_the_same_configuration(finished: Path, overrides: list[str]) -> None:
    _, _, name, *repeated = shlex.split(results(finished)["command"])
    again = find_recipe(name).configure([*repeated, overrides[-1]])
    assert again == CIFAR.configure([*overrides, "name=whole"])


def test_the_pages_show_the_same_numbers(finished: Path) -> None:
    markdown = (finished / "results.md").read_text(encoding="utf-8")
    page = (finished / "results.html").read_text(encoding="utf-8")
    for row in results(finished)["rows"][1:]:
        title, distance = row_title(METHODS, row["model"]), f"{row['frechet_distance']:.3g}"
        assert re.search(rf"\| {title} \| {distance}", markdown)
        assert f"<th>{title}</th><td>{distance}" in page
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(references) == 1
    assert references[0].startswith("data:image/png")


def test_the_saved_models_draw(finished: Path) -> None:
    saved = sorted(path.name for path in (finished / "models").iterdir())
    assert saved == ["learned_table", "lsq", "tdq"]
    folder = finished / "models" / "tdq"
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    integer = load_int8(folder / "int8", unet, (x, torch.tensor([0, 500])))
    scheduler = scheduler_with(DDIMScheduler.from_pretrained(folder / "scheduler"), 2)
    assert sample(integer, scheduler, x).isfinite().all()


def test_a_corrected_model_is_saved_with_its_correction(finished: Path) -> None:
    found = sorted((finished / "models").rglob("output_correction.safetensors"))
    assert [path.parent.name for path in found] == ["lsq"]
    correction = tdq.load_correction(found[0])
    assert correction.timesteps.tolist() == [0, 500]
    assert correction.offsets.shape == (2, 1, 16, 16)
    assert correction.offsets.any()
    images = ptq_full_size.SampleRows(finished / "rows", CIFAR.configure(SMALL).evaluation).images
    assert not torch.equal(images("lsq"), images("lsq_corrected"))
    page = (finished / "results.html").read_text(encoding="utf-8")
    assert "<th>static LSQ, corrected</th>" in page
    assert "after every step, the mean of its samples is that of the float model" in page


def test_a_restart_repeats_nothing(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CIFAR.configure([*overrides, "name=interrupted", "methods=[lsq, learned_table]"])
    started: list[str] = []

    def interrupt_at(patch: pytest.MonkeyPatch, module: Any, name: str, position: int) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            started.append(name)
            if started.count(name) == position:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(module, name, counted)

    with monkeypatch.context() as patch:
        interrupt_at(patch, ptq_quantize, "train", 2)
        with pytest.raises(KeyboardInterrupt):
            CIFAR.run(config)
    assert started == ["train", "train"]
    started.clear()
    with monkeypatch.context() as patch:
        interrupt_at(patch, ptq_full_size, "collect", 1)
        interrupt_at(patch, ptq_quantize, "train", 9)
        interrupt_at(patch, ptq_full_size.SampleRows, "measure", 3)
        with pytest.raises(KeyboardInterrupt):
            CIFAR.run(config)
    assert started == ["train", "measure", "measure", "measure"]
    whole = {row["model"]: row for row in results(finished)["rows"]}
    with monkeypatch.context() as patch:
        interrupt_at(patch, correction, "fit_output_correction", 1)
        for row in results(CIFAR.run(config))["rows"]:
            assert row == whole[row["model"]]


def test_latents_are_decoded_and_heads_are_set(tiny_latent_pipeline: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"model={tiny_latent_pipeline}", f"output={tmp_path}", "methods=[lsq]"]
    config = CHURCHES.configure([*settings, "attention_heads=4", "weights=mse"])
    run = ptq_full_size.begin(config)
    assert run.model.unet.mid_block.attentions[0].heads == 4
    folder = CHURCHES.run(config)
    rows = results(folder)["rows"]
    assert [row["model"] for row in rows] == ["float32", "lsq", "lsq_corrected"]
    assert all(set(row) == {"model", "frechet_distance"} for row in rows)
    assert len({row["frechet_distance"] for row in rows}) == 3
    samples = ptq_full_size.SampleRows(folder / "rows", config.evaluation).images("lsq")
    assert samples.shape == (16, 1, 16, 16)
    saved, example = folder / "models" / "lsq", (torch.zeros(2, 2, 8, 8), torch.zeros(2))
    of_the_config = UNet2DModel.from_config(UNet2DModel.load_config(saved / "unet"))
    with pytest.raises(TableMismatchError, match=r"have \[2\] heads, those of the saved model 4"):
        load_int8(saved / "int8", of_the_config, example)
    unet = architecture(saved)
    assert unet.mid_block.attentions[0].heads == 4
    load_int8(saved / "int8", unet, example)
    kept = ptq_full_size.calibration_data(run)
    assert kept.samples.shape[1:] == (2, 8, 8)


def test_the_choice_of_weights(tiny_pipeline: Path, tmp_path: Path) -> None:
    def layer(choice: str) -> torch.nn.Module:
        settings = [*SMALL, f"model={tiny_pipeline}", f"output={tmp_path}", f"name={choice}"]
        config = CIFAR.configure([*settings, f"weights={choice}", "bits=W4A8"])
        run = ptq_full_size.begin(config)
        quantized = run.framework.prepare(
            run.model.unet, ptq_full_size.calibration_data(run), config.widths
        )
        ptq_full_size.set_weight_ranges(quantized, config.weights)
        return quantized.get_submodule("mid_block.resnets.0.conv1")

    def scales(choice: str) -> torch.Tensor:
        chosen = layer(choice)
        assert isinstance(chosen.weight_fake_quant, WeightQuantizer)
        weight = chosen.weight.detach().flatten(1)
        covering = torch.maximum(weight.amax(1) / 7, -weight.amin(1) / 8)
        return chosen.weight_fake_quant.scale.detach() / covering

    assert torch.allclose(scales("minmax"), torch.ones(()))
    assert scales("mse").mean() < 0.95
    assert torch.equal(scales("mse"), scales("native"))
    asymmetric = layer("asymmetric_minmax")
    assert isinstance(asymmetric.weight_fake_quant, WeightQuantizer)
    weight = asymmetric.weight.detach().flatten(1)
    expected = (weight.amax(1) - weight.amin(1)) / 15
    torch.testing.assert_close(asymmetric.weight_fake_quant.scale.detach(), expected)


def test_a_plan_says_which_models_are_saved(overrides: list[str], tmp_path: Path) -> None:
    def line(methods: str, *more: str) -> str:
        settings = [*overrides, f"output={tmp_path}", f"methods={methods}", *more]
        lines = str(CIFAR.plan(CIFAR.configure(settings))).splitlines()
        return next(line for line in lines if line.lstrip().startswith("models"))

    assert line("[lsq,dynamic]").endswith("in models/, as the framework deploys them: static LSQ")
    simulated = line("[dynamic]", "weights=mse", "correction.methods=[]")
    assert simulated.endswith("none: ['dynamic'] have no table to deploy")


def test_weights_with_zero_points_are_simulated(overrides: list[str], tmp_path: Path) -> None:
    settings = [*overrides, f"output={tmp_path}", "methods=[lsq]", "weights=asymmetric_minmax"]
    config = CIFAR.configure([*settings, "bits=W4A8"])
    assert "models       none: integer kernels take symmetric weights" in str(CIFAR.plan(config))
    folder = CIFAR.run(config)
    assert results(folder)["size_bytes"] == {}
    assert not (folder / "models").exists()
    assert "No int8 models" in (folder / "results.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plan(tiny_pipeline: Path) -> str:
    settings = [f"model={tiny_pipeline}", DIGITS[0], "threads=1", "correction.methods=[lsq]"]
    return str(CIFAR.plan(CIFAR.configure(settings)))


def test_the_plan(plan: str) -> None:
    for expected in (
        r"quantizers +\d\d activations, W8A5, by torch_ao, weights minmax",
        r"methods +MinMax, static LSQ, TDQ",
        r"calibration +14,924 samples of 256 trajectories of 100 DDIM steps",
        r"steps +2,000 in batches of 32 for each of: static LSQ, TDQ",
        r"memory +\d\.\d\d GB: .* MB for each of 32 samples",
        r"50,000 images by 100 DDIM steps .* 4 quantized ones, 25,000,000 denoised images",
        r"correction +static LSQ: 307,200 denoised images for each",
        r"results +runs/ddim-cifar10-ptq-torch_ao-W8A5-minmax-seed0",
    ):
        assert re.search(expected, plan)


def test_blocks_need_more_memory(plan: str, tiny_pipeline: Path) -> None:
    by_blocks = ["reconstruction.granularity=block", "reconstruction.iterations=10"]
    settings = [f"model={tiny_pipeline}", DIGITS[0], "threads=1"]
    blocks = str(CIFAR.plan(CIFAR.configure([*settings, *by_blocks])))

    def figure(pattern: str, plan: str) -> float:
        match = re.search(pattern, plan)
        assert match is not None
        return float(match.group(1))

    # Ten steps for each of several blocks.
    assert figure(r"steps +(\d+) in batches", blocks) >= 50
    for_calibration = r"([\d.]+) for calibration"
    assert figure(for_calibration, blocks) > 4 * figure(for_calibration, plan)


def test_the_configurations_are_those_of_the_paper() -> None:
    for recipe, latent_bytes in ((CIFAR, 4 * 3 * 32 * 32), (CHURCHES, 4 * 4 * 32 * 32)):
        config = recipe.configure()
        assert config.calibration.byte_budget // latent_bytes == 5120
        evaluation = config.evaluation
        assert (evaluation.samples, evaluation.steps) == (50_000, 100)
        assert evaluation.features == "inception"
    assert CIFAR.configure().evaluation.with_score
    assert not CHURCHES.configure().evaluation.with_score


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_the_run_stops_before_it_starts_without_inception(tiny_pipeline: Path) -> None:
    config = CIFAR.configure([f"model={tiny_pipeline}", DIGITS[0]])
    with pytest.raises(ConfigError, match=r"evaluation.features = 'inception' needs torch_fidel"):
        CIFAR.run(config)
    assert not config.run_folder.exists()


def test_a_framework_that_sets_the_ranges_of_weights_itself(overrides: list[str]) -> None:
    config = CIFAR.configure([*overrides, "adapter=brevitas", "weights=minmax"])
    with pytest.raises(ConfigError, match=r"'minmax': brevitas sets .* Set weights=native"):
        CIFAR.run(config)


def test_a_budget_that_is_too_small_shows_in_the_plan(overrides: list[str]) -> None:
    config = CIFAR.configure([*overrides, "calibration.byte_budget=1024"])
    with pytest.raises(CalibrationError, match=r"1024 bytes holds 1 samples, fewer than the 2"):
        CIFAR.plan(config)


def test_a_sampler_with_too_many_steps(overrides: list[str]) -> None:
    config = CIFAR.configure([*overrides, "evaluation.steps=1001"])
    with pytest.raises(ConfigError, match=r"cannot have steps = 1001: .* has 1000 timesteps"):
        CIFAR.plan(config)


def test_an_empty_folder_of_images(overrides: list[str], tmp_path: Path) -> None:
    config = CIFAR.configure([*overrides, f"data={{source: folder, location: {tmp_path}}}"])
    with pytest.raises(ConfigError, match=r"data.source = 'folder' has no images at .*\.png"):
        CIFAR.plan(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[tdk]", r"^methods = \['tdk'\]: .*are no methods; choose from .*'tdq_paper'"),
        ("methods=[]", r"^methods = \[\]: List should have at least 1 item"),
        ("weights=lsq", r"^weights = 'lsq': Input should be 'minmax', 'asymmetric_minmax', 'mse',"),
        ("training={}", r"^training = \{\}: .*\['lsq', 'tdq'\] are trained and have no entry"),
        ("evaluation.seed=0", r"^evaluation = .*calibration would see the noise of the test"),
        ("attention_heads=0", r"^attention_heads = 0: Input should be greater than 0"),
        ("correction.methods=[mse]", r"^correction = .*\['mse'\] are not among methods"),
        (
            "name=x-{draw}",
            r"name = 'x-\{draw\}': only \{seed\}, \{adapter\}, \{bits\}, \{weights\} are",
        ),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = CIFAR.configure([override]).run_folder


def test_only_trained_methods_learn_a_rounding() -> None:
    with pytest.raises(ConfigError, match=r"none of \['mse'\] is trained, so no rounding would"):
        CIFAR.configure(["methods=[mse]", "weights=adaround"])


def test_the_table_has_the_timesteps_of_the_sampler(finished: Path) -> None:
    table = tdq.load_table(finished / "tables" / "tdq.safetensors")
    assert table.timesteps.tolist() == [0, 500]
