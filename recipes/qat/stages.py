"""Stages that all QAT recipes share: how a run starts, its objective, and the training loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.frameworks import Framework, load_framework
from tdq_plugin.recipes.image_data import Images
from tdq_plugin.recipes.objectives import (
    FloatTrajectories,
    Inputs,
    NoisedImages,
    Objective,
    weighting_of,
)
from tdq_plugin.recipes.qat.config import QATConfig
from tdq_plugin.recipes.qat.training import Training
from tdq_plugin.recipes.qat.training_log import TrainingLog, make_accelerator, require_trackers
from tdq_plugin.recipes.run_state import RunState, check_folder
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["QATRun", "check", "make_objective", "start", "train"]

Config = TypeVar("Config", bound=QATConfig)
Config_co = TypeVar("Config_co", bound=QATConfig, covariant=True)


@dataclass(frozen=True)
class QATRun(Generic[Config_co]):
    """A run that has started.

    Attributes:
        config: Of the recipe.
        framework: The quantization framework.
        model: The float model, on the device of the run.
        accelerator: Its processes and devices.
        state: What is finished so far.
    """

    config: Config_co
    framework: Framework
    model: FloatModel
    accelerator: Accelerator
    state: RunState


def check(config: QATConfig) -> None:
    """What a run and its plan check before anything is loaded.

    Raises:
        ConfigError: The run folder is that of another run, or a tracker is not installed.
    """
    check_folder(config.run_folder, config.model_dump(mode="json"), config.changeable)
    require_trackers(config.trackers)


def start(config: Config) -> QATRun[Config]:
    """Load framework and float model, and begin or resume a run."""
    check(config)
    torch.set_num_threads(config.threads)
    framework = load_framework(config.adapter)
    settings = config.model_dump(mode="json")
    accelerator = make_accelerator(
        config.run_folder, config.training.mixed_precision, config.trackers, settings
    )
    with accelerator.main_process_first():
        model = load_float_model(config.model)
        config.check_model(model)
        state = RunState(config.run_folder, settings, config.changeable)
    return QATRun(config, framework, model.to(accelerator.device), accelerator, state)


def make_objective(
    config: QATConfig,
    model: FloatModel,
    images: Images,
    points: CalibrationSet | None,
    seed: int,
    flip: bool,
) -> Objective:
    """The loss on noised images, or on points of float trajectories where there are any."""
    size = config.training.batch_size
    inputs: Inputs = NoisedImages(images, model.scheduler, size, seed, flip, model.encode)
    if points is not None:
        inputs = FloatTrajectories(points, size, seed)
    teacher = None if config.objective == "noise" else model.denoise
    weighting = weighting_of(config.weighting, model.scheduler)
    return Objective(inputs, teacher, weighting, config.absolute_error)


def train(training: Training, objective: Objective, log: TrainingLog, title: str) -> Iterator[int]:
    """Train to the last step, with progress and log; yields after each step how many are done."""
    iterations, shown = training.section.iterations, training.accelerator.is_main_process
    with tqdm(total=iterations, initial=training.step, desc=title, disable=not shown) as progress:
        while training.step < iterations:
            result = training.advance(objective)
            progress.update()
            if result is not None:
                log.write(training.step, **result._asdict())
                progress.set_postfix(loss=f"{result.loss:.2e}", refresh=False)
            yield training.step
