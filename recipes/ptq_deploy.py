"""The deployed side of the PTQ recipe: the saved model, its size, and its latency."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.files import atomic_folder
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.method_states import MethodStates
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import Denoiser, image_shape
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.latency import paired_ratios
from tdq_plugin.study.schema import Latency, SizeBytes

if TYPE_CHECKING:
    from tdq_plugin.recipes.ptq_config import PTQConfig

__all__ = ["measure_latency", "save_model"]

_CALLS_IN_A_ROUND = 5


def save_model(
    config: "PTQConfig",
    framework: Framework,
    state: RunState,
    states: MethodStates,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
) -> SizeBytes:
    """Save the TDQ model for the scheduler's timesteps, without those of the evaluation alone.

    `model/int8` holds the quantized model, `model/unet` and `model/scheduler` the configurations
    to load it with.
    """
    model = states.load("tdq")
    tdq.load_scales(model, evaluate_table(tdq.scale_bank(model), scheduler))
    extra = {"recipe": "ddim-digits-ptq", "bits": config.bits, "steps": config.steps}
    folder = state.folder / "model"
    with atomic_folder(folder) as temporary:
        unet.save_config(temporary / "unet")
        scheduler.save_config(temporary / "scheduler")
        framework.save(model, temporary / "int8", extra)
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"float32": float_bytes, "int8": _folder_bytes(folder)}


def measure_latency(
    config: "PTQConfig",
    framework: Framework,
    state: RunState,
    states: MethodStates,
    unet: UNet2DModel,
    data: CalibrationSet,
) -> Latency:
    """Paired ratios to the static model, one image at a time, along the timesteps of the tables."""
    denoisers = {
        "float32": framework.deploy_float(unet, data),
        "static_int8": framework.deploy(states.load("lsq")),
        "tdq_int8": framework.deploy(states.load("tdq")),
        "dynamic_int8": framework.deploy_dynamic(states.load("tdq")),
    }
    timesteps = list(tdq.load_table(state.table_path("tdq")).timesteps)
    calls = {
        name: _several_calls(denoiser, timesteps, torch.randn(1, *image_shape(unet)))
        for name, denoiser in denoisers.items()
        if denoiser is not None
    }
    with torch.inference_mode(), tqdm(total=config.latency_rounds, desc="latency") as progress:
        ratios = paired_ratios(calls, "static_int8", config.latency_rounds, advance=progress.update)
    medians: Any = {name: ratios[name]["median"] if name in ratios else None for name in denoisers}
    return medians | {"unit": framework.latency_unit}


def _several_calls(denoiser: Denoiser, timesteps: list[Tensor], x: Tensor) -> Any:
    following = itertools.cycle(timesteps)

    def call() -> None:
        for _ in range(_CALLS_IN_A_ROUND):
            denoiser(x, next(following))

    return call


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
