"""Turn the results of compared methods into the saved model, `report.json` and `report.html`."""

from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from tdq_plugin.observe import Observation
from tdq_plugin.recipes.correction import NOTE as CORRECTION
from tdq_plugin.recipes.correction import method_of
from tdq_plugin.recipes.evaluation import Evaluator, Result
from tdq_plugin.recipes.image_quality import FEATURE_SPACES
from tdq_plugin.recipes.qat_comparison import trained
from tdq_plugin.recipes.qat_config import ComparisonConfig
from tdq_plugin.recipes.qat_methods import METHODS
from tdq_plugin.recipes.qat_model import save_integer_model
from tdq_plugin.recipes.qat_stages import QATRun
from tdq_plugin.recipes.report_parts import command, dynamics, versions
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.study import write_report
from tdq_plugin.study.figures import error_over_timesteps, sample_grid
from tdq_plugin.study.schema import Latency, Report, ReportRow

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
NOT_TIMED: Latency = {
    "float32": None,
    "static_int8": None,
    "tdq_int8": None,
    "dynamic_int8": None,
    "unit": "not measured by this recipe",
}


def write_results(
    recipe: str,
    run: QATRun[ComparisonConfig],
    observations: dict[str, Observation],
    evaluator: Evaluator,
) -> None:
    """Save the integer model of TDQ, or of the first method, and write the report."""
    config, state, unet = run.config, run.state, run.model.unet
    deployed = "tdq" if "tdq" in config.methods else config.methods[0]
    size = save_integer_model(
        state.folder / "model",
        trained(run, deployed, evaluator),
        unet,
        evaluator.scheduler,
        recipe,
        state.correction_path(deployed) if deployed in config.correction.methods else None,
    )
    report: Report = {
        "recipe": recipe,
        "command": command(recipe, config),
        "seed": config.seed,
        "bits": config.bits,
        "versions": versions("tdq-plugin", "torch", "diffusers", "accelerate", "torchmetrics"),
        "rows": _rows(config, state, evaluator),
        "methods": {METHODS[name].title: METHODS[name].description for name in config.methods},
        "notes": _notes(run),
        "latency": NOT_TIMED,
        "size_bytes": {"float32": _float_bytes(unet), "int8": size},
        "noise_floor": evaluator.noise_floor(),
        "temporal_dynamics": dynamics(observations),
    }
    write_report(state.folder, report, _figures(config, state, evaluator))


def _notes(run: QATRun[ComparisonConfig]) -> list[str]:
    latent = [] if run.model.autoencoder is None else [LATENT_NOTE]
    return [*NOTES, *latent, *([CORRECTION] if run.config.correction.methods else [])]


def _float_bytes(unet: UNet2DModel) -> int:
    return sum(p.numel() * p.element_size() for p in unet.parameters())


def _rows(config: ComparisonConfig, state: RunState, evaluator: Evaluator) -> list[ReportRow]:
    common = {"samples": config.evaluation.samples, "feature_space": FEATURE_SPACES["digits"]}
    rows: list[Any] = [
        {"method": "float32", "execution": "float32", **evaluator.float_metrics(), **common}
    ]
    for name, title in config.rows.items():
        measured = {**_result(state, name).metrics, **common}
        execution = METHODS[method_of(name)].execution
        rows.append({"method": title, "key": name, "execution": execution} | measured)
    return rows


def _result(state: RunState, name: str) -> Result:
    result = state.result(name, METHODS[method_of(name)].execution)
    assert result is not None
    return result


def _figures(
    config: ComparisonConfig, state: RunState, evaluator: Evaluator
) -> dict[str, tuple[bytes, str]]:
    images: dict[str, Tensor] = {"float32": evaluator.images}
    curves = {}
    for name, title in config.rows.items():
        result = _result(state, name)
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
