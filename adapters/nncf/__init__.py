"""NNCF: TDQ after `nncf.quantize`, trainable, and stripped for OpenVINO and torch.export."""

from tdq_plugin.adapters.nncf.adapter import NNCFAdapter
from tdq_plugin.adapters.nncf.prepare import prepare
from tdq_plugin.adapters.nncf.quantizer import TDQQuantizer
from tdq_plugin.adapters.nncf.save import load_quantized, save_quantized
from tdq_plugin.adapters.nncf.settings import TIMESTEP_PATTERNS, tdq_quantize_settings
from tdq_plugin.adapters.nncf.strip import StrippedModel, strip

__all__ = [
    "TIMESTEP_PATTERNS",
    "NNCFAdapter",
    "StrippedModel",
    "TDQQuantizer",
    "load_quantized",
    "prepare",
    "save_quantized",
    "strip",
    "tdq_quantize_settings",
]
