"""Latencies of the PTQ recipes' deployed models."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.quantize import Start
from tdq_plugin.study.latency import paired_ratios
from tdq_plugin.study.schema import Latency

if TYPE_CHECKING:
    from tdq_plugin.recipes.ptq.comparison import ComparisonRun

__all__ = ["measure_latency"]

_CALLS_IN_A_ROUND = 5


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
