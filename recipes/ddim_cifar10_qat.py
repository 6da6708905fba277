"""Train the CIFAR-10 DDIM with quantization, as in the TDQ paper (arXiv 2306.02316).

What is decided here: DDPM's loss on the training data, the float model's learning rate, batches of
128 for 200,000 steps, the averaged weights of the five lowest validation losses, and their samples
by 200 DDIM steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveFloat, field_validator
from torch import fx
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.config import RecipeConfig, Section, filled_in
from tdq_plugin.recipes.float_model import FloatModel, load_float_model, set_dropout
from tdq_plugin.recipes.image_data import DataSection, Images, load_images
from tdq_plugin.recipes.image_quality import FEATURE_SPACES, missing_packages, require_features
from tdq_plugin.recipes.objectives import (
    FloatTrajectories,
    Inputs,
    NoisedImages,
    Objective,
    ObjectiveName,
    WeightingName,
    weighting_of,
)
from tdq_plugin.recipes.plan import Plan, training_memory
from tdq_plugin.recipes.qat_methods import METHODS, apply_method, calibrate_bank
from tdq_plugin.recipes.qat_model import frozen, load_weights, prepare, save_integer_model
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sample_evaluation import SampleEvaluation, SampleEvaluationSection
from tdq_plugin.recipes.sampling import Denoiser, image_shape, scheduler_with
from tdq_plugin.recipes.training import Training, TrainingSection
from tdq_plugin.recipes.training_log import Tracker, TrainingLog, make_accelerator
from tdq_plugin.reconstruct import collect_trajectories

__all__ = ["CifarQATConfig", "plan", "run"]

RECIPE = "ddim-cifar10-qat"


class CalibrationSection(Section):
    """Noised images at random timesteps that set the first scales."""

    batches: int = Field(gt=0)
    batch_size: int = Field(gt=0)


class ValidationSection(Section):
    """Validate `every` so many steps on `batches` batches, and keep the `keep` best weights."""

    every: int = Field(gt=0)
    batches: int = Field(gt=0)
    keep: int = Field(gt=0)


class CifarQATConfig(RecipeConfig):
    """Configuration of `ddim-cifar10-qat`.

    Attributes:
        model: Folder of a saved diffusers pipeline with a UNet2DModel, or a hub repository.
        bits: Bits of weights and activations, for example `W4A4`.
        method: One of `tdq_plugin.recipes.qat_methods.METHODS`.
        float_layers: Layers that stay float besides those that see the timestep only.
        dropout: Of the residual blocks during training.
        objective: `noise` (the paper), `distillation` or `data_free_distillation`.
        weighting: Of the timesteps in the loss, see `objectives.weighting_of`.
        trajectories: Of the float model, for `data_free_distillation`.
        data: Training images.
        calibration: Where the first scales come from.
        training: How weights and scales are trained.
        scale_learning_rate: Of the scale bank.
        validation: When to validate, and how many weights to keep.
        evaluation: How the kept weights are judged.
        trackers: Accelerate's trackers, beside the JSON lines.
    """

    model: str
    bits: str = Field(pattern=r"^W[2-8]A[2-8]$")
    method: str
    float_layers: list[str]
    dropout: float = Field(ge=0, lt=1)
    objective: ObjectiveName
    weighting: WeightingName
    trajectories: int = Field(gt=0)
    data: DataSection
    calibration: CalibrationSection
    training: TrainingSection
    scale_learning_rate: PositiveFloat
    validation: ValidationSection
    evaluation: SampleEvaluationSection
    trackers: list[Tracker]

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"is no method; choose from {list(METHODS)}")
        return name

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{method}`, `{bits}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"method", "bits", "seed"})
        return self.output / filled_in(self.name, **filled)

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits(int(self.bits[1]), int(self.bits[3]))


@dataclass(frozen=True)
class Parts:
    """What a run starts from: the float model, its copy to train, and the images."""

    model: FloatModel
    quantized: fx.GraphModule
    training: Images
    validation: Images


def plan(config: CifarQATConfig) -> Plan:
    """Check model and data, and say what a run would do."""
    torch.set_num_threads(config.threads)
    parts = _parts(config)
    points = (parts.training[torch.arange(2)], torch.zeros(2))
    tdq.calibrate(parts.quantized, [points], samples=16, warm_start=False)
    memory = training_memory(parts.quantized, *points, teacher=config.objective != "noise")
    calls = config.evaluation.steps * config.evaluation.samples * (1 + config.validation.keep)
    missing = missing_packages(config.evaluation.features)
    lines = {
        "model": f"{config.model}, {parts.model.unet.num_parameters():,} parameters",
        "method": f"{METHODS[config.method].title}, {config.bits}, "
        f"{len(tdq.scale_bank(parts.quantized).names)} activation quantizers",
        "data": f"{len(parts.training):,} images and {len(parts.validation):,} for validation",
        "steps": f"{config.training.iterations:,} in batches of {config.training.batch_size}, "
        f"objective {config.objective}",
        "memory": memory.describe(config.training.batch_size),
        "evaluation": f"{config.evaluation.samples:,} images by {config.evaluation.steps} DDIM "
        f"steps of the float model and {config.validation.keep} trained ones, "
        f"{calls:,} denoised images",
        "features": FEATURE_SPACES[config.evaluation.features],
        "installed": f"missing: {', '.join(missing)}; the run would stop" if missing else "yes",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {RECIPE}", lines)


def run(config: CifarQATConfig) -> Path:
    """Run or resume the recipe; return the folder with `results.json` and `model/`."""
    torch.set_num_threads(config.threads)
    require_features(config.evaluation.features)
    settings = config.model_dump(mode="json")
    accelerator = make_accelerator(
        config.run_folder, config.training.mixed_precision, config.trackers, settings
    )
    accelerator.print(f"Features: {FEATURE_SPACES[config.evaluation.features]}")
    with accelerator.main_process_first():
        state = RunState(config.run_folder, settings)
        parts = _parts(config)
    parts.model.unet.to(accelerator.device)
    parts.quantized.to(accelerator.device)
    best = BestCheckpoints(state.folder / "weights", config.validation.keep)
    _train(config, accelerator, parts, best)
    _evaluate(config, accelerator, parts, best)
    accelerator.end_training()
    return state.folder


def _parts(config: CifarQATConfig) -> Parts:
    model = load_float_model(config.model)
    images = load_images(config.data, image_shape(model.unet))
    set_dropout(model.unet, config.dropout)
    layers = tuple(config.float_layers)
    quantized = prepare(model.unet, config.widths, layers, first_last_bits=None)
    apply_method(quantized, METHODS[config.method])
    return Parts(model, quantized, *images)


def _train(
    config: CifarQATConfig, accelerator: Accelerator, parts: Parts, best: BestCheckpoints
) -> None:
    training = Training(
        parts.quantized,
        accelerator,
        config.training,
        config.scale_learning_rate,
        config.model_dump(mode="json", exclude={"output", "evaluation", "trackers"}),
        config.seed,
    )
    checkpoint = config.run_folder / "checkpoint.pt"
    if not training.resume(checkpoint):
        _calibrate(config, accelerator, parts)
    log = TrainingLog(config.run_folder / "log.jsonl", accelerator, training.step)
    objective, validation = _objectives(config, parts)
    progress = tqdm(
        total=config.training.iterations,
        initial=training.step,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    while training.step < config.training.iterations:
        result = training.advance(objective)
        progress.update()
        last = training.step == config.training.iterations
        if result is not None:
            log.write(training.step, **result._asdict())
            progress.set_postfix(loss=f"{result.loss:.2e}", refresh=False)
        if last or training.step % config.validation.every == 0:
            loss = training.validation_loss(validation, config.validation.batches)
            log.write(training.step, validation_loss=loss)
            with training.averaged() as averaged:
                if accelerator.is_main_process:
                    best.add(averaged, training.step, loss)
        if last or training.step % config.training.checkpoint_every == 0:
            training.save(checkpoint)
    progress.close()
    training.finish()
    accelerator.wait_for_everyone()


def _calibrate(config: CifarQATConfig, accelerator: Accelerator, parts: Parts) -> None:
    section = config.calibration
    inputs = NoisedImages(
        parts.training, parts.model.scheduler, section.batch_size, config.seed + 1
    )
    drawn = (inputs.draw(step, slice(None)) for step in range(section.batches))
    batches = (
        (batch.samples.to(accelerator.device), batch.timesteps.to(accelerator.device))
        for batch in drawn
    )
    shown = tqdm(
        batches,
        desc="observe ranges",
        total=section.batches,
        disable=not accelerator.is_main_process,
    )
    observations = tdq.calibrate(parts.quantized.eval(), shown, warm_start=False)
    calibrate_bank(parts.quantized, METHODS[config.method], observations)


def _objectives(config: CifarQATConfig, parts: Parts) -> tuple[Objective, Objective]:
    """For training and for validation; the latter sees noised held-out images in any case."""
    size, scheduler = config.training.batch_size, parts.model.scheduler
    teacher = None if config.objective == "noise" else parts.model.denoise
    held_out = NoisedImages(parts.validation, scheduler, size, config.seed + 2)
    inputs: Inputs = NoisedImages(parts.training, scheduler, size, config.seed, config.data.flip)
    if config.objective == "data_free_distillation":
        points = collect_trajectories(
            parts.model.denoise,
            scheduler_with(scheduler, config.evaluation.steps),
            image_shape(parts.model.unet),
            config.trajectories,
            seed=config.seed,
        )
        inputs = FloatTrajectories(points, size, config.seed)
    weighting = weighting_of(config.weighting, scheduler)
    return Objective(inputs, teacher, weighting), Objective(held_out, teacher, weighting)


def _evaluate(
    config: CifarQATConfig, accelerator: Accelerator, parts: Parts, best: BestCheckpoints
) -> None:
    """Judge the float model and the kept weights; what is done already is read."""
    scheduler = scheduler_with(parts.model.scheduler, config.evaluation.steps)
    evaluation = SampleEvaluation(config.evaluation, accelerator, parts.training, scheduler)
    rows = [_row(config, accelerator, "float32", evaluation, parts.model.denoise)]
    for step, loss in best.losses().items():
        load_weights(parts.quantized, best.path(step))
        with frozen(parts.quantized, scheduler) as model:
            row = _row(config, accelerator, f"step-{step:07d}", evaluation, model)
        rows.append(row | {"validation_loss": loss})
    if accelerator.is_main_process:
        load_weights(parts.quantized, best.path(next(iter(best.losses()))))
        save_integer_model(
            config.run_folder / "model", parts.quantized, parts.model.unet, scheduler, RECIPE
        )
        results = {
            "recipe": RECIPE,
            "method": METHODS[config.method].title,
            "bits": config.bits,
            "samples": config.evaluation.samples,
            "steps": config.evaluation.steps,
            "feature_space": FEATURE_SPACES[config.evaluation.features],
            "rows": rows,
        }
        _write(config.run_folder / "results.json", results)
    accelerator.wait_for_everyone()


def _row(
    config: CifarQATConfig,
    accelerator: Accelerator,
    name: str,
    evaluation: SampleEvaluation,
    denoiser: Denoiser,
) -> dict[str, Any]:
    path = config.run_folder / "rows" / f"{name}.json"
    accelerator.wait_for_everyone()
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    row = {"model": name, **evaluation.evaluate(denoiser, f"{name}: images")}
    if accelerator.is_main_process:
        _write(path, row)
    return row


def _write(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2))
