"""Stages of the QAT recipes that compare methods: calibrate once, train each, measure each."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import fx
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.observe import Observation
from tdq_plugin.recipes import calibration
from tdq_plugin.recipes.correction import corrected, method_of
from tdq_plugin.recipes.digits_evaluation import make_evaluator
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.image_data import load_images
from tdq_plugin.recipes.objectives import BatchMemory, Objective
from tdq_plugin.recipes.plan import Plan, training_memory
from tdq_plugin.recipes.qat_config import ComparisonConfig
from tdq_plugin.recipes.qat_methods import METHODS, apply_method, calibrate_bank
from tdq_plugin.recipes.qat_model import copy_weights, load_weights, lower, prepare, save_weights
from tdq_plugin.recipes.qat_stages import QATRun, make_objective, train
from tdq_plugin.recipes.run_state import check_folder
from tdq_plugin.recipes.sampling import Denoiser
from tdq_plugin.recipes.training import Training
from tdq_plugin.recipes.training_log import TrainingLog
from tdq_plugin.reconstruct import CalibrationSet

__all__ = [
    "collect",
    "evaluator_of",
    "measure",
    "objective_of",
    "observe",
    "plan_of",
    "train_method",
    "trained",
]


def plan_of(recipe: str, config: ComparisonConfig) -> Plan:
    """Check run folder, model and data, and say what a run would do."""
    check_folder(config.run_folder, config.model_dump(mode="json"))
    torch.set_num_threads(config.threads)
    model = load_float_model(config.model)
    data, _ = load_images(config.data, model.image_shape)
    quantized = prepare(model.unet, config.widths)
    points = (torch.zeros(2, *model.latent_shape), torch.zeros(2))
    tdq.calibrate(quantized, [points], samples=16, warm_start=False)
    memory = training_memory(quantized, *points, beside=model.size_in_bytes)
    iterations = config.training.iterations
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}",
        "data": f"{len(data):,} images",
        "methods": ", ".join(config.methods),
        "steps": f"{iterations:,} for each of {len(config.methods)} methods, batches of "
        f"{config.training.batch_size}",
        "memory": memory.describe(config.training.batch_size),
        "evaluation": f"{config.evaluation.samples:,} images by {config.steps} DDIM steps",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {recipe}", lines)


def collect(config: ComparisonConfig, model: FloatModel) -> CalibrationSet:
    """What the float model sees while it samples."""
    section = config.calibration.of_the_sampler()
    return calibration.collect(section, model, config.steps, config.seed)


def observe(
    config: ComparisonConfig, model: FloatModel, points: CalibrationSet
) -> dict[str, Observation]:
    """The ranges of all activations at those points."""
    return calibration.observe(prepare(model.unet, config.widths).eval(), points)


def objective_of(config: ComparisonConfig, model: FloatModel, points: CalibrationSet) -> Objective:
    """The loss that every method is trained with."""
    images, _ = load_images(config.data, model.image_shape)
    data_free = config.objective == "data_free_distillation"
    objective = make_objective(
        config, model, images, points if data_free else None, config.seed, config.data.flip
    )
    return replace(objective, memory=BatchMemory()) if len(config.methods) > 1 else objective


def train_method(
    run: QATRun[ComparisonConfig],
    name: str,
    observations: dict[str, Observation],
    objective: Objective,
) -> None:
    """Train a method, or go on with it, and save its weights; or take those of another run."""
    config, weights = run.config, run.state.weights_path(name)
    if weights.exists():
        return
    if config.trained is not None:
        copy_weights(config.trained, name, config.bits, weights)
        return
    quantized = _prepared(config, run.model, name)
    training = Training(
        quantized,
        run.accelerator,
        config.training,
        config.scale_learning_rates[name],
        config.model_dump(mode="json", exclude={"methods", "output", "evaluation"}),
        config.seed,
    )
    checkpoint = run.state.folder / "checkpoints" / f"{name}.pt"
    if not training.resume(checkpoint):
        calibrate_bank(quantized, METHODS[name], observations)
        _keep_scales(run, name, quantized, 0)
    log = TrainingLog(run.state.folder / "logs" / f"{name}.jsonl", run.accelerator, training.step)
    for step in train(training, objective, log, f"{METHODS[name].title}: training"):
        _keep_scales(run, name, quantized, step)
        if step % config.training.checkpoint_every == 0:
            training.save(checkpoint)
    finished = training.finish()
    if run.accelerator.is_main_process:
        save_weights(finished, weights)


def _keep_scales(
    run: QATRun[ComparisonConfig], name: str, model: fx.GraphModule, step: int
) -> None:
    if step in run.config.scale_history and run.accelerator.is_main_process:
        table = evaluate_table(
            tdq.scale_bank(model), run.model.scheduler.config.num_train_timesteps
        )
        table.save(run.state.folder / "scales" / name / f"{step}.safetensors")


def evaluator_of(config: ComparisonConfig, model: FloatModel) -> Evaluator:
    """What every method is measured on."""
    return make_evaluator(
        config.evaluation,
        config.steps,
        model.to("cpu"),
        Path(config.model),
        config.output / "float-images",
    )


def measure(run: QATRun[ComparisonConfig], evaluator: Evaluator) -> None:
    """Measure what has been trained, on integer kernels where the method allows it."""
    for row, title in run.config.rows.items():
        method = method_of(row)
        execution = METHODS[method].execution
        if run.state.result(row, execution) is None:
            denoiser = _denoiser(run, row, evaluator)
            with tqdm(total=len(evaluator.noise), desc=f"{title}: images", unit="image") as shown:
                result = evaluator.evaluate(denoiser, shown.update, only_sampler=method != row)
            run.state.save_result(row, result, execution)


def _denoiser(run: QATRun[ComparisonConfig], row: str, evaluator: Evaluator) -> Denoiser:
    method = method_of(row)
    quantized = trained(run, method, evaluator)
    if METHODS[method].execution == "int8":
        quantized = lower(quantized)
    if method == row:
        return quantized
    return corrected(
        quantized,
        run.model,
        evaluator.scheduler,
        run.state.correction_path(method),
        run.config.correction.images,
        run.config.seed,
    )


def trained(run: QATRun[ComparisonConfig], name: str, evaluator: Evaluator) -> fx.GraphModule:
    """The trained model of a method with its scales frozen for all timesteps of the evaluation."""
    quantized = _prepared(run.config, run.model, name)
    load_weights(quantized, run.state.weights_path(name))
    table = evaluate_table(tdq.scale_bank(quantized), evaluator.timesteps)
    table.save(run.state.table_path(name))
    return tdq.load_scales(quantized.eval(), table)


def _prepared(config: ComparisonConfig, model: FloatModel, name: str) -> fx.GraphModule:
    quantized = prepare(model.unet, config.widths)
    apply_method(quantized, METHODS[name])
    return quantized
