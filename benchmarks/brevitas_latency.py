"""Latency of Brevitas models: a frozen TDQ table against stock static Brevitas.

    python benchmarks/brevitas_latency.py --model ddpm-cifar10 --batch 1 --rounds 20

Both models come from `layerwise_quantize` with the same weight quantizers and run inside Brevitas'
`quant_inference_mode`. Weights are random: the time does not depend on them. Every number is the
median of paired ratios to the static model, with quartiles; `static again` is the same model a
second time.
"""

import argparse
import copy
import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    ShiftedUint8ActPerTensorFloat,
)
from diffusers import UNet2DModel
from int8_latency import MODELS, STEPS, Formatter, example, print_table
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import tdq_layer_map, timestep_path_names
from tdq_plugin.files import atomic_file
from tdq_plugin.study.latency import paired_ratios

REFERENCE = "static"
TIMESTEPS = range(0, 1000, 1000 // STEPS)


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = UNet2DModel(**MODELS[options.model]).eval()
    models = {
        REFERENCE: static_model(unet, options.symmetric),
        "TDQ": tdq_model(unet, options.symmetric),
    }
    results = {}
    with torch.no_grad(), ExitStack() as modes:
        if options.mode == "inference":
            for model in models.values():
                modes.enter_context(quant_inference_mode(model, cache_quant_weight=True))
        for batch in options.batch:
            calls = make_calls(models, example(unet, batch)[0])
            results[batch] = paired_ratios(calls, REFERENCE, options.rounds)
            print_table(options.model, batch, results[batch], REFERENCE)
    if options.json is not None:
        with atomic_file(options.json) as file:
            content = {"model": options.model, "threads": options.threads, "ratios": results}
            file.write_text(json.dumps(content, indent=1))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--model", choices=MODELS, default="ddpm-cifar10")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--symmetric", action="store_true", help="signed, without a zero point")
    parser.add_argument(
        "--mode",
        choices=("inference", "eager"),
        default="inference",
        help="inside quant_inference_mode with cached weights, or the model as it is",
    )
    parser.add_argument("--json", type=Path, help="write the ratios to this file, too")
    return parser.parse_args()


def tdq_model(unet: UNet2DModel, symmetric: bool) -> nn.Module:
    """The model with a calibrated 8-bit table of `STEPS` timesteps."""
    layer_map = tdq_layer_map(8, 8, symmetric, weight_quant=Int8WeightPerChannelFloat)
    model = layerwise_quantize(copy.deepcopy(unet), layer_map, timestep_path_names(unet))
    tdq.attach(model)
    sample = example(unet, 2)[0]
    tdq.calibrate(model, [(sample, torch.full((2,), t)) for t in range(0, 1000, 250)])
    return tdq.freeze(model.eval(), TIMESTEPS)


def static_model(unet: UNet2DModel, symmetric: bool) -> nn.Module:
    """The same layers with Brevitas' own activation quantizers, calibrated its way."""
    activation = Int8ActPerTensorFloat if symmetric else ShiftedUint8ActPerTensorFloat
    arguments = {
        "input_quant": activation,
        "weight_quant": Int8WeightPerChannelFloat,
        "bias_quant": None,
    }
    layer_map = {
        nn.Conv2d: (qnn.QuantConv2d, arguments),
        nn.Linear: (qnn.QuantLinear, arguments),
    }
    model = layerwise_quantize(copy.deepcopy(unet), layer_map, timestep_path_names(unet))
    sample = example(unet, 2)[0]
    with torch.no_grad(), calibration_mode(model):
        for t in range(0, 1000, 250):
            model(sample, t)
    return model.eval()


def make_calls(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """One call per row of the printed table; every call takes the next timestep."""
    timesteps = itertools.cycle(TIMESTEPS)
    mixed = torch.arange(len(x)) * (1000 // STEPS)
    calls = {
        REFERENCE: lambda: models[REFERENCE](x, next(timesteps)),
        "static again": lambda: models[REFERENCE](x, next(timesteps)),
        "TDQ, one t": lambda: models["TDQ"](x, next(timesteps)),
        "TDQ, mixed t": lambda: models["TDQ"](x, mixed),
    }
    if len(x) == 1:
        del calls["TDQ, mixed t"]
    return calls


if __name__ == "__main__":
    main()
