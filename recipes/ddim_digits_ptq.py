"""Quantize the digits DDIM by each method, sample with the result, and write a report."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.digits_evaluation import make_evaluator
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.frameworks import Framework, load_framework
from tdq_plugin.recipes.method_states import MethodStates
from tdq_plugin.recipes.ptq_config import PTQConfig
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.ptq_quantize import apply_method, sampler_weighting
from tdq_plugin.recipes.ptq_report import write_results
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import Denoiser, image_shape, scheduler_with
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
    float_model = load_float_model(config.model)
    unet, scheduler = float_model.unet, float_model.scheduler
    state = RunState(config.run_folder, config.model_dump(mode="json"))
    evaluator = make_evaluator(
        config.evaluation, config.steps, float_model, config.model, config.output / "float-images"
    )
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
