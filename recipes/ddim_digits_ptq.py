"""Quantize the digits DDIM by each method, run it with integer kernels, and write a report."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, UNet2DModel
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.ptq_deploy import integer_model
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.ptq_quantize import Bits, apply_method, prepare, sampler_weighting
from tdq_plugin.recipes.ptq_report import write_results
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import scheduler_with
from tdq_plugin.reconstruct import (
    CalibrationSet,
    Granularity,
    ReconstructionConfig,
    TimestepDistribution,
    collect_trajectories,
)

__all__ = ["PTQConfig", "run"]

MODEL = Path(__file__).parent / "assets" / "ddim-digits"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSection(_Section):
    """Calibration data: `images` trajectories of the float model, within `byte_budget`."""

    images: int = Field(gt=0)
    distribution: TimestepDistribution
    byte_budget: int = Field(gt=0)


class ReconstructionSection(_Section):
    """The training that `lsq`, `learned_table` and the `tdq` methods share."""

    granularity: Granularity
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)


class EvaluationSection(_Section):
    """Images drawn per method, float trajectories followed, and the seed of their noise."""

    samples: int = Field(ge=100)
    trajectories: int = Field(gt=0)
    seed: int


class PTQConfig(RecipeConfig):
    """Configuration of `ddim-digits-ptq`.

    Attributes:
        bits: Bits of weights and activations, for example `W8A4`; the first and last layer keep 8.
        steps: Steps of the DDIM sampler; calibration uses the same.
        methods: Rows of the report.
        int8_methods: Which of them are run with integer kernels, too.
        calibration: Where calibration data come from.
        reconstruction: How scales are trained.
        learning_rates: Of each trained method.
        evaluation: What the methods are measured on.
        latency_rounds: Paired timings of the integer model.
        model: Folder of the float model, a saved diffusers pipeline.
    """

    bits: str = Field(pattern=r"^W[2-8]A[2-8]$")
    steps: int = Field(ge=2, le=1000)
    methods: list[Literal[tuple(METHODS)]]  # type: ignore[valid-type]
    int8_methods: list[Literal["mse", "lsq", "tdq"]]
    calibration: CalibrationSection
    reconstruction: ReconstructionSection
    learning_rates: dict[str, float]
    evaluation: EvaluationSection
    latency_rounds: int = Field(gt=0)
    model: Path = MODEL

    @field_validator("learning_rates")
    @classmethod
    def _known_methods(cls, rates: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(rates) - set(METHODS))
        if unknown:
            raise ValueError(f"{unknown} are no methods; choose from {list(METHODS)}")
        return rates

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits(int(self.bits[1]), int(self.bits[3]))

    def training(self, method: str) -> ReconstructionConfig:
        """How a method's scales are trained."""
        rate = self.learning_rates.get(method, 3e-3)
        return ReconstructionConfig(
            **self.reconstruction.model_dump(),
            learning_rate=rate,
            zero_point_learning_rate=10 * rate,
            seed=self.seed,
        )


def run(config: PTQConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html`, `report.json`, `model/`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    state = RunState(config.run_folder, config.model_dump(mode="json"))
    unet = UNet2DModel.from_pretrained(config.model, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(config.model, subfolder="scheduler")
    evaluator = _evaluator(config, unet, scheduler)
    data = _calibration_data(config, unet, scheduler)
    model = prepare(unet, data_example(data), config.widths)
    observations = _observe(model, data)
    for name in config.methods:
        if state.result(name) is None:
            _measure(config, state, model, name, observations, data, scheduler, evaluator)
    for name in config.int8_methods:
        if state.result(name, "int8") is None:
            integer = integer_model(state, model, name)
            with _images(config, f"{METHODS[name].title} int8: images") as progress:
                state.save_result(name, evaluator.evaluate(integer, progress.update), "int8")
    return write_results(config, state, model, observations, evaluator, unet)


def data_example(data: CalibrationSet) -> tuple[Tensor, Tensor]:
    """A batch for tracing."""
    return data.samples[:2], data.timesteps[:2]


def _evaluator(config: PTQConfig, unet: nn.Module, scheduler: DDIMScheduler) -> Evaluator:
    generator = torch.Generator().manual_seed(config.evaluation.seed)
    shape = (1, config_size(unet), config_size(unet))
    with tqdm(total=2 * config.evaluation.samples, desc="float32: images") as progress:
        return Evaluator(
            denoiser=lambda x, t: unet(x, t, return_dict=False)[0],
            scheduler=scheduler,
            steps=config.steps,
            unseen_offset=500 // config.steps,
            noise=torch.randn(config.evaluation.samples, *shape, generator=generator),
            other_noise=torch.randn(config.evaluation.samples, *shape, generator=generator),
            trajectory_noise=torch.randn(
                config.evaluation.trajectories, *shape, generator=generator
            ),
            features=load_classifier().features,
            data=load_digits(config_size(unet))[0],
            advance=progress.update,
        )


def config_size(unet: nn.Module) -> int:
    """Height and width of the model's images."""
    size: int = unet.config.sample_size
    return size


def _calibration_data(
    config: PTQConfig, unet: nn.Module, scheduler: DDIMScheduler
) -> CalibrationSet:
    with tqdm(desc="calibration data", unit="call") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        return collect_trajectories(
            lambda x, t: unet(x, t, return_dict=False)[0],
            scheduler_with(scheduler, config.steps),
            (1, config_size(unet), config_size(unet)),
            **config.calibration.model_dump(),
            seed=config.seed,
            progress=show,
        )


def _observe(model: fx.GraphModule, data: CalibrationSet) -> dict[str, Observation]:
    batches = list(data.batches(128))
    shown = tqdm(batches, desc="observe ranges", unit="batch")
    return tdq.calibrate(model, shown, warm_start=False)


def _measure(
    config: PTQConfig,
    state: RunState,
    model: fx.GraphModule,
    name: str,
    observations: dict[str, Observation],
    data: CalibrationSet,
    scheduler: DDIMScheduler,
    evaluator: Evaluator,
) -> None:
    method, training = METHODS[name], config.training(name)
    with tqdm(total=training.iterations, desc=f"{method.title}: train") as progress:

        def show(now: Any) -> None:
            progress.total = now.steps
            progress.set_postfix(block=now.block, loss=f"{now.loss:.2e}", refresh=False)
            progress.update(now.step - progress.n)

        bank = apply_method(
            model,
            method,
            observations,
            data,
            training,
            sampler_weighting(scheduler),
            state.folder / "checkpoints" / f"{name}.safetensors",
            show,
        )
    table = evaluate_table(bank, evaluator.timesteps)
    model.scale_bank = tdq.FrozenBank(table)
    with _images(config, f"{method.title}: images") as progress:
        result = evaluator.evaluate(model, progress.update)
    model.scale_bank = bank
    table.save(state.table_path(name))
    state.save_result(name, result)


def _images(config: PTQConfig, title: str) -> Any:
    return tqdm(total=config.evaluation.samples, desc=title, unit="image")
