"""Latency of converted PT2E graphs that Inductor has compiled: TDQ against static int8 and float32.

    python benchmarks/pt2e_latency.py --model digits --batch 4 --rounds 30

Static int8 is what torchao makes of static quantizers: constant scales at the same places. Weights
are random: the time does not depend on them. Compiling takes minutes for each model.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from int8_latency import MODELS, STEPS, Formatter, example, print_table
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, convert, export
from tdq_plugin.graph.compute import quantizer_nodes
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.study.latency import paired_ratios

REFERENCE = "int8 static"


def main() -> None:
    """Compile, measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = UNet2DModel(**MODELS[options.model]).eval()
    quantized = frozen(model)
    graphs = {
        "float32": export(model, example(model, 2)),
        REFERENCE: static(quantized),
        "int8 TDQ": convert(quantized, fold_scales=True),
    }
    x, _ = example(model, options.batch)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        calls = {name: compiled(name, graph, x) for name, graph in graphs.items()}
        ratios = paired_ratios(calls, REFERENCE, options.rounds)
    print_table(f"{options.model}, Inductor", options.batch, ratios, REFERENCE)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def frozen(model: UNet2DModel) -> fx.GraphModule:
    """The model with a calibrated 8-bit table of `STEPS` timesteps."""
    inputs = example(model, 2)
    exported = export(copy.deepcopy(model), inputs)
    prepared = tdq.attach(prepare_qat_pt2e(exported, TDQQuantizer(8, 8))).eval()
    tdq.calibrate(prepared, [(inputs[0], t) for t in range(0, 1000, 250)])
    return tdq.freeze(prepared, range(0, 1000, 1000 // STEPS))


def static(model: fx.GraphModule) -> fx.GraphModule:
    """The scales of one timestep as constants of the operators."""
    model = copy.deepcopy(model)
    operators, table = torch.ops.quantized_decomposed, tdq.scale_bank(model).table
    for node in quantizer_nodes(model.graph):
        quantizer = cast(ActivationQuantizer, model.get_submodule(str(node.target)))
        column, grid = table.names.index(quantizer.name or ""), quantizer.grid
        scale, zero_point = (float(v[0, column]) for v in (table.scales, table.zero_points))
        parameters = (scale, int(zero_point), grid.quant_min, grid.quant_max, torch.uint8)
        with model.graph.inserting_before(node):
            codes = model.graph.call_function(
                operators.quantize_per_tensor.default, (node.args[0], *parameters)
            )
            output = model.graph.call_function(
                operators.dequantize_per_tensor.default, (codes, *parameters)
            )
        node.replace_all_uses_with(output)
        model.graph.erase_node(node)
    return cast(fx.GraphModule, convert_pt2e(model))


def compiled(name: str, graph: fx.GraphModule, x: Tensor) -> Callable[[], Any]:
    """A call of the compiled graph; every call takes the next timestep."""
    torch._dynamo.reset()
    counters.clear()
    model = torch.compile(graph)
    timesteps = itertools.cycle(torch.arange(0.0, 1000.0, 1000 // STEPS).split(1))
    model(x, next(timesteps))
    found = counters["inductor"]
    layers = [found[f"{kind}_weight_prepack_matcher_count"] for kind in ("qconv", "qlinear")]
    print(f"{name}: {layers[0]} convolutions and {layers[1]} linear layers on int8 kernels")
    return lambda: model(x, next(timesteps))


if __name__ == "__main__":
    main()
