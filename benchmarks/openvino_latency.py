"""Latency on OpenVINO: TDQ against static int8 and float32, google/ddpm-cifar10-32's architecture.

    python benchmarks/openvino_latency.py --adapter torch_ao --batch 1 4 --threads 1 2

Weights are random: the time does not depend on them. Numbers are medians of paired ratios, with
quartiles. float32 is the plain UNet. Without a precision hint, OpenVINO computes what is not int8
in bfloat16 on CPUs that have it.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from diffusers import UNet2DModel
from int8_latency import MODELS, STEPS, Formatter, example, frozen

import tdq_plugin as tdq
from tdq_plugin.deploy.openvino import OpenVINOModel, to_openvino
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.deploy.openvino.tabulate import tabulate_timestep_path
from tdq_plugin.study.latency import Ratio, paired_ratios

TIMESTEPS = range(0, 1000, 1000 // STEPS)
BARS = {"TDQ int8 / static int8": 1.03, "float32 / TDQ int8": 2.2}
Models = dict[str, ov.Model]


def main() -> None:
    """Measure, print, and fail if a layer lost its integer kernel or a bar is missed."""
    options = parse_arguments()
    torch.manual_seed(0)
    unet = UNet2DModel(**MODELS["ddpm-cifar10"]).eval()
    make_models = {"torch_ao": torch_ao_models, "nncf": nncf_models}[options.adapter]
    models = make_models(unet, options.timestep_path == "cached")
    models["float32"] = float_model(unet)
    print(f"{options.adapter}, ddpm-cifar10: time ratios, medians [quartiles] of {options.rounds}")
    missed = False
    for threads, batch, hint in itertools.product(options.threads, options.batch, ("f32", None)):
        calls = make_calls(models, batch, threads, hint)
        # The clock is the CPU time of the calling thread if torch has one thread, else wall time.
        torch.set_num_threads(threads)
        ratios = paired_ratios(calls, "TDQ int8", options.rounds)
        shown = {
            "TDQ int8 / static int8": inverse(ratios["static int8"]),
            "float32 / TDQ int8": ratios["float32"],
        }
        print(f"\nbatch {batch}, {threads} thread(s), precision hint {hint or 'not set'}")
        for name, ratio in shown.items():
            print(f"  {name:<24}{ratio['median']:.3f} [{ratio['q25']:.3f}, {ratio['q75']:.3f}]")
        if hint == "f32":
            missed |= shown["TDQ int8 / static int8"]["median"] > BARS["TDQ int8 / static int8"]
            missed |= shown["float32 / TDQ int8"]["median"] < BARS["float32 / TDQ int8"]
    if missed:
        sys.exit(f"A bar is missed: {BARS}, with the f32 hint.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--adapter", choices=("torch_ao", "nncf"), default="torch_ao")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--timestep-path",
        choices=("cached", "computed"),
        default="cached",
        help="the time embedding, the same way in both int8 models",
    )
    return parser.parse_args()


def torch_ao_models(unet: UNet2DModel, cache: bool) -> Models:
    """TDQ, and the same with one row for all timesteps."""
    model, inputs = frozen(unet), example(unet, 2)
    ours = to_openvino(model, inputs, cache_timestep_path=cache)
    table = tdq.scale_bank(model).table
    row = table.scales[STEPS // 2].expand_as(table.scales).contiguous()
    tdq.load_scales(model, tdq.ScaleTable(table.grids, table.timesteps, row, table.zero_points))
    static = to_openvino(model, inputs, cache_timestep_path=cache)
    return checked(ours, static.model)


def nncf_models(unet: UNet2DModel, cache: bool) -> Models:
    """TDQ, and what `nncf.quantize` returned."""
    import nncf

    from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings

    nncf.set_log_level(logging.ERROR)
    inputs = example(unet, 2)
    batches = [(torch.randn_like(inputs[0]), torch.full((2,), t)) for t in range(0, 1000, 250)]
    wrapped = TensorOutput(unet)
    quantized = nncf.quantize(wrapped, nncf.Dataset(batches), **tdq_quantize_settings())
    static = converted(quantized, inputs)
    if cache:
        timesteps = np.array(TIMESTEPS, dtype=np.float32)
        tabulate_timestep_path(static, "timestep", timesteps, mixed_timesteps=False)
    model = tdq.attach(prepare(quantized, inputs))
    tdq.calibrate(model, batches)
    stripped = strip(tdq.freeze(model, TIMESTEPS))
    return checked(to_openvino(stripped, inputs, cache_timestep_path=cache), static)


class TensorOutput(torch.nn.Module):
    """A UNet that returns a tensor."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.unet(sample, timestep, return_dict=False)[0]
        return output


def float_model(unet: UNet2DModel) -> ov.Model:
    """The UNet as it is."""
    return converted(TensorOutput(unet), example(unet, 2))


def converted(model: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> ov.Model:
    """A torch model with a dynamic batch and a float timestep."""
    sample, timestep = inputs
    network = ov.convert_model(model, example_input=(sample, timestep.float()))
    network.reshape({0: ov.PartialShape([-1, *sample.shape[1:]]), 1: ov.PartialShape([-1])})
    network.get_parameters()[1].set_friendly_name("timestep")
    return network


def checked(ours: OpenVINOModel, static: ov.Model) -> Models:
    """The pair, if TDQ lost no integer layer."""
    expected = integer_layers(static, DEFAULT_PROPERTIES)
    found = {name.removeprefix("model.") for name in ours.report.integer_layers}
    if not found >= expected:
        sys.exit(f"TDQ lost the integer kernels of {sorted(expected - found)}.")
    print(f"{len(expected)} layers are int8 with static scales, {len(found)} with TDQ's")
    return {"TDQ int8": ours.model, "static int8": static}


def make_calls(
    models: Models, batch: int, threads: int, hint: str | None
) -> dict[str, Callable[[], Any]]:
    """One call per model; every call takes the next timestep."""
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if hint is not None:
        properties["INFERENCE_PRECISION_HINT"] = hint
    return {name: make_call(model, batch, properties) for name, model in models.items()}


def make_call(model: ov.Model, batch: int, properties: dict[str, Any]) -> Callable[[], Any]:
    """A call with one timestep for a whole batch."""
    model = model.clone()
    shape = [batch, *(size.get_length() for size in model.inputs[0].partial_shape[1:])]
    model.reshape({0: shape, 1: [1]})
    request = ov.Core().compile_model(model, "CPU", properties).create_infer_request()
    sample = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    timesteps = itertools.cycle(TIMESTEPS)
    return lambda: request.infer([sample, np.array([next(timesteps)], dtype=np.float32)])


def inverse(ratio: Ratio) -> Ratio:
    """Of reference / x, when x / reference was measured."""
    return {"median": 1 / ratio["median"], "q25": 1 / ratio["q75"], "q75": 1 / ratio["q25"]}


if __name__ == "__main__":
    main()
