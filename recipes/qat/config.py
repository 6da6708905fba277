"""Configuration of the QAT recipes: what all share, many methods compared, one in full size."""

from dataclasses import replace
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationInfo, field_validator

from tdq_plugin.recipes.bits import Bits, BitsName
from tdq_plugin.recipes.calibration import TrajectorySection
from tdq_plugin.recipes.config import RecipeConfig, Section, filled_in, other_noise
from tdq_plugin.recipes.correction import CorrectionSection, row_titles
from tdq_plugin.recipes.evaluation.digits_evaluation import EvaluationSection, check_measurable
from tdq_plugin.recipes.evaluation.sample_evaluation import SampleEvaluationSection
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.frameworks import FrameworkName
from tdq_plugin.recipes.image_data import DataSection
from tdq_plugin.recipes.objectives import ObjectiveName, WeightingName
from tdq_plugin.recipes.qat.methods import METHODS
from tdq_plugin.recipes.qat.training import TrainingSection
from tdq_plugin.recipes.qat.training_log import Tracker

__all__ = ["ComparisonConfig", "FullSizeConfig", "QATConfig"]


class QATConfig(RecipeConfig):
    """What every QAT recipe takes.

    Attributes:
        model: Folder of a saved diffusers pipeline with a UNet2DModel, or a hub repository.
        adapter: The quantization framework.
        bits: Bits of weights and activations, for example `W4A4`.
        objective: `noise` (the training loss of diffusion models on data, the paper's choice),
            `distillation` (the float model's output on noised data), or `data_free_distillation`
            (on its own trajectories).
        weighting: Of the timesteps in the loss, see `objectives.weighting_of`.
        absolute_error: Mean absolute instead of squared error.
        data: Training images.
        training: How weights and scales are trained.
        trackers: Accelerate's trackers, beside the JSON lines.
    """

    model: str
    adapter: FrameworkName
    bits: BitsName
    objective: ObjectiveName
    weighting: WeightingName
    absolute_error: bool = False
    data: DataSection
    training: TrainingSection
    trackers: list[Tracker]

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on; threads change the last bits."""
        reported = {"trackers", "training.log_every", "training.checkpoint_every"}
        return super().changeable | reported | {"threads"}

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits.parse(self.bits)

    def check_model(self, model: FloatModel) -> None:
        """See that the recipe can take the float model; one that takes all says nothing."""


class ComparisonConfig(QATConfig):
    """Many methods side by side, on one model that is small; its outer layers keep 8 bits.

    Attributes:
        steps: Steps of the DDIM sampler; calibration uses the same.
        methods: Rows of the report.
        calibration: Where the first scales come from.
        scale_learning_rates: Of each method's scale bank.
        weight_learning_rates: Of the network's parameters with methods that have their own, instead
            of `training.learning_rate`.
        correction: Which methods are also measured with a correction of their output.
        evaluation: What the methods are measured on.
        trained: Folder of another run of the recipe: its weights are measured, none are trained.
        scale_history: Training steps whose scales over t are kept, in `scales/METHOD/STEP`.
    """

    steps: int = Field(ge=2, le=500)
    methods: list[str] = Field(min_length=1)
    calibration: TrajectorySection
    scale_learning_rates: dict[str, PositiveFloat]
    weight_learning_rates: dict[str, PositiveFloat] = Field(default={})
    correction: CorrectionSection
    evaluation: EvaluationSection
    trained: Path | None = None
    scale_history: list[NonNegativeInt] = Field(default=[])

    @field_validator("methods", "scale_learning_rates", "weight_learning_rates")
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

    @field_validator("correction")
    @classmethod
    def _correct_methods(
        cls, section: CorrectionSection, info: ValidationInfo
    ) -> CorrectionSection:
        # Absent if they are wrong themselves, which is said already.
        return section.check(info.data.get("methods", section.methods), "methods")

    @field_validator("scale_history")
    @classmethod
    def _within_the_training(cls, steps: list[int], info: ValidationInfo) -> list[int]:
        training = info.data.get("training")
        if steps and training is not None and max(steps) > training.iterations:
            raise ValueError(f"training has only {training.iterations} iterations")
        return steps

    _other_noise = field_validator("evaluation")(other_noise)

    def check_model(self, model: FloatModel) -> None:
        """See that the model's images can be measured.

        Raises:
            ConfigError: They are not grey.
        """
        check_measurable(model)

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{adapter}`, `{bits}`, `{steps}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"adapter", "bits", "steps", "seed"})
        return self.output / filled_in(self.name, **filled)

    @property
    def rows(self) -> dict[str, str]:
        """Names of the report's rows and their titles; a corrected row follows its method."""
        return row_titles(METHODS, self.methods, self.correction.methods)

    def training_of(self, method: str) -> TrainingSection:
        """How a method is trained: as all are, but with its own learning rate if it has one."""
        rate = self.weight_learning_rates.get(method, self.training.learning_rate)
        return self.training.model_copy(update={"learning_rate": rate})


class NoisedImagesSection(Section):
    """Noised images at random timesteps that set the first scales."""

    batches: int = Field(gt=0)
    batch_size: int = Field(ge=2)


class ValidationSection(Section):
    """Validate `every` so many steps on `batches` batches, and keep the `keep` best weights."""

    every: int = Field(gt=0)
    batches: int = Field(gt=0)
    keep: int = Field(gt=0)


class FullSizeConfig(QATConfig):
    """One method on a model of full size, judged by many samples.

    Attributes:
        method: One of `tdq_plugin.recipes.qat.methods.METHODS`.
        float_layers: Layers that stay float besides those that see the timestep only.
        dropout: Of the residual blocks during training.
        trajectories: Of the float model, for `data_free_distillation`.
        calibration: Where the first scales come from.
        scale_learning_rate: Of the scale bank.
        validation: When to validate, and how many weights to keep.
        evaluation: How the kept weights are judged.
    """

    method: str
    float_layers: list[str]
    dropout: float = Field(ge=0, lt=1)
    trajectories: int = Field(gt=0)
    calibration: NoisedImagesSection
    scale_learning_rate: PositiveFloat
    validation: ValidationSection
    evaluation: SampleEvaluationSection

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"is no method; choose from {list(METHODS)}")
        return name

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on: the evaluation's, too."""
        evaluation = SampleEvaluationSection.keys()
        if self.objective == "data_free_distillation":
            evaluation.remove("evaluation.steps")  # Training follows the same sampler.
        return super().changeable | evaluation

    @property
    def widths(self) -> Bits:
        """The bits as numbers; all layers that are quantized have the same."""
        layers = tuple(self.float_layers)
        return replace(Bits.parse(self.bits), first_last=None, float_layers=layers)

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{adapter}`, `{method}`, `{bits}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"adapter", "method", "bits", "seed"})
        return self.output / filled_in(self.name, **filled)
