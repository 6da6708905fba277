"""torchao's PT2E flow: TDQ in exported graphs."""

from tdq_plugin.adapters.pt2e.adapter import PT2EAdapter
from tdq_plugin.adapters.pt2e.convert import convert
from tdq_plugin.adapters.pt2e.export import export
from tdq_plugin.adapters.pt2e.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.pt2e.quantizer import (
    TDQQuantizer,
    tdq_activation_spec,
    tdq_weight_spec,
)

__all__ = [
    "PT2EAdapter",
    "TDQFakeQuantize",
    "TDQQuantizer",
    "TDQWeightFakeQuantize",
    "convert",
    "export",
    "tdq_activation_spec",
    "tdq_weight_spec",
]
