"""The integer side of the PTQ recipe: the saved model, its size, and its latency."""

import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.deploy import lower_to_int8, save_int8
from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.study.latency import paired_ratios
from tdq_plugin.study.schema import Latency, SizeBytes

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


def save_model(config: Any, state: RunState, model: fx.GraphModule, unet: UNet2DModel) -> SizeBytes:
    """Save the TDQ model as `model/`: the int8 model in `int8/`, its architecture in `unet/`."""
    folder = state.folder / "model"
    with atomic_folder(folder) as temporary:
        unet.save_config(temporary / "unet")
        extra = {"recipe": "ddim-digits-ptq", "bits": config.bits, "steps": config.steps}
        save_int8(integer_model(state, model, "tdq"), temporary / "int8", extra=extra)
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    return {"float32": float_bytes, "int8": _folder_bytes(folder / "int8")}


def measure_latency(
    config: Any, state: RunState, model: fx.GraphModule, unet: UNet2DModel
) -> Latency:
    """Paired ratios to static int8, one image at a time, along the sampler's timesteps."""
    static, table = integer_model(state, model, "lsq"), integer_model(state, model, "tdq")
    dynamic = integer_model(state, model, "tdq", activations="dynamic")
    timesteps = list(tdq.load_table(state.table_path("tdq")).timesteps)
    graph = tdq.trace(unet, (torch.zeros(2, *_shape(unet)), torch.zeros(2)))
    calls = {
        name: _several_calls(module, timesteps, torch.randn(1, *_shape(unet)))
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


def _shape(unet: UNet2DModel) -> tuple[int, int, int]:
    size = unet.config.sample_size
    return unet.config.in_channels, size, size


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
