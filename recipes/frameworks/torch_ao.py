"""torch.ao FX: a traced graph, and torch's integer kernels."""

import copy
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import fx
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy import lower_to_int8, save_int8
from tdq_plugin.graph import copy_module_paths
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["FRAMEWORK"]


class _TorchAO:
    execution = "int8"
    latency_unit = "ratio to static_int8, median of paired runs"
    learns_rounding = True
    has_blocks = True
    keeps_dropout = True
    moves_zero_points = True

    def prepare(self, model: UNet2DModel, data: CalibrationSet, bits: Bits) -> fx.GraphModule:
        example = (data.samples[:2], data.timesteps[:2])
        graph = tdq.trace(copy.deepcopy(model), example)
        mapping = tdq_qconfig_mapping(
            graph,
            bits.activations,
            bits.weights,
            first_last_bits=bits.first_last,
            float_layers=bits.float_layers,
        )
        prepared = prepare_qat_fx(
            graph.train(), mapping, example, backend_config=tdq_backend_config()
        )
        copy_module_paths(graph.graph, prepared.graph)
        return tdq.attach(prepared).to(model.device).eval()

    def simulate(self, model: fx.GraphModule) -> fx.GraphModule:
        return model

    def deploy(self, model: fx.GraphModule) -> fx.GraphModule:
        return lower_to_int8(model)

    def deploy_dynamic(self, model: fx.GraphModule) -> fx.GraphModule:
        return lower_to_int8(model, activations="dynamic")

    def deploy_float(self, model: UNet2DModel, data: CalibrationSet) -> fx.GraphModule:
        return tdq.trace(model, (data.samples[:2], data.timesteps[:2]))

    def save(self, model: fx.GraphModule, folder: Path, extra: dict[str, Any]) -> None:
        save_int8(self.deploy(model), folder, extra=extra)


FRAMEWORK: Framework = _TorchAO()  # type: ignore[assignment]
