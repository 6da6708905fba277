"""Stages of the QAT recipes of full size: train one method, keep the best weights, judge them."""

import json
import math
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES, missing_packages
from tdq_plugin.recipes.evaluation.sample_evaluation import SampleEvaluation
from tdq_plugin.recipes.evaluation.sample_rows import SampleRows
from tdq_plugin.recipes.evaluation.sampling import Denoiser, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel, set_dropout
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.image_data import Images, load_all_images, load_images
from tdq_plugin.recipes.objectives import NoisedImages, Objective
from tdq_plugin.recipes.plan import Plan, training_memory
from tdq_plugin.recipes.qat.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.qat.config import FullSizeConfig
from tdq_plugin.recipes.qat.methods import METHODS, apply_method, calibrate_bank, check_methods
from tdq_plugin.recipes.qat.model import frozen, load_weights
from tdq_plugin.recipes.qat.stages import QATRun, check, make_objective, train
from tdq_plugin.recipes.qat.training import Training
from tdq_plugin.recipes.qat.training_log import TrainingLog
from tdq_plugin.recipes.saved_model import save_model
from tdq_plugin.reconstruct import CalibrationSet, collect_trajectories

__all__ = ["calibration_batch", "judge_best", "plan_of", "prepare_method", "train_best"]


def prepare_method(
    config: FullSizeConfig, framework: Framework, model: FloatModel, data: CalibrationSet
) -> nn.Module:
    """A copy of the UNet with quantizers; all layers have the same bits, or stay float.

    Args:
        config: Of the recipe.
        framework: The quantization framework.
        model: The float model.
        data: A batch for frameworks that look at activations themselves.

    Raises:
        ConfigError: The framework cannot train the method, or has no dropout; or the evaluation
            has too many steps.
    """
    scheduler_with(model.scheduler, config.evaluation.steps)  # Not after days of training.
    if config.dropout and not framework.keeps_dropout:
        raise ConfigError(
            f"dropout = {config.dropout}: the models of {config.adapter} have none in training. "
            "Set dropout=0.0, or another adapter."
        )
    set_dropout(model.unet, config.dropout)
    quantized = framework.prepare(model.unet, data, config.widths)
    check_methods([config.method], quantized, config.adapter)
    apply_method(quantized, METHODS[config.method])
    return quantized


def plan_of(recipe: str, config: FullSizeConfig, model: FloatModel, quantized: nn.Module) -> Plan:
    """Check run folder and data, and say what a run would do."""
    check(config)
    training, held_out = load_images(config.data, model.image_shape)
    training[torch.arange(1)]  # Can it be read?
    points = (torch.zeros(2, *model.latent_shape), torch.zeros(2))
    tdq.calibrate(quantized, [points], samples=16, warm_start=False)
    memory = training_memory(quantized, *points, beside=model.size_in_bytes)
    calls = config.evaluation.steps * config.evaluation.samples * (1 + config.validation.keep)
    missing = missing_packages(config.evaluation.features)
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "method": f"{METHODS[config.method].title}, {config.bits}, {config.adapter}, "
        f"{len(tdq.scale_bank(quantized).names)} activation quantizers",
        "data": f"{len(training):,} images and {len(held_out):,} for validation",
        "steps": f"{config.training.iterations:,} in batches of {config.training.batch_size}, "
        f"objective {config.objective}",
        "memory": memory.describe(config.training.batch_size),
        "evaluation": f"{config.evaluation.samples:,} images by {config.evaluation.steps} DDIM "
        f"steps of the float model and {config.validation.keep} trained ones, "
        f"{calls:,} denoised images, compared with {len(training) + len(held_out):,} real images",
        "features": FEATURE_SPACES[config.evaluation.features],
        "installed": f"missing: {', '.join(missing)}; the run would stop" if missing else "yes",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {recipe}", lines)


def train_best(
    run: QATRun[FullSizeConfig],
    quantized: nn.Module,
    training_images: Images,
    held_out: Images,
    best: BestCheckpoints,
) -> None:
    """Train, or go on with it; the weights of the lowest validation losses are kept."""
    config, accelerator = run.config, run.accelerator
    training = Training(
        quantized,
        accelerator,
        config.training,
        config.scale_learning_rate,
        config.model_dump(mode="json"),
        config.seed,
        config.changeable,
    )
    checkpoint = run.state.folder / "checkpoint.pt"
    if not training.resume(checkpoint):
        _calibrate(run, quantized, training_images)
    log = TrainingLog(run.state.folder / "log.jsonl", accelerator, training.step)
    validation = make_objective(config, run.model, held_out, None, config.seed + 2, flip=False)
    for step in train(training, _objective(run, training_images), log, "training"):
        last = step == config.training.iterations
        if last or step % config.validation.every == 0:
            loss = training.validation_loss(validation, config.validation.batches)
            log.write(step, validation_loss=loss)
            with training.averaged() as averaged:
                if accelerator.is_main_process:
                    best.add(averaged, step, loss)
        if last or step % config.training.checkpoint_every == 0:
            training.save(checkpoint)
    training.finish()
    accelerator.wait_for_everyone()


def calibration_batch(
    run: QATRun[FullSizeConfig], images: Images, index: int = 0
) -> CalibrationSet:
    """Noised images at random timesteps, on the device of the run."""
    inputs = NoisedImages(
        images,
        run.model.scheduler,
        run.config.calibration.batch_size,
        run.config.seed + 1,
        encode=run.model.encode,
    )
    drawn, device = inputs.draw(index, slice(None)), run.accelerator.device
    return CalibrationSet(drawn.samples.to(device), drawn.timesteps.to(device))


def _calibrate(run: QATRun[FullSizeConfig], quantized: nn.Module, images: Images) -> None:
    count = run.config.calibration.batches
    sets = (calibration_batch(run, images, index) for index in range(count))
    shown = tqdm(
        ((points.samples, points.timesteps) for points in sets),
        desc="observe ranges",
        total=count,
        disable=not run.accelerator.is_main_process,
    )
    observations = tdq.calibrate(quantized.eval(), shown, warm_start=False)
    calibrate_bank(quantized, METHODS[run.config.method], observations)


def _objective(run: QATRun[FullSizeConfig], images: Images) -> Objective:
    config, points = run.config, None
    if config.objective == "data_free_distillation":
        steps = config.evaluation.steps
        bytes_of_one = 4 * math.prod(run.model.latent_shape) * steps
        points = collect_trajectories(
            run.model.denoise,
            scheduler_with(run.model.scheduler, steps),
            run.model.latent_shape,
            config.trajectories,
            byte_budget=config.trajectories * bytes_of_one,
            seed=config.seed,
        )
    return make_objective(config, run.model, images, points, config.seed, config.data.flip)


def judge_best(
    recipe: str,
    run: QATRun[FullSizeConfig],
    quantized: nn.Module,
    best: BestCheckpoints,
) -> None:
    """Judge the float model and the kept weights by all images; what is done already is read."""
    config, folder = run.config, run.state.folder
    images = load_all_images(config.data, run.model.image_shape)
    evaluation = SampleEvaluation(config.evaluation, run.accelerator, run.model, images)
    rows = [_row(run, "float32", evaluation, run.model.denoise)]
    for step, loss in best.losses().items():
        load_weights(quantized, best.path(step))
        with frozen(quantized, evaluation.scheduler) as model:
            name = f"step-{step:07d}"
            row = _row(run, name, evaluation, run.framework.simulate(model))
        rows.append(row | {"validation_loss": loss})
    if run.accelerator.is_main_process:
        results = {
            "recipe": recipe,
            "method": METHODS[config.method].title,
            "bits": config.bits,
            "samples": config.evaluation.samples,
            "steps": config.evaluation.steps,
            "feature_space": FEATURE_SPACES[config.evaluation.features],
            "rows": rows,
        }
        # First, so that they are there even if the model cannot be saved.
        with atomic_file(folder / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2))
        load_weights(quantized, best.path(next(iter(best.losses()))))
        # Without a table there is nothing to deploy.
        if not METHODS[config.method].dynamic:
            save_model(
                run.framework,
                quantized,
                folder / "model",
                run.model.unet,
                evaluation.scheduler,
                {"recipe": recipe, "method": config.method, "bits": config.bits},
            )
    run.accelerator.wait_for_everyone()


def _row(
    run: QATRun[FullSizeConfig], name: str, evaluation: SampleEvaluation, denoiser: Denoiser
) -> dict[str, Any]:
    rows = SampleRows(run.state.folder / "rows", run.config.evaluation)
    run.accelerator.wait_for_everyone()
    if rows.missing([name]):
        rows.measure(name, denoiser, evaluation)
    return {"model": name, **rows.row(name)}
