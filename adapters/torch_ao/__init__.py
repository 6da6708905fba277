"""torch.ao FX: TDQ in the prepare / convert flow that users already have."""

from tdq_plugin.adapters.torch_ao.adapter import TorchAOAdapter
from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.torch_ao.qconfig import (
    tdq_backend_config,
    tdq_qconfig,
    tdq_qconfig_mapping,
)

__all__ = [
    "TDQFakeQuantize",
    "TDQWeightFakeQuantize",
    "TorchAOAdapter",
    "tdq_backend_config",
    "tdq_qconfig",
    "tdq_qconfig_mapping",
]
