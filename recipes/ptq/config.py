"""Configuration of the PTQ recipes that compare methods."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.bits import Bits, BitsName
from tdq_plugin.recipes.calibration import CalibrationSection
from tdq_plugin.recipes.config import ASSETS, RecipeConfig, filled_in, other_noise
from tdq_plugin.recipes.correction import CorrectionSection, row_titles
from tdq_plugin.recipes.evaluation.digits_evaluation import UNSEEN, EvaluationSection
from tdq_plugin.recipes.frameworks import Framework, FrameworkName
from tdq_plugin.recipes.ptq.methods import METHODS, covers_trained_methods, known_methods
from tdq_plugin.recipes.ptq.training import (
    MethodTraining,
    ReconstructionSection,
    TrainingSection,
)

__all__ = ["PTQConfig"]

MODEL = ASSETS / "ddim-digits"


class RoundingSection(ReconstructionSection):
    """`learn_rounding` also learns how weights are rounded (AdaRound).

    `null` does so where the framework's weights allow it.
    """

    learn_rounding: bool | None


class PTQConfig(RecipeConfig):
    """Many methods side by side, on one small model.

    Attributes:
        adapter: The quantization framework.
        bits: Bits of weights and activations, for example `W8A4`; the first and last layer keep 8.
        steps: Steps of the DDIM sampler; calibration uses the same. At most half of the process,
            so that there are timesteps between them that calibration never saw.
        int8_methods: Rows of the report that run as deployed, on integer kernels where the
            framework has them.
        fake_methods: Rows that run as fake quantization; a method may be in both.
        calibration: Where calibration data come from; the evaluation's unseen timesteps are 0.5
            later than the sampler's.
        reconstruction: How scales are trained.
        training: What is tuned for each trained method.
        correction: Which methods are also measured with a correction of their output.
        evaluation: What the methods are measured on.
        latency_rounds: Paired timings of the integer model.
        model: Folder of the float model, a saved diffusers pipeline.
    """

    adapter: FrameworkName
    bits: BitsName
    steps: int = Field(ge=2, le=500)
    int8_methods: list[str]
    fake_methods: list[str]
    calibration: CalibrationSection
    reconstruction: RoundingSection
    training: dict[str, TrainingSection]
    correction: CorrectionSection
    evaluation: EvaluationSection
    latency_rounds: int = Field(ge=2)
    model: Path = MODEL

    @field_validator("training", "int8_methods", "fake_methods")
    @classmethod
    def _known_methods(cls, names: Any) -> Any:
        return known_methods(names)

    @field_validator("int8_methods")
    @classmethod
    def _can_be_deployed(cls, names: list[str]) -> list[str]:
        for name in names:
            if METHODS[name].obstacle is not None:
                raise ValueError(f"[{name!r}] {METHODS[name].obstacle}; put them into fake_methods")
        if not {"lsq", "tdq"} <= set(names):
            raise ValueError("lsq and tdq are needed, which the report compares")
        return names

    @field_validator("calibration")
    @classmethod
    def _leave_timesteps_unseen(cls, calibration: CalibrationSection) -> CalibrationSection:
        if UNSEEN in calibration.shifts:
            raise ValueError(f"shifts: the timesteps that are {UNSEEN} later are those of the test")
        return calibration

    @field_validator("training")
    @classmethod
    def _cover_trained_methods(cls, training: dict[str, Any], info: ValidationInfo) -> Any:
        used = {*info.data.get("int8_methods", []), *info.data.get("fake_methods", [])}
        return covers_trained_methods(training, used)

    @field_validator("correction")
    @classmethod
    def _correct_deployed_methods(cls, section: CorrectionSection, info: ValidationInfo) -> Any:
        # Absent if they are wrong themselves, which is said already.
        return section.check(info.data.get("int8_methods", section.methods), "int8_methods")

    _other_noise = field_validator("evaluation")(other_noise)

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{adapter}`, `{bits}`, `{steps}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"adapter", "bits", "steps", "seed"})
        return self.output / filled_in(self.name, **filled)

    @property
    def methods(self) -> list[str]:
        """All methods of the report, in the order of `METHODS`."""
        return [name for name in METHODS if name in {*self.int8_methods, *self.fake_methods}]

    @property
    def rows(self) -> dict[str, str]:
        """Names of the report's rows and their titles; a corrected row follows its method."""
        return row_titles(METHODS, self.methods, self.correction.methods)

    @property
    def widths(self) -> Bits:
        """The bits as numbers."""
        return Bits.parse(self.bits)

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

    def training_of(self, method: str, framework: Framework) -> MethodTraining | None:
        """How a method is trained; None for those that are not."""
        if not METHODS[method].trained:
            return None
        learn_rounding = self.learns_rounding(framework)
        return self.reconstruction.of(self.training[method], learn_rounding, self.seed)
