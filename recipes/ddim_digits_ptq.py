"""Quantize the digits DDIM by each method, sample with the result, and write a report."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationInfo, field_validator
from torch import Tensor, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.recipes.evaluation import Evaluator
from tdq_plugin.recipes.frameworks import Framework, FrameworkName, load_framework
from tdq_plugin.recipes.method_states import MethodStates
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.ptq_quantize import apply_method, sampler_weighting
from tdq_plugin.recipes.ptq_report import write_results
from tdq_plugin.recipes.reference import cached_images
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import Denoiser, image_shape, sample, scheduler_with
from tdq_plugin.reconstruct import (
    CalibrationSet,
    Granularity,
    Progress,
    ReconstructionConfig,
    TimestepDistribution,
    collect_trajectories,
)
from tdq_plugin.scales import TrainableBank

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
    """The training that `lsq`, `learned_table` and the `tdq` methods share.

    `learn_rounding` also learns how weights are rounded (AdaRound); `null` does so where the
    framework's weights allow it.
    """

    granularity: Granularity
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learn_rounding: bool | None


class EvaluationSection(_Section):
    """Images drawn per method, float trajectories followed, and the seed of their noise."""

    samples: int = Field(ge=100)
    trajectories: int = Field(gt=0)
    seed: int


class PTQConfig(RecipeConfig):
    """Configuration of `ddim-digits-ptq`.

    Attributes:
        adapter: The quantization framework.
        bits: Bits of weights and activations, for example `W8A4`; the first and last layer keep 8.
        steps: Steps of the DDIM sampler; calibration uses the same. At most half of the process,
            so that there are timesteps between them that calibration never saw.
        int8_methods: Rows of the report that run as deployed, on integer kernels where the
            framework has them.
        fake_methods: Rows that run as fake quantization; a method may be in both.
        calibration: Where calibration data come from.
        reconstruction: How scales are trained.
        learning_rates: Of each trained method; zero points learn ten times as fast.
        evaluation: What the methods are measured on.
        latency_rounds: Paired timings of the integer model.
        model: Folder of the float model, a saved diffusers pipeline.
    """

    adapter: FrameworkName
    bits: str = Field(pattern=r"^W[2-8]A[2-8]$")
    steps: int = Field(ge=2, le=500)
    int8_methods: list[str]
    fake_methods: list[str]
    calibration: CalibrationSection
    reconstruction: ReconstructionSection
    learning_rates: dict[str, PositiveFloat]
    evaluation: EvaluationSection
    latency_rounds: int = Field(ge=2)
    model: Path = MODEL

    @field_validator("name")
    @classmethod
    def _can_be_filled_in(cls, name: str) -> str:
        try:
            name.format(adapter="torch_ao", bits="W8A4", steps=20, seed=0)
        except (KeyError, IndexError, ValueError):
            raise ValueError("only {adapter}, {bits}, {steps} and {seed} are filled in") from None
        return name

    @field_validator("learning_rates", "int8_methods", "fake_methods")
    @classmethod
    def _known_methods(cls, names: Any) -> Any:
        unknown = sorted(set(names) - set(METHODS))
        if unknown:
            raise ValueError(f"{unknown} are no methods; choose from {list(METHODS)}")
        return names

    @field_validator("int8_methods")
    @classmethod
    def _have_tables(cls, names: list[str]) -> list[str]:
        dynamic = [name for name in names if METHODS[name].dynamic]
        if dynamic or not {"lsq", "tdq"} <= set(names):
            raise ValueError(f"{dynamic or names}: lsq and tdq are needed, dynamic has no table")
        return names

    @field_validator("learning_rates")
    @classmethod
    def _cover_trained_methods(cls, rates: dict[str, float], info: ValidationInfo) -> Any:
        used = {*info.data.get("int8_methods", []), *info.data.get("fake_methods", [])}
        missing = [name for name in used if METHODS[name].trained and name not in rates]
        if missing:
            raise ValueError(f"{sorted(missing)} are trained and have no learning rate")
        return rates

    @field_validator("evaluation")
    @classmethod
    def _other_noise(cls, evaluation: EvaluationSection, info: ValidationInfo) -> Any:
        if evaluation.seed == info.data.get("seed"):
            raise ValueError("with the same seed, calibration would see the noise of the test")
        return evaluation

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{adapter}`, `{bits}`, `{steps}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"adapter", "bits", "steps", "seed"})
        return self.output / self.name.format(**filled)

    @property
    def methods(self) -> list[str]:
        """All methods of the report, in the order of `METHODS`."""
        return [name for name in METHODS if name in {*self.int8_methods, *self.fake_methods}]

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits(int(self.bits[1]), int(self.bits[3]))

    def learns_rounding(self, framework: Framework) -> bool:
        """Whether trained methods learn how weights are rounded.

        Raises:
            ConfigError: They shall, and the framework's weights do not allow it.
        """
        wanted = self.reconstruction.learn_rounding
        if wanted and not framework.learns_rounding:
            raise ConfigError(
                f"reconstruction.learn_rounding = true: {self.adapter} rounds weights itself. "
                "Set it to false or null."
            )
        return framework.learns_rounding if wanted is None else wanted

    def training(self, method: str, framework: Framework) -> ReconstructionConfig:
        """How a trained method's scales are trained."""
        rate = self.learning_rates[method]
        return ReconstructionConfig(
            **self.reconstruction.model_dump(exclude={"learn_rounding"}),
            learn_rounding=self.learns_rounding(framework),
            learning_rate=rate,
            zero_point_learning_rate=10 * rate,
            seed=self.seed,
        )


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
            training = config.training(name, framework) if METHODS[name].trained else None
            bank = _train(state, model, unet, name, training, observations, data, scheduler)
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
    with tqdm(desc="calibration data", unit="call") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        return collect_trajectories(
            lambda x, t: unet(x, t, return_dict=False)[0],
            scheduler_with(scheduler, config.steps),
            image_shape(unet),
            **config.calibration.model_dump(),
            seed=config.seed,
            progress=show,
        )


def _observe(model: nn.Module, data: CalibrationSet) -> dict[str, Observation]:
    batches = list(data.batches(128))
    shown = tqdm(batches, desc="observe ranges", unit="batch")
    return tdq.calibrate(model, shown, warm_start=False)


def _train(
    state: RunState,
    model: nn.Module,
    unet: UNet2DModel,
    name: str,
    training: ReconstructionConfig | None,
    observations: dict[str, Observation],
    data: CalibrationSet,
    scheduler: DDIMScheduler,
) -> TrainableBank:
    method = METHODS[name]
    checkpoint = state.folder / "checkpoints" / f"{name}.safetensors"
    title = f"{method.title}: scales"
    with tqdm(desc=title, unit="step", disable=not method.trained) as progress:

        def show(now: Progress) -> None:
            progress.total = now.steps
            progress.set_postfix(block=now.block, loss=f"{now.loss:.2e}", refresh=False)
            progress.update(now.step - progress.n)

        weighting = sampler_weighting(scheduler)
        return apply_method(
            model, unet, method, observations, data, training, weighting, checkpoint, show
        )


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
