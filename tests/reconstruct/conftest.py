"""A tiny UNet, its calibration data, and quantized graphs of it."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_models import tiny_unet
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.graph import copy_module_paths
from tdq_plugin.reconstruct import collect_trajectories

EXAMPLE = (torch.randn(2, 1, 8, 8), torch.tensor([3, 400]))


@pytest.fixture(scope="session")
def unet():
    return tiny_unet(attention_head_dim=4, resnet_time_scale_shift="scale_shift").eval()


@pytest.fixture(scope="session")
def data(unet):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    return collect_trajectories(unet, scheduler, (1, 8, 8), images=8)


@pytest.fixture(scope="session")
def calibrated(unet, data):
    """From bits to an attached and calibrated graph."""

    def make(activation_bits, weight_bits):
        graph = tdq.trace(copy.deepcopy(unet), EXAMPLE)
        mapping = tdq_qconfig_mapping(graph, activation_bits, weight_bits)
        prepared = prepare_qat_fx(graph, mapping, EXAMPLE, backend_config=tdq_backend_config())
        copy_module_paths(graph.graph, prepared.graph)
        tdq.attach(prepared).eval()
        tdq.calibrate(prepared, data.batches(8), warm_start=False, samples=64)
        return prepared

    return make


@pytest.fixture(scope="session")
def clone():
    """A copy of a graph that keeps its nodes' module paths."""

    def copy_graph(model):
        twin = copy.deepcopy(model)
        for new, old in zip(twin.graph.nodes, model.graph.nodes, strict=True):
            new.meta["module_path"] = old.meta.get("module_path")
        return twin

    return copy_graph
