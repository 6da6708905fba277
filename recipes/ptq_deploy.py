"""The integer side of the PTQ recipe: the saved model, its size, and its latency."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.deploy import lower_to_int8, save_int8
from tdq_plugin.files import atomic_folder
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.sampling import image_shape
from tdq_plugin.scales import FrozenBank
from tdq_plugin.study.latency import paired_ratios
from tdq_plugin.study.schema import Latency, SizeBytes

if TYPE_CHECKING:
    from tdq_plugin.recipes.ddim_digits_ptq import PTQConfig

__all__ = ["fake_model", "integer_model", "measure_latency", "save_model"]

_CALLS_IN_A_ROUND = 5


def integer_model(
    state: RunState, model: fx.GraphModule, name: str, **options: Any
) -> fx.GraphModule:
    """Lower the model with the scale table of a method."""
    tdq.load_scales(model, tdq.load_table(state.table_path(name)))
    return lower_to_int8(model, **options)


def fake_model(state: RunState, model: fx.GraphModule, name: str) -> fx.GraphModule:
    """The fake-quantized model with the scale table of a method."""
    tdq.load_scales(model, tdq.load_table(state.table_path(name)))
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.mode = "dynamic" if METHODS[name].dynamic else "quantize"
    return model


def save_model(
    config: "PTQConfig",
    state: RunState,
    model: fx.GraphModule,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
) -> SizeBytes:
    """Save the TDQ model for the scheduler's timesteps, without those of the evaluation alone.

    `model/int8` holds the integer model, `model/unet` and `model/scheduler` the configurations
    to load it with.
    """
    table = tdq.load_table(state.table_path("tdq"))
    tdq.load_scales(model, evaluate_table(FrozenBank(table), scheduler))
    extra = {"recipe": "ddim-digits-ptq", "bits": config.bits, "steps": config.steps}
    folder = state.folder / "model"
    with atomic_folder(folder) as temporary:
        unet.save_config(temporary / "unet")
        scheduler.save_config(temporary / "scheduler")
        save_int8(lower_to_int8(model), temporary / "int8", extra=extra)
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"float32": float_bytes, "int8": _folder_bytes(folder)}


def measure_latency(
    config: "PTQConfig", state: RunState, model: fx.GraphModule, unet: UNet2DModel
) -> Latency:
    """Paired ratios to static int8, one image at a time, along the timesteps of the tables.

    All models are traced graphs. The integer ones tabulate the timestep path, as deployed.
    """
    static, table = integer_model(state, model, "lsq"), integer_model(state, model, "tdq")
    dynamic = integer_model(state, model, "tdq", activations="dynamic")
    timesteps = list(tdq.load_table(state.table_path("tdq")).timesteps)
    shape = image_shape(unet)
    graph = tdq.trace(unet, (torch.zeros(2, *shape), torch.zeros(2)))
    calls = {
        name: _several_calls(module, timesteps, torch.randn(1, *shape))
        for name, module in (
            ("float32", graph),
            ("static_int8", static),
            ("tdq_int8", table),
            ("dynamic_int8", dynamic),
        )
    }
    with torch.inference_mode(), tqdm(total=config.latency_rounds, desc="latency") as progress:
        ratios = paired_ratios(calls, "static_int8", config.latency_rounds, advance=progress.update)
    medians: Any = {name: ratio["median"] for name, ratio in ratios.items()}
    return medians | {"unit": "ratio to static_int8, median of paired runs"}


def _several_calls(module: nn.Module, timesteps: list[Tensor], x: Tensor) -> Any:
    following = itertools.cycle(timesteps)

    def call() -> None:
        for _ in range(_CALLS_IN_A_ROUND):
            module(x, next(following))

    return call


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
