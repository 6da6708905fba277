"""What the recipes refuse before they begin: models, timesteps and trainings that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import one_level_unet

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.calibration import observe
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.ptq.quantize import sampler_weighting
from tdq_plugin.reconstruct import CalibrationSet

PTQ, QAT = find_recipe("ddim-digits-ptq"), find_recipe("ddim-digits-qat")
FULL_SIZE = find_recipe("ddim-cifar10-ptq")
SMALL = ["threads=1"]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny pipeline, of so many channels, with options of its scheduler."""

    def pipeline(channels: int = 1, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("pipeline")
        unet = one_level_unet(sample_size=16, in_channels=channels, out_channels=channels)
        DDIMPipeline(unet, DDIMScheduler(**options)).save_pretrained(folder)
        return folder

    return pipeline


def refused(recipe: Any, overrides: list[str], message: str) -> None:
    """Plan and run say the same, and nothing is left behind."""
    config = recipe.configure(overrides)
    for begin in (recipe.plan, recipe.run):
        with pytest.raises(ConfigError, match=message):
            begin(config)
    assert not config.run_folder.exists()


@pytest.mark.parametrize("steps", [250, 400])
def test_calibration_at_the_timesteps_of_the_test(overrides: list[str], steps: int) -> None:
    shifted = [*overrides, f"steps={steps}"]
    refused(PTQ, shifted, rf"with steps = {steps}, .* those of \[0.*\] are those of the test, \d ")
    assert PTQ.plan(PTQ.configure([*shifted, "calibration.shifts=[0]"]))


@pytest.mark.parametrize("recipe", [PTQ, QAT], ids=lambda recipe: recipe.name)
def test_colours(recipe: Any, save: Callable[..., Path], tmp_path: Path) -> None:
    message = r"draws images of 3 channels, .* grey digits\. Take a recipe of full size"
    refused(recipe, ["threads=1", f"model={save(3)}", f"output={tmp_path}"], message)


@pytest.mark.parametrize("recipe", [PTQ, QAT], ids=lambda recipe: recipe.name)
def test_other_timesteps_than_ddim_s(
    recipe: Any, save: Callable[..., Path], tmp_path: Path
) -> None:
    model = save(timestep_spacing="trailing")
    message = r"timestep_spacing='trailing'; .*Set it in the pipeline's scheduler"
    refused(recipe, ["threads=1", f"model={model}", f"output={tmp_path}"], message)


@pytest.mark.parametrize("adapter", ["brevitas", "nncf"])
@pytest.mark.parametrize("recipe", [PTQ, FULL_SIZE], ids=lambda recipe: recipe.name)
def test_blocks_of_a_model_that_is_no_graph(
    recipe: Any, adapter: str, overrides: list[str]
) -> None:
    settings = [*overrides, f"adapter={adapter}", "reconstruction.granularity=block"]
    if recipe is FULL_SIZE:
        settings += ["weights=native", "evaluation.features=digits"]
    refused(recipe, settings, rf"'block': models of adapter = '{adapter}' are no graphs")


@pytest.mark.parametrize("steps", [20, 60, 100, 200])
def test_every_step_of_the_sampler_has_its_own_statistics(steps: int) -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    unet = one_level_unet().eval()
    points = CalibrationSet(torch.randn(steps, 1, 8, 8), scheduler.timesteps.float())
    model = load_framework("torch_ao").prepare(unet, points, Bits(8, 8))
    for seen in observe(model, points, scheduler, steps).values():
        assert seen.timesteps.tolist() == sorted(scheduler.timesteps.tolist())


@pytest.mark.parametrize("offset", [0, 1])
def test_the_last_step_of_the_sampler_has_its_own_weight(offset: int) -> None:
    scheduler = DDIMScheduler(steps_offset=offset)
    scheduler.set_timesteps(20)
    plain, lighter = (sampler_weighting(scheduler, weight) for weight in (1.0, 0.25))
    ratios = lighter(scheduler.timesteps) / plain(scheduler.timesteps)
    assert ratios.tolist() == [1.0] * 19 + [0.25]
