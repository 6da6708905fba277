"""No layer of google/ddpm-cifar10-32 loses its integer kernel to the timestep."""

import pytest
import torch
from diffusers_models import ddpm_cifar10
from torch.ao.quantization.quantize_fx import prepare_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy.openvino import to_openvino
from tdq_plugin.freeze import resolve_timesteps

pytestmark = pytest.mark.whole

STEPS = resolve_timesteps([0, 500, 999])


def test_every_layer_that_is_int8_with_static_scales_is_int8():
    unet = ddpm_cifar10().eval()
    example = (torch.randn(1, 3, 32, 32), torch.tensor([500]))
    graph = tdq.trace(unet, example)
    mapping = tdq_qconfig_mapping(graph)
    model = tdq.attach(prepare_fx(graph, mapping, example, backend_config=tdq_backend_config()))
    grids = {name: q.grid for name, q in tdq.named_quantizers(model)}
    # Integer kernels do not depend on the scales; these move with t.
    scales = torch.linspace(0.5, 1.5, 3)[:, None].expand(3, len(grids)).contiguous() / 64
    zeros = torch.tensor([[128.0]]).expand(1, len(grids)).contiguous()
    tdq.load_scales(model, tdq.ScaleTable(grids, STEPS, scales, zeros))

    report = to_openvino(model, example).report
    assert report.lost_layers == []
    assert len(report.integer_layers) == 65 + 24
    assert len(report.moved) == 65 + 12
    left = {reader for readers in report.readers_left.values() for reader in readers}
    assert left == {"ScaledDotProductAttention"}
