"""Configuration of the PTQ recipes for models of full size."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from tdq_plugin.recipes.bits import Bits, BitsName
from tdq_plugin.recipes.calibration import CalibrationSection
from tdq_plugin.recipes.config import RecipeConfig, filled_in, other_noise
from tdq_plugin.recipes.correction import CorrectionSection, row_titles
from tdq_plugin.recipes.evaluation.sample_evaluation import SampleEvaluationSection
from tdq_plugin.recipes.frameworks import FrameworkName
from tdq_plugin.recipes.image_data import ImageSection
from tdq_plugin.recipes.ptq.methods import METHODS, covers_trained_methods, known_methods
from tdq_plugin.recipes.ptq.training import (
    MethodTraining,
    ReconstructionSection,
    TrainingSection,
)
from tdq_plugin.recipes.ptq.weights import WeightChoice, is_symmetric

__all__ = ["FullSizePTQConfig"]


class FullSizePTQConfig(RecipeConfig):
    """Methods on a model of full size, judged by many samples.

    Attributes:
        adapter: The quantization framework.
        model: Folder of a saved diffusers pipeline with a UNet2DModel, or a hub repository.
        attention_heads: Of every attention, see `float_model.set_attention_heads`; null: as the
            pipeline's own configuration has them.
        bits: Bits of weights and activations, for example `W8A5`; the first and last layer keep 8.
        methods: Rows of the result: some of `tdq_plugin.recipes.ptq.methods.METHODS`.
        weights: Ranges of the weights, per output channel: `minmax` covers every weight and is
            symmetric, `asymmetric_minmax` has a zero point, as PTQ4DM's; `mse` has the least
            squared error; `adaround` is `mse` with a rounding that trained methods learn together
            with their scales; `native` is what the framework does itself.
        batch_size: Samples in a call of the model that trains nothing.
        data: Real images.
        calibration: Trajectories of the float model, by the sampler of the evaluation.
        reconstruction: How scales are trained.
        training: What is tuned for each trained method.
        correction: Which methods are also judged with a correction of their output.
        evaluation: How the methods are judged.
    """

    adapter: FrameworkName
    model: str
    attention_heads: int | None = Field(None, gt=0)
    bits: BitsName
    methods: list[str] = Field(min_length=1)
    weights: WeightChoice
    batch_size: int = Field(gt=0)
    data: ImageSection
    calibration: CalibrationSection
    reconstruction: ReconstructionSection
    training: dict[str, TrainingSection]
    correction: CorrectionSection
    evaluation: SampleEvaluationSection

    @field_validator("methods", "training")
    @classmethod
    def _known_methods(cls, names: list[str]) -> list[str]:
        return known_methods(names)

    @field_validator("weights")
    @classmethod
    def _something_learns(cls, weights: WeightChoice, info: ValidationInfo) -> WeightChoice:
        methods = info.data.get("methods")
        if weights == "adaround" and methods and not any(METHODS[name].trained for name in methods):
            raise ValueError(f"none of {methods} is trained, so no rounding would be learned")
        return weights

    @field_validator("training")
    @classmethod
    def _cover_trained_methods(
        cls, training: dict[str, TrainingSection], info: ValidationInfo
    ) -> dict[str, TrainingSection]:
        return covers_trained_methods(training, info.data.get("methods", []))

    @field_validator("correction")
    @classmethod
    def _correct_rows(cls, section: CorrectionSection, info: ValidationInfo) -> CorrectionSection:
        # Absent if they are wrong themselves, which is said already.
        return section.check(info.data.get("methods", section.methods), "methods")

    _other_noise = field_validator("evaluation")(other_noise)

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on; threads change the last bits.

        Not the steps of the evaluation: calibration follows the same sampler.
        """
        evaluation = SampleEvaluationSection.keys()
        return super().changeable | evaluation - {"evaluation.steps"} | {"threads"}

    @property
    def deployable_methods(self) -> list[str]:
        """Methods whose models are saved; none if the weights have zero points."""
        if not is_symmetric(self.weights):
            return []
        return [name for name in self.methods if METHODS[name].obstacle is None]

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{adapter}`, `{bits}`, `{weights}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"adapter", "bits", "weights", "seed"})
        return self.output / filled_in(self.name, **filled)

    @property
    def rows(self) -> dict[str, str]:
        """Names of the rows of quantized models and their titles."""
        return row_titles(METHODS, self.methods, self.correction.methods)

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits.parse(self.bits)

    def training_of(self, method: str) -> MethodTraining | None:
        """How a method is trained; None for those that are not."""
        if not METHODS[method].trained:
            return None
        learn_rounding = self.weights == "adaround"
        return self.reconstruction.of(self.training[method], learn_rounding, self.seed)
