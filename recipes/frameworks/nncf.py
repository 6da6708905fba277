"""NNCF: `nncf.quantize`, and OpenVINO's integer kernels."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings
from tdq_plugin.deploy.openvino import OpenVINOModel, save_openvino, to_openvino
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES
from tdq_plugin.deploy.openvino.traced import traced_model
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import Denoiser, image_shape
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.scales import FrozenBank

__all__ = ["FRAMEWORK"]

_BATCH_SIZE = 64


class _Predict(nn.Module):
    """A UNet that returns a tensor, as tracers want it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        predicted: Tensor = self.unet(sample, timestep, return_dict=False)[0]
        return predicted


class _NNCF:
    execution = "int8"
    latency_unit = (
        "ratio to static_int8, median of paired runs; all in OpenVINO on the CPU, inference "
        f"precision hint {DEFAULT_PROPERTIES['INFERENCE_PRECISION_HINT']}, float32 without the "
        "fusion of element-wise operations"
    )
    learns_rounding = False
    has_blocks = False
    keeps_dropout = True
    moves_zero_points = False

    def prepare(self, model: UNet2DModel, data: CalibrationSet, bits: Bits) -> nn.Module:
        batches = list(data.batches(_BATCH_SIZE))
        with _warnings_only(logging.getLogger("nncf")):
            quantized = nncf.quantize(
                copy.deepcopy(model),
                nncf.Dataset(batches),
                subset_size=len(batches),
                **tdq_quantize_settings(),
            )
        example = data.samples[:2], data.timesteps[:2]
        prepared = prepare(
            quantized,
            example,
            bits.activations,
            bits.weights,
            first_last_bits=bits.first_last,
            float_layers=bits.float_layers,
        )
        return tdq.attach(prepared).to(model.device).eval()

    def simulate(self, model: nn.Module) -> Denoiser:
        return _Predict(model)

    def deploy(self, model: UNet2DModel) -> OpenVINOModel:
        bank = tdq.scale_bank(model)
        assert isinstance(bank, FrozenBank)
        example = torch.zeros(2, *image_shape(model)), bank.timesteps[:1]
        return to_openvino(strip(model), example, properties=_properties())

    def deploy_dynamic(self, model: nn.Module) -> None:
        """OpenVINO has no scales that depend on the input."""

    def deploy_float(self, model: UNet2DModel, data: CalibrationSet) -> Denoiser:
        converted = traced_model(
            _Predict(model), {"sample": data.samples[:2], "timestep": data.timesteps[:1]}
        )
        # With its fusion of element-wise operations, OpenVINO 2026.4 crashes when it compiles a
        # float UNet with resnet_time_scale_shift="scale_shift" for a fixed batch size.
        properties = {**_properties(), "SNIPPETS_MODE": "DISABLE"}

        @cache
        def compiled(batch: int) -> ov.CompiledModel:
            # A free batch size would cost the float model speed, which the others do not pay.
            fixed = converted.clone()
            fixed.reshape({0: [batch, *image_shape(model)], 1: [1]})
            return ov.Core().compile_model(fixed, "CPU", properties)

        def denoise(x: Tensor, timestep: Any) -> Tensor:
            inputs = [x.numpy(), torch.as_tensor(timestep).reshape(1).float().numpy()]
            return torch.from_numpy(compiled(len(x))(inputs)[0])

        return denoise

    def save(self, model: UNet2DModel, folder: Path, extra: dict[str, Any]) -> None:
        # With the configuration, OVDenoiser.load reads the folder.
        save_openvino(self.deploy(model), folder, extra={"config": dict(model.config), **extra})


def _properties() -> dict[str, Any]:
    return {**DEFAULT_PROPERTIES, "INFERENCE_NUM_THREADS": torch.get_num_threads()}


@contextmanager
def _warnings_only(logger: logging.Logger) -> Iterator[None]:
    """At INFO, `nncf.quantize` names every operation that its settings ask it to leave float."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


FRAMEWORK: Framework = _NNCF()  # type: ignore[assignment]
