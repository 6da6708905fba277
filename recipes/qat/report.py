"""Turn the results of compared methods into the saved model, `report.json` and `report.html`."""

from typing import Any

from torch import Tensor

from tdq_plugin.recipes.correction import NOTE as CORRECTION
from tdq_plugin.recipes.correction import method_of
from tdq_plugin.recipes.evaluation.denoiser import Evaluator, Result
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES
from tdq_plugin.recipes.plan import parameter_bytes
from tdq_plugin.recipes.qat.comparison import Comparison, execution_of, trained
from tdq_plugin.recipes.qat.config import ComparisonConfig
from tdq_plugin.recipes.qat.methods import METHODS
from tdq_plugin.recipes.qat.stages import QATRun
from tdq_plugin.recipes.report_parts import command, dynamics, versions
from tdq_plugin.recipes.saved_model import save_model
from tdq_plugin.study import write_report
from tdq_plugin.study.figures import error_over_timesteps, sample_grid
from tdq_plugin.study.schema import Latency, Report, ReportRow, SizeBytes

__all__ = ["write_results"]

NOTES = [
    "Every method starts from the same float model and calibration, sees the same batches for the "
    "same number of steps, and trains the weights as well. Timesteps of the unseen error lie "
    "between those of the sampler; training on noised images visits them, training on trajectories "
    "does not.",
    "Training does not change the speed of the integer model: see the report of ddim-digits-ptq.",
]
LATENT_NOTE = (
    "The model denoises latents: errors of noise and of steps are those of latents. Images, their "
    "pixels and features are decoded by the autoencoder, which stays float; the sizes are those of "
    "the denoiser alone."
)
FAKE_NOTE = "This framework has no integer kernels here: models run as fake quantization."
NOT_TIMED: Latency = {
    "float32": None,
    "static_int8": None,
    "tdq_int8": None,
    "dynamic_int8": None,
    "unit": "not measured by this recipe",
}


def write_results(recipe: str, comparison: Comparison, evaluator: Evaluator) -> None:
    """Save the model of TDQ, or of the first method with a table, and write the report."""
    run, config, state = comparison.run, comparison.run.config, comparison.run.state
    sizes = _save(recipe, comparison, evaluator)
    report: Report = {
        "recipe": recipe,
        "command": command(recipe, config),
        "seed": config.seed,
        "bits": config.bits,
        "versions": versions("tdq-plugin", "torch", "diffusers", "accelerate", "torchmetrics"),
        "rows": _rows(run, evaluator),
        "methods": {METHODS[name].title: METHODS[name].description for name in config.methods},
        "notes": _notes(run),
        "latency": NOT_TIMED,
        "size_bytes": sizes,
        "noise_floor": evaluator.noise_floor(),
        "temporal_dynamics": dynamics(comparison.observations),
    }
    write_report(state.folder, report, _figures(run, evaluator))


def _save(recipe: str, comparison: Comparison, evaluator: Evaluator) -> SizeBytes:
    run, config, state = comparison.run, comparison.run.config, comparison.run.state
    tables = [name for name in config.methods if not METHODS[name].dynamic]
    if not tables:
        return {"float32": parameter_bytes(run.model.unet), "int8": None}
    deployed = "tdq" if "tdq" in tables else tables[0]
    return save_model(
        run.framework,
        trained(comparison, deployed, evaluator),
        state.folder / "model",
        run.model.unet,
        evaluator.scheduler,
        {"recipe": recipe, "method": deployed, "bits": config.bits, "steps": config.steps},
        state.correction_path(deployed) if deployed in config.correction.methods else None,
    )


def _notes(run: QATRun[ComparisonConfig]) -> list[str]:
    latent = [] if run.model.autoencoder is None else [LATENT_NOTE]
    fake = [FAKE_NOTE] if run.framework.execution == "fake" else []
    return [*NOTES, *latent, *fake, *([CORRECTION] if run.config.correction.methods else [])]


def _rows(run: QATRun[ComparisonConfig], evaluator: Evaluator) -> list[ReportRow]:
    common = {"samples": run.config.evaluation.samples, "feature_space": FEATURE_SPACES["digits"]}
    rows: list[Any] = [
        {"method": "float32", "execution": "float32", **evaluator.float_metrics(), **common}
    ]
    for name, title in run.config.rows.items():
        execution = execution_of(run.framework, method_of(name))
        measured = {**_result(run, name).metrics, **common}
        rows.append({"method": title, "key": name, "execution": execution} | measured)
    return rows


def _result(run: QATRun[ComparisonConfig], name: str) -> Result:
    result = run.state.result(name, execution_of(run.framework, method_of(name)))
    assert result is not None
    return result


def _figures(run: QATRun[ComparisonConfig], evaluator: Evaluator) -> dict[str, tuple[bytes, str]]:
    images: dict[str, Tensor] = {"float32": evaluator.images}
    curves = {}
    for name, title in run.config.rows.items():
        result = _result(run, name)
        images[title] = result.images
        curves[title] = (result.timesteps, result.errors)
    return {
        "Samples from the same noise": (
            sample_grid(images, columns=16),
            "Every column starts from the same noise. A method is good where its digits are those "
            "of the float model.",
        ),
        "Error along the sampler's way": (
            error_over_timesteps(curves),
            "Mean squared error of the predicted noise at each timestep of the float model's "
            "trajectory. Sampling runs from right to left.",
        ),
    }
