"""Stages of the QAT recipes that compare methods: calibrate once, train each, measure each."""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.observe import Observation
from tdq_plugin.recipes import calibration
from tdq_plugin.recipes.correction import corrected, method_of
from tdq_plugin.recipes.evaluation.denoiser import Evaluator
from tdq_plugin.recipes.evaluation.digits_evaluation import make_evaluator
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.image_data import load_all_images, load_images
from tdq_plugin.recipes.objectives import BatchMemory, Objective
from tdq_plugin.recipes.qat.config import ComparisonConfig
from tdq_plugin.recipes.qat.methods import METHODS, apply_method, calibrate_bank, check_methods
from tdq_plugin.recipes.qat.model import copy_weights, find_weights, load_weights, save_weights
from tdq_plugin.recipes.qat.stages import QATRun, make_objective, start, train
from tdq_plugin.recipes.qat.training import Training
from tdq_plugin.recipes.qat.training_log import TrainingLog
from tdq_plugin.reconstruct import CalibrationSet

__all__ = [
    "Comparison",
    "begin",
    "check_trained",
    "evaluator_of",
    "execution_of",
    "measure",
    "objective_of",
    "train_method",
    "trained",
]

_POINTS_FOR_PREPARE = 64


@dataclass(frozen=True)
class Comparison:
    """A run that has started, and what all of its methods start from.

    Attributes:
        run: The run.
        quantized: The UNet with quantizers, not calibrated; methods take copies.
        points: What the float model sees while it samples.
        observations: The ranges of all activations at those points.
    """

    run: QATRun[ComparisonConfig]
    quantized: nn.Module
    points: CalibrationSet
    observations: dict[str, Observation]

    def prepare(self, name: str) -> nn.Module:
        """The model with quantizers and a method's scale bank, which is not calibrated yet."""
        quantized = copy.deepcopy(self.quantized)
        apply_method(quantized, METHODS[name])
        return quantized


def check_trained(config: ComparisonConfig) -> None:
    """See that another run, if weights shall be taken from it, has those that are still missing.

    Raises:
        ConfigError: It has not.
    """
    if config.trained is None:
        return
    taken = config.run_folder / "weights"
    for name in config.methods:
        if not (taken / f"{name}.safetensors").exists():
            find_weights(config.trained, name, config)


def begin(config: ComparisonConfig) -> Comparison:
    """Load framework and float model, follow its sampler, and observe the activations."""
    check_trained(config)
    run = start(config)
    section = config.calibration.of_the_sampler()
    points = calibration.collect(section, run.model, config.steps, config.seed)
    few = calibration.thinned(points, _POINTS_FOR_PREPARE)
    quantized = run.framework.prepare(run.model.unet, few, config.widths)
    check_methods(config.methods, quantized, config.adapter)
    observations = calibration.observe(quantized, points, run.model.scheduler, config.steps)
    return Comparison(run, quantized, points, observations)


def objective_of(comparison: Comparison) -> Objective:
    """The loss that every method is trained with."""
    config, model = comparison.run.config, comparison.run.model
    images, _ = load_images(config.data, model.image_shape)
    data_free = config.objective == "data_free_distillation"
    points = comparison.points if data_free else None
    objective = make_objective(config, model, images, points, config.seed, config.data.flip)
    return replace(objective, memory=BatchMemory()) if len(config.methods) > 1 else objective


def train_method(comparison: Comparison, name: str, objective: Objective) -> None:
    """Train a method, or go on with it, and save its weights; or take those of another run."""
    run = comparison.run
    config, weights = run.config, run.state.weights_path(name)
    if weights.exists():
        return
    if config.trained is not None:
        copy_weights(config.trained, name, config, weights)
        return
    quantized = comparison.prepare(name)
    training = Training(
        quantized,
        run.accelerator,
        config.training_of(name),
        config.scale_learning_rates[name],
        config.model_dump(mode="json", exclude={"methods", "evaluation"}),
        config.seed,
        config.changeable,
    )
    checkpoint = run.state.folder / "checkpoints" / f"{name}.pt"
    if not training.resume(checkpoint):
        calibrate_bank(quantized, METHODS[name], comparison.observations)
        _keep_scales(run, name, quantized, 0)
    log = TrainingLog(run.state.folder / "logs" / f"{name}.jsonl", run.accelerator, training.step)
    for step in train(training, objective, log, f"{METHODS[name].title}: training"):
        _keep_scales(run, name, quantized, step)
        if step % config.training.checkpoint_every == 0:
            training.save(checkpoint)
    finished = training.finish()
    if run.accelerator.is_main_process:
        save_weights(finished, weights)


def _keep_scales(run: QATRun[ComparisonConfig], name: str, model: nn.Module, step: int) -> None:
    if step in run.config.scale_history and run.accelerator.is_main_process:
        table = evaluate_table(
            tdq.scale_bank(model), run.model.scheduler.config.num_train_timesteps
        )
        table.save(run.state.folder / "scales" / name / f"{step}.safetensors")


def evaluator_of(comparison: Comparison) -> Evaluator:
    """What every method is measured on."""
    config = comparison.run.config
    return make_evaluator(
        config.evaluation,
        config.steps,
        comparison.run.model.to("cpu"),
        Path(config.model),
        config.output / "float-images",
        _all_images(comparison),
    )


def _all_images(comparison: Comparison) -> Tensor:
    images = load_all_images(comparison.run.config.data, comparison.run.model.image_shape)
    return images[torch.arange(len(images))]


def execution_of(framework: Framework, name: str) -> Literal["fake", "int8"]:
    """How a method is measured.

    The integer kernels' dynamic scales are those of a batch, not of an image, so these are not.
    """
    return "fake" if METHODS[name].dynamic else framework.execution


def measure(comparison: Comparison, evaluator: Evaluator) -> None:
    """Measure what has been trained, on integer kernels where framework and method allow it."""
    run, state = comparison.run, comparison.run.state

    # A corrected row follows its method's.
    @lru_cache(maxsize=1)
    def deployed(method: str) -> Denoiser:
        return _deployed(comparison, method, evaluator)

    for row, title in run.config.rows.items():
        method = method_of(row)
        execution = execution_of(run.framework, method)
        if state.result(row, execution) is None:
            denoiser = deployed(method)
            if method != row:
                denoiser = _corrected(run, method, denoiser, evaluator)
            with tqdm(total=len(evaluator.noise), desc=f"{title}: images", unit="image") as shown:
                result = evaluator.evaluate(denoiser, shown.update, only_sampler=method != row)
            state.save_result(row, result, execution)


def _deployed(comparison: Comparison, method: str, evaluator: Evaluator) -> Denoiser:
    framework = comparison.run.framework
    quantized = trained(comparison, method, evaluator)
    simulated = METHODS[method].dynamic
    return framework.simulate(quantized) if simulated else framework.deploy(quantized)


def _corrected(
    run: QATRun[ComparisonConfig], method: str, denoiser: Denoiser, evaluator: Evaluator
) -> Denoiser:
    return corrected(
        denoiser,
        run.model,
        evaluator.scheduler,
        run.state.correction_path(method),
        run.config.correction,
        run.config.seed,
    )


def trained(comparison: Comparison, name: str, evaluator: Evaluator) -> nn.Module:
    """The trained model of a method with its scales frozen for all timesteps of the evaluation."""
    quantized, state = comparison.prepare(name).cpu(), comparison.run.state
    load_weights(quantized, state.weights_path(name))
    table = evaluate_table(tdq.scale_bank(quantized), evaluator.timesteps)
    table.save(state.table_path(name))
    return tdq.load_scales(quantized.eval(), table)
