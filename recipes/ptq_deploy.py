"""The deployed side of the PTQ recipes: the saved model, its size, and its latency."""

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.files import atomic_folder
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.method_states import MethodStates
from tdq_plugin.recipes.ptq_quantize import Start
from tdq_plugin.recipes.sampling import Denoiser
from tdq_plugin.study.latency import paired_ratios
from tdq_plugin.study.schema import Latency, SizeBytes

if TYPE_CHECKING:
    from tdq_plugin.recipes.ptq_comparison import ComparisonRun

__all__ = ["measure_latency", "save_model"]

_CALLS_IN_A_ROUND = 5


def save_model(
    framework: Framework,
    model: nn.Module,
    folder: Path,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    extra: dict[str, Any],
    correction: Path | None = None,
) -> SizeBytes:
    """Save a frozen model for the scheduler's timesteps, without those of the evaluation alone.

    `int8` holds the quantized model, `unet` and `scheduler` the configurations to load it with.

    Args:
        framework: In whose form.
        model: The model.
        folder: Where to.
        unet: The float model.
        scheduler: The sampler, its timesteps set.
        extra: Noted in the file.
        correction: The model's output correction, to be saved with it.
    """
    tdq.load_scales(model, evaluate_table(tdq.scale_bank(model), scheduler))
    with atomic_folder(folder) as temporary:
        unet.save_config(temporary / "unet")
        scheduler.save_config(temporary / "scheduler")
        framework.save(model, temporary / "int8", extra)
        if correction is not None:
            shutil.copy(correction, temporary / "output_correction.safetensors")
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"float32": float_bytes, "int8": _folder_bytes(folder)}


def measure_latency(run: "ComparisonRun", start: Start, states: MethodStates) -> Latency:
    """Paired ratios to the static model, one sample at a time, along the tables' timesteps."""
    framework, rounds = run.framework, run.config.latency_rounds
    denoisers = {
        "float32": framework.deploy_float(run.model.unet, start.data),
        "static_int8": run.deploy(states, "lsq"),
        "tdq_int8": run.deploy(states, "tdq"),
        "dynamic_int8": framework.deploy_dynamic(states.load("tdq")),
    }
    timesteps = list(tdq.load_table(run.state.table_path("tdq")).timesteps)
    calls = {
        name: _several_calls(denoiser, timesteps, torch.randn(1, *run.model.latent_shape))
        for name, denoiser in denoisers.items()
        if denoiser is not None
    }
    with torch.inference_mode(), tqdm(total=rounds, desc="latency") as progress:
        ratios = paired_ratios(calls, "static_int8", rounds, advance=progress.update)
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
