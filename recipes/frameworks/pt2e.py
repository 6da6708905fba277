"""torchao PT2E: an exported graph, and the converted program that backends compile."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, convert, export
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["FRAMEWORK"]


class _PT2E:
    execution = "fake"
    latency_unit = (
        "ratio to the static model, median of paired runs; converted graphs run as they are, "
        "operator by operator in float32, before a backend compiles them"
    )
    learns_rounding = False
    has_blocks = True
    keeps_dropout = False
    moves_zero_points = True

    def prepare(self, model: UNet2DModel, data: CalibrationSet, bits: Bits) -> fx.GraphModule:
        example = (data.samples[:2], data.timesteps[:2])
        quantizer = TDQQuantizer(
            bits.activations,
            bits.weights,
            first_last_bits=bits.first_last,
            float_layers=bits.float_layers,
        )
        prepared = prepare_qat_pt2e(export(copy.deepcopy(model), example), quantizer)
        return tdq.attach(prepared).to(model.device).eval()

    def simulate(self, model: fx.GraphModule) -> fx.GraphModule:
        return model

    def deploy(self, model: fx.GraphModule) -> fx.GraphModule:
        return convert(model)

    def deploy_dynamic(self, model: fx.GraphModule) -> fx.GraphModule:
        dynamic = copy.deepcopy(model)
        for _, quantizer in tdq.named_quantizers(dynamic):
            quantizer.mode = "dynamic"
        return dynamic

    def deploy_float(self, model: UNet2DModel, data: CalibrationSet) -> Denoiser:
        return export(copy.deepcopy(model), (data.samples[:2], data.timesteps[:2]))

    def save(self, model: fx.GraphModule, folder: Path, extra: dict[str, Any]) -> None:
        """As `model.pt2`, for `torch.export.load`; it takes one timestep, shape `(1,)`, a call."""
        folder.mkdir()
        timestep = tdq.scale_bank(model).get_buffer("timesteps")[:1]
        torch.export.save(_program(model, timestep), folder / "model.pt2")
        (folder / "recipe.json").write_text(json.dumps(extra))


def _program(model: fx.GraphModule, timestep: Tensor) -> torch.export.ExportedProgram:
    (sample,) = (
        node.meta["val"]
        for node in model.graph.find_nodes(op="placeholder")
        if node.target == "sample"
    )
    example = torch.zeros(2, *sample.shape[1:])
    shapes = ({0: torch.export.Dim("batch", min=2)}, None)
    folded = convert(model, fold_scales=True)
    return torch.export.export(folded, (example, timestep), dynamic_shapes=shapes)


FRAMEWORK: Framework = _PT2E()  # type: ignore[assignment]
