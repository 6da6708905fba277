"""torch.ao: TDQ in the prepare and convert flow of FX graphs, and in eager models."""

from tdq_plugin.adapters.torch_ao.adapter import TorchAOAdapter
from tdq_plugin.adapters.torch_ao.convert import convert
from tdq_plugin.adapters.torch_ao.eager import (
    TIMESTEP_LAYERS,
    TDQConv1d,
    TDQConv2d,
    TDQLinear,
    TorchAOEagerAdapter,
    quantize_eager,
)
from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.torch_ao.qconfig import (
    tdq_backend_config,
    tdq_qconfig,
    tdq_qconfig_mapping,
)

__all__ = [
    "TIMESTEP_LAYERS",
    "TDQConv1d",
    "TDQConv2d",
    "TDQFakeQuantize",
    "TDQLinear",
    "TDQWeightFakeQuantize",
    "TorchAOAdapter",
    "TorchAOEagerAdapter",
    "convert",
    "quantize_eager",
    "tdq_backend_config",
    "tdq_qconfig",
    "tdq_qconfig_mapping",
]
