"""Train the digits DDIM with quantization by each method, and write a report.

What is decided here: every method starts from the same float model and the same calibration, sees
the same batches, and trains weights and scales together.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveFloat, ValidationInfo, field_validator
from torch import fx, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.config import RecipeConfig, Section, filled_in
from tdq_plugin.recipes.digits_evaluation import EvaluationSection, make_evaluator
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.image_data import DataSection, load_images
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
from tdq_plugin.recipes.qat_model import load_weights, prepare, save_weights
from tdq_plugin.recipes.qat_report import write_results
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import image_shape, scheduler_with
from tdq_plugin.recipes.training import Training, TrainingSection
from tdq_plugin.recipes.training_log import Tracker, TrainingLog, make_accelerator
from tdq_plugin.reconstruct import CalibrationSet, collect_trajectories

__all__ = ["QATConfig", "plan", "run"]

MODEL = Path(__file__).parent / "assets" / "ddim-digits"


class CalibrationSection(Section):
    """Trajectories of the float model that set the first scales."""

    images: int = Field(gt=0)
    byte_budget: int = Field(gt=0)


class QATConfig(RecipeConfig):
    """Configuration of `ddim-digits-qat`.

    Attributes:
        bits: Bits of weights and activations, for example `W4A4`; the first and last layer keep 8.
        steps: Steps of the DDIM sampler; calibration uses the same.
        methods: Rows of the report.
        objective: `noise` (DDPM's loss on data), `distillation` (the float model's output on
            noised data), or `data_free_distillation` (on its own trajectories).
        weighting: Of the timesteps in the loss, see `objectives.weighting_of`.
        data: Images that noise is added to.
        calibration: Where the first scales come from.
        training: How every method is trained.
        scale_learning_rates: Of each method's scale bank.
        evaluation: What the methods are measured on.
        trackers: Accelerate's trackers, beside the JSON lines.
        model: Folder of the float model, a saved diffusers pipeline.
    """

    bits: str = Field(pattern=r"^W[2-8]A[2-8]$")
    steps: int = Field(ge=2, le=500)
    methods: list[str] = Field(min_length=1)
    objective: ObjectiveName
    weighting: WeightingName
    data: DataSection
    calibration: CalibrationSection
    training: TrainingSection
    scale_learning_rates: dict[str, PositiveFloat]
    evaluation: EvaluationSection
    trackers: list[Tracker]
    model: Path = MODEL

    @field_validator("methods", "scale_learning_rates")
    @classmethod
    def _known_methods(cls, names: list[str]) -> list[str]:
        unknown = sorted(set(names) - set(METHODS))
        if unknown:
            raise ValueError(f"{unknown} are no methods; choose from {list(METHODS)}")
        return names

    @field_validator("scale_learning_rates")
    @classmethod
    def _cover_methods(cls, rates: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        missing = sorted(set(info.data.get("methods", [])) - set(rates))
        if missing:
            raise ValueError(f"{missing} have no learning rate")
        return rates

    @field_validator("evaluation")
    @classmethod
    def _other_noise(cls, evaluation: EvaluationSection, info: ValidationInfo) -> EvaluationSection:
        if evaluation.seed == info.data.get("seed"):
            raise ValueError("with the same seed, calibration would see the noise of the test")
        return evaluation

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{bits}`, `{steps}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"bits", "steps", "seed"})
        return self.output / filled_in(self.name, **filled)

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits(int(self.bits[1]), int(self.bits[3]))


def plan(config: QATConfig) -> Plan:
    """Check model and data, and say what a run would do."""
    torch.set_num_threads(config.threads)
    model = load_float_model(config.model)
    data, _ = load_images(config.data, image_shape(model.unet))
    quantized = prepare(model.unet, config.widths)
    points = (torch.zeros(2, *image_shape(model.unet)), torch.zeros(2))
    tdq.calibrate(quantized, [points], samples=16, warm_start=False)
    memory = training_memory(quantized, *points, teacher=config.objective != "noise")
    iterations = config.training.iterations
    lines = {
        "model": f"{config.model}, {model.unet.num_parameters():,} parameters",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}",
        "data": f"{len(data):,} images",
        "methods": ", ".join(config.methods),
        "steps": f"{iterations:,} for each of {len(config.methods)} methods, batches of "
        f"{config.training.batch_size}",
        "memory": memory.describe(config.training.batch_size),
        "evaluation": f"{config.evaluation.samples:,} images by {config.steps} DDIM steps",
        "results": str(config.run_folder),
    }
    return Plan("tdq run ddim-digits-qat", lines)


def run(config: QATConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html` and `report.json`."""
    torch.set_num_threads(config.threads)
    settings = config.model_dump(mode="json")
    accelerator = make_accelerator(
        config.run_folder, config.training.mixed_precision, config.trackers, settings
    )
    model = load_float_model(config.model)
    model.unet.to(accelerator.device)
    with accelerator.main_process_first():
        state = RunState(config.run_folder, settings)
    points = _trajectories(config, model)
    observations = _observe(config, model, points)
    objective = _objective(config, model, points)
    for name in config.methods:
        if not _weights_path(state, name).exists():
            trained = _train(config, state, accelerator, model, name, observations, objective)
            if accelerator.is_main_process:
                save_weights(trained, _weights_path(state, name))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _evaluate(config, state, model, observations)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state.folder


def _trajectories(config: QATConfig, model: FloatModel) -> CalibrationSet:
    with tqdm(desc="calibration data", unit="call") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        return collect_trajectories(
            model.denoise,
            scheduler_with(model.scheduler, config.steps),
            image_shape(model.unet),
            **config.calibration.model_dump(),
            seed=config.seed,
            progress=show,
        )


def _observe(
    config: QATConfig, model: FloatModel, points: CalibrationSet
) -> dict[str, Observation]:
    device = model.unet.device
    batches = [(x.to(device), t.to(device)) for x, t in points.batches(128)]
    shown = tqdm(batches, desc="observe ranges", unit="batch")
    return tdq.calibrate(prepare(model.unet, config.widths).eval(), shown, warm_start=False)


def _objective(config: QATConfig, model: FloatModel, points: CalibrationSet) -> Objective:
    images, _ = load_images(config.data, image_shape(model.unet))
    size, seed = config.training.batch_size, config.seed
    inputs: Inputs = NoisedImages(images, model.scheduler, size, seed, config.data.flip)
    if config.objective == "data_free_distillation":
        inputs = FloatTrajectories(points, size, seed)
    teacher = None if config.objective == "noise" else model.denoise
    return Objective(inputs, teacher, weighting_of(config.weighting, model.scheduler))


def _train(
    config: QATConfig,
    state: RunState,
    accelerator: Accelerator,
    model: FloatModel,
    name: str,
    observations: dict[str, Observation],
    objective: Objective,
) -> nn.Module:
    quantized = prepare(model.unet, config.widths)
    apply_method(quantized, METHODS[name])
    training = Training(
        quantized,
        accelerator,
        config.training,
        config.scale_learning_rates[name],
        config.model_dump(mode="json", exclude={"methods", "output", "evaluation"}),
        config.seed,
    )
    checkpoint = state.folder / "checkpoints" / f"{name}.pt"
    if not training.resume(checkpoint):
        calibrate_bank(quantized, METHODS[name], observations)
    log = TrainingLog(state.folder / "logs" / f"{name}.jsonl", accelerator, training.step)
    progress = tqdm(
        total=config.training.iterations,
        initial=training.step,
        desc=f"{METHODS[name].title}: training",
        disable=not accelerator.is_main_process,
    )
    while training.step < config.training.iterations:
        result = training.advance(objective)
        progress.update()
        if result is not None:
            log.write(training.step, **result._asdict())
            progress.set_postfix(loss=f"{result.loss:.2e}", refresh=False)
        if training.step % config.training.checkpoint_every == 0:
            training.save(checkpoint)
    progress.close()
    return training.finish()


def _evaluate(
    config: QATConfig,
    state: RunState,
    model: FloatModel,
    observations: dict[str, Observation],
) -> None:
    model.unet.to("cpu")
    evaluator = make_evaluator(
        config.evaluation, config.steps, model, config.model, config.output / "float-images"
    )
    for name in config.methods:
        if state.result(name) is None:
            quantized = _trained(config, state, model, name, evaluator)
            title = f"{METHODS[name].title}: images"
            with tqdm(total=config.evaluation.samples, desc=title, unit="image") as progress:
                state.save_result(name, evaluator.evaluate(quantized, progress.update))
    deployed = "tdq" if "tdq" in config.methods else config.methods[0]
    quantized = _trained(config, state, model, deployed, evaluator)
    write_results(config, state, observations, evaluator, quantized, model.unet)


def _trained(
    config: QATConfig, state: RunState, model: FloatModel, name: str, evaluator: Evaluator
) -> fx.GraphModule:
    """The trained model of a method with its scales frozen for all timesteps of the evaluation."""
    quantized = prepare(model.unet, config.widths)
    apply_method(quantized, METHODS[name])
    load_weights(quantized, _weights_path(state, name))
    table = evaluate_table(tdq.scale_bank(quantized), evaluator.timesteps)
    table.save(state.table_path(name))
    return tdq.load_scales(quantized.eval(), table)


def _weights_path(state: RunState, name: str) -> Path:
    return state.folder / "weights" / f"{name}.safetensors"
