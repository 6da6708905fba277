"""Turn the results of `ddim-digits-qat` into the saved model, `report.json` and `report.html`."""

from typing import TYPE_CHECKING, Any

from diffusers import UNet2DModel
from torch import Tensor, fx

from tdq_plugin.observe import Observation
from tdq_plugin.recipes.evaluation import Evaluator, Result
from tdq_plugin.recipes.image_quality import FEATURE_SPACES
from tdq_plugin.recipes.qat_methods import METHODS
from tdq_plugin.recipes.qat_model import save_integer_model
from tdq_plugin.recipes.report_parts import command, dynamics, versions
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.study import write_report
from tdq_plugin.study.figures import error_over_timesteps, sample_grid
from tdq_plugin.study.schema import Latency, Report, ReportRow

if TYPE_CHECKING:
    from tdq_plugin.recipes.ddim_digits_qat import QATConfig

__all__ = ["write_results"]

RECIPE = "ddim-digits-qat"
NOTES = [
    "Every method starts from the same float model and calibration, sees the same batches for the "
    "same number of steps, and trains the weights as well. Timesteps of the unseen error lie "
    "between those of the sampler; training on noised images visits them, training on trajectories "
    "does not.",
    "Training does not change the speed of the integer model: see the report of ddim-digits-ptq.",
]
NOT_TIMED: Latency = {
    "float32": None,
    "static_int8": None,
    "tdq_int8": None,
    "dynamic_int8": None,
    "unit": "not measured by this recipe",
}


def write_results(
    config: "QATConfig",
    state: RunState,
    observations: dict[str, Observation],
    evaluator: Evaluator,
    deployed: fx.GraphModule,
    unet: UNet2DModel,
) -> None:
    """Save the integer model of `deployed`, a frozen model, and write the report."""
    size = save_integer_model(state.folder / "model", deployed, unet, evaluator.scheduler, RECIPE)
    report: Report = {
        "recipe": RECIPE,
        "command": command(RECIPE, config),
        "seed": config.seed,
        "bits": config.bits,
        "versions": versions("tdq-plugin", "torch", "diffusers", "accelerate", "torchmetrics"),
        "rows": _rows(config, state, evaluator),
        "methods": {METHODS[name].title: METHODS[name].description for name in config.methods},
        "notes": NOTES,
        "latency": NOT_TIMED,
        "size_bytes": {"float32": _float_bytes(unet), "int8": size},
        "noise_floor": evaluator.noise_floor(),
        "temporal_dynamics": dynamics(observations),
    }
    write_report(state.folder, report, _figures(config, state, evaluator))


def _float_bytes(unet: UNet2DModel) -> int:
    return sum(p.numel() * p.element_size() for p in unet.parameters())


def _rows(config: "QATConfig", state: RunState, evaluator: Evaluator) -> list[ReportRow]:
    common = {"samples": config.evaluation.samples, "feature_space": FEATURE_SPACES["digits"]}
    rows: list[Any] = [
        {"method": "float32", "execution": "float32", **evaluator.float_metrics(), **common}
    ]
    for name in config.methods:
        measured = {**_result(state, name).metrics, **common}
        rows.append({"method": METHODS[name].title, "execution": "fake", **measured})
    return rows


def _result(state: RunState, name: str) -> Result:
    result = state.result(name)
    assert result is not None
    return result


def _figures(
    config: "QATConfig", state: RunState, evaluator: Evaluator
) -> dict[str, tuple[bytes, str]]:
    images: dict[str, Tensor] = {"float32": evaluator.images}
    curves = {}
    for name in config.methods:
        result = _result(state, name)
        images[METHODS[name].title] = result.images
        curves[METHODS[name].title] = (result.timesteps, result.errors)
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
