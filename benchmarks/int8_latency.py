"""Latency of int8 models: TDQ against static, input-dependent and float32 execution.

    python benchmarks/int8_latency.py --model ddpm-cifar10 --batch 1 4 --rounds 30

Weights are random: the time does not depend on them. Every number is the median of paired ratios
to static int8, with quartiles; static int8 is the same engine with one row for all timesteps.
"""

import argparse
import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, fx
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy import lower_to_int8
from tdq_plugin.files import atomic_file
from tdq_plugin.study.latency import Ratio, paired_ratios

STEPS = 50
REFERENCE = "int8 static"
MODELS: dict[str, dict[str, Any]] = {
    "digits": {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
    },
    # The architecture of google/ddpm-cifar10-32.
    "ddpm-cifar10": {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
    model = UNet2DModel(**MODELS[options.model]).eval()
    float_graph = tdq.trace(copy.deepcopy(model), example(model, 2))
    models = int8_models(frozen(model), cache=options.timestep_path == "cached")
    results = {}
    with torch.inference_mode():
        for batch in options.batch:
            calls = make_calls(float_graph, models, example(model, batch)[0])
            results[batch] = paired_ratios(calls, REFERENCE, options.rounds)
            print_table(options.model, batch, results[batch])
    if options.json is not None:
        with atomic_file(options.json) as file:
            content = {"model": options.model, "threads": options.threads, "ratios": results}
            file.write_text(json.dumps(content, indent=1))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--model", choices=MODELS, default="ddpm-cifar10")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--timestep-path",
        choices=("cached", "computed"),
        default="cached",
        help="the time embedding, the same way in all int8 models; computed leaves static int8 "
        "without any lookup",
    )
    parser.add_argument("--json", type=Path, help="write the ratios to this file, too")
    return parser.parse_args()


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and shows the defaults."""


def example(model: UNet2DModel, batch: int) -> tuple[Tensor, Tensor]:
    """Noise and timesteps for one call."""
    size, channels = model.config.sample_size, model.config.in_channels
    return torch.randn(batch, channels, size, size), torch.arange(batch)


def frozen(model: UNet2DModel) -> fx.GraphModule:
    """The model with a calibrated 8-bit table of `STEPS` timesteps."""
    inputs = example(model, 2)
    graph = tdq.trace(copy.deepcopy(model), inputs)
    mapping = tdq_qconfig_mapping(graph, 8, 8)
    prepared = prepare_qat_fx(
        graph.train(), mapping, inputs, backend_config=tdq_backend_config()
    ).eval()
    tdq.attach(prepared)
    batches = [(inputs[0], torch.full((2,), t)) for t in range(0, 1000, 250)]
    tdq.calibrate(prepared, batches)
    return tdq.freeze(prepared, range(0, 1000, 1000 // STEPS))


def int8_models(model: fx.GraphModule, cache: bool) -> dict[str, fx.GraphModule]:
    """The same engine with a table, with one row for all timesteps, and with dynamic ranges."""
    table = tdq.scale_bank(model).table
    row = table.scales[STEPS // 2].expand_as(table.scales).contiguous()
    one_row = tdq.ScaleTable(table.grids, table.timesteps, row, table.zero_points)
    static = tdq.load_scales(copy.deepcopy(model), one_row)
    return {
        "static": lower_to_int8(static, cache_timestep_path=cache),
        "tdq": lower_to_int8(model, cache_timestep_path=cache),
        "dynamic": lower_to_int8(model, cache_timestep_path=cache, activations="dynamic"),
    }


def make_calls(
    float_graph: fx.GraphModule, models: dict[str, fx.GraphModule], x: Tensor
) -> dict[str, Callable[[], Any]]:
    """One call per row of the printed table; every call takes the next timestep."""
    timesteps = itertools.cycle(range(0, 1000, 1000 // STEPS))
    mixed = torch.arange(len(x)) * (1000 // STEPS)
    fastest, name = fastest_float(float_graph, x)
    calls = {
        f"float32 ({name})": lambda: fastest(next(timesteps)),
        REFERENCE: lambda: models["static"](x, next(timesteps)),
        "int8 TDQ, one t": lambda: models["tdq"](x, next(timesteps)),
        "int8 TDQ, mixed t": lambda: models["tdq"](x, mixed),
        "int8 dynamic": lambda: models["dynamic"](x, next(timesteps)),
    }
    if len(x) == 1:
        del calls["int8 TDQ, mixed t"]
    return calls


def fastest_float(graph: fx.GraphModule, x: Tensor) -> tuple[Callable[[int], Any], str]:
    """The float model in the memory format that suits it better."""
    last = copy.deepcopy(graph).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    calls = {"contiguous": lambda t: graph(x, t), "channels_last": lambda t: last(x_last, t)}
    timed = {name: (lambda call=call: call(0)) for name, call in calls.items()}
    ratios = paired_ratios(timed, "contiguous", rounds=5)
    name = min(ratios, key=lambda name: ratios[name]["median"])
    return calls[name], name


def print_table(
    model: str, batch: int, ratios: dict[str, Ratio], reference: str = REFERENCE
) -> None:
    """Print the ratios of one batch size."""
    print(f"\n{model}, batch {batch}, {torch.get_num_threads()} thread(s): time / {reference}")
    for name, ratio in ratios.items():
        quartiles = f"[{ratio['q25']:.3f}, {ratio['q75']:.3f}]"
        print(f"  {name:<26}{ratio['median']:.3f}  {quartiles}", flush=True)


if __name__ == "__main__":
    main()
