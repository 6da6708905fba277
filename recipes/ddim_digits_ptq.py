"""Quantize the digits DDIM by each method, sample with the result, and write a report."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.frameworks import Framework, load_framework
from tdq_plugin.recipes.method_states import MethodStates
from tdq_plugin.recipes.ptq_config import PTQConfig
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.ptq_quantize import apply_method, sampler_weighting
from tdq_plugin.recipes.ptq_report import write_results
from tdq_plugin.recipes.reference import cached_images
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import Denoiser, image_shape, sample, scheduler_with
from tdq_plugin.reconstruct import (
    CalibrationSet,
    Progress,
    collect_trajectories,
    reconstruct,
)
from tdq_plugin.scales import TrainableBank

__all__ = ["PTQConfig", "run"]

SEEDS_APART = 2**20


def run(config: PTQConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html`, `report.json`, `model/`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    framework = load_framework(config.adapter)
    config.learns_rounding(framework)
    unet, scheduler = _float_model(config.model)
    state = RunState(config.run_folder, config.model_dump(mode="json"))
    evaluator = _evaluator(config, unet, scheduler)
    data = _calibration_data(config, unet, scheduler)
    model = framework.prepare(unet, data, config.widths)
    observations = _observe(model, data)
    states = MethodStates(state, model)
    for name in config.methods:
        if not states.finished(name):
            states.reset()
            bank = _train(
                config, framework, state, model, unet, name, observations, data, scheduler
            )
            states.save(name, bank, evaluator.timesteps)
    for name in config.int8_methods:
        if state.result(name, framework.execution) is None:
            denoiser = framework.deploy(states.load(name))
            _evaluate(config, state, name, framework.execution, denoiser, evaluator)
    for name in config.fake_methods:
        if state.result(name, "fake") is None:
            denoiser = framework.simulate(states.load(name))
            _evaluate(config, state, name, "fake", denoiser, evaluator)
    return write_results(config, framework, state, states, observations, evaluator, unet, data)


def _float_model(folder: Path) -> tuple[UNet2DModel, DDIMScheduler]:
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"model = {folder} is no saved diffusers pipeline. Train one with "
            "`tdq run ddim-digits-pretrain`, and pass its folder: model=."
        )
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    return unet, DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


def _evaluator(config: PTQConfig, unet: UNet2DModel, scheduler: DDIMScheduler) -> Evaluator:
    generator = torch.Generator().manual_seed(config.evaluation.seed)
    samples, shape = config.evaluation.samples, image_shape(unet)
    noise = torch.randn(2 * samples, *shape, generator=generator)
    ordinary = scheduler_with(scheduler, config.steps)
    halfway = scheduler.config.num_train_timesteps // (2 * config.steps)

    def denoiser(x: Tensor, t: Any) -> Tensor:
        predicted: Tensor = unet(x, t, return_dict=False)[0]
        return predicted

    def draw() -> Tensor:
        with tqdm(total=len(noise), desc="float32: images", unit="image") as progress:
            return sample(denoiser, ordinary, noise, advance=progress.update)

    key = f"{config.steps} steps, {samples} samples, seed {config.evaluation.seed}"
    images = cached_images(config.output / "float-images", key, config.model, draw)
    trajectory_noise = torch.randn(config.evaluation.trajectories, *shape, generator=generator)
    with tqdm(total=2 * config.steps, desc="float32: trajectories", unit="step") as progress:
        return Evaluator(
            denoiser,
            ordinary,
            unseen=scheduler_with(scheduler, config.steps, offset=halfway),
            noise=noise[:samples],
            images=images[:samples],
            other_images=images[samples:],
            trajectory_noise=trajectory_noise,
            features=load_classifier().features,
            data=load_digits(unet.config.sample_size)[0],
            advance=progress.update,
        )


def _calibration_data(
    config: PTQConfig, unet: UNet2DModel, scheduler: DDIMScheduler
) -> CalibrationSet:
    section, shape = config.calibration, image_shape(unet)
    distance = scheduler.config.num_train_timesteps / config.steps
    groups = len(section.shifts)
    parts = []
    with tqdm(desc="calibration data", unit="call") as progress:
        for index, shift in enumerate(section.shifts):
            finished = progress.n

            def show(done: int, total: int, finished: int = finished) -> None:
                progress.total = groups * total
                progress.update(finished + done - progress.n)

            parts.append(
                collect_trajectories(
                    lambda x, t: unet(x, t, return_dict=False)[0],
                    scheduler_with(scheduler, config.steps, offset=int(shift * distance)),
                    shape,
                    images=section.images // groups,
                    distribution=section.distribution,
                    byte_budget=section.byte_budget // groups,
                    seed=config.seed + index * SEEDS_APART,
                    progress=show,
                )
            )
    return CalibrationSet(
        torch.cat([part.samples for part in parts]), torch.cat([part.timesteps for part in parts])
    )


def _observe(model: nn.Module, data: CalibrationSet) -> dict[str, Observation]:
    batches = list(data.batches(128))
    shown = tqdm(batches, desc="observe ranges", unit="batch")
    return tdq.calibrate(model, shown, warm_start=False)


def _train(
    config: PTQConfig,
    framework: Framework,
    state: RunState,
    model: nn.Module,
    unet: UNet2DModel,
    name: str,
    observations: dict[str, Observation],
    data: CalibrationSet,
    scheduler: DDIMScheduler,
) -> TrainableBank:
    method = METHODS[name]
    bank = apply_method(model, method, observations)
    if not method.trained:
        return bank
    with tqdm(desc=f"{method.title}: scales", unit="step") as progress:

        def show(now: Progress) -> None:
            progress.total = now.steps
            progress.set_postfix(block=now.block, loss=f"{now.loss:.2e}", refresh=False)
            progress.update(now.step - progress.n)

        reconstruct(
            model,
            data,
            config.reconstruction_of(name, framework),
            sampler_weighting(scheduler, config.training[name].weight_at_zero),
            checkpoint=state.folder / "checkpoints" / f"{name}.safetensors",
            progress=show,
            reference=unet,
        )
    return bank


def _evaluate(
    config: PTQConfig,
    state: RunState,
    name: str,
    execution: str,
    denoiser: Denoiser,
    evaluator: Evaluator,
) -> None:
    title = f"{METHODS[name].title}, {execution}: images"
    with tqdm(total=config.evaluation.samples, desc=title, unit="image") as progress:
        state.save_result(name, evaluator.evaluate(denoiser, progress.update), execution)
