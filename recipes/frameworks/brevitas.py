"""Brevitas: layers exchanged one by one, its inference mode, and an ONNX file."""

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from brevitas.export.inference import quant_inference_mode
from diffusers import UNet2DModel
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import export_onnx, quantize_layerwise
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import Denoiser, image_shape
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["FRAMEWORK"]


class _Inference:
    """A copy of a model that stays in Brevitas' inference mode, with quantized weights kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        ExitStack().enter_context(quant_inference_mode(self.model, cache_quant_weight=True))

    def __call__(self, x: Tensor, timestep: Any) -> Tensor:
        predicted: Tensor = self.model(x, timestep, return_dict=False)[0]
        return predicted


class _Brevitas:
    execution = "fake"
    latency_unit = (
        "ratio to the static model, median of paired runs; quantized models run as Brevitas runs "
        "them, by fake quantization in float32"
    )
    learns_rounding = False
    has_blocks = False
    keeps_dropout = True
    moves_zero_points = True

    def prepare(self, model: UNet2DModel, data: CalibrationSet, bits: Bits) -> nn.Module:
        quantized = quantize_layerwise(
            copy.deepcopy(model),
            activation_bits=bits.activations,
            weight_bits=bits.weights,
            first_last_bits=bits.first_last,
            float_layers=bits.float_layers,
        )
        return tdq.attach(quantized).to(model.device).eval()

    def simulate(self, model: nn.Module) -> Denoiser:
        return _Inference(model)

    def deploy(self, model: nn.Module) -> Denoiser:
        return _Inference(model)

    def deploy_dynamic(self, model: nn.Module) -> Denoiser:
        inference = _Inference(model)
        for _, quantizer in tdq.named_quantizers(inference.model):
            quantizer.mode = "dynamic"
        return inference

    def deploy_float(self, model: UNet2DModel, data: CalibrationSet) -> Denoiser:
        return lambda x, timestep: model(x, timestep, return_dict=False)[0]

    def save(self, model: UNet2DModel, folder: Path, extra: dict[str, Any]) -> None:
        folder.mkdir()
        timestep = int(tdq.scale_bank(model).get_buffer("timesteps")[0])
        export_onnx(model, folder / "model.onnx", (torch.zeros(2, *image_shape(model)), timestep))
        (folder / "recipe.json").write_text(json.dumps(extra))


FRAMEWORK: Framework = _Brevitas()  # type: ignore[assignment]
