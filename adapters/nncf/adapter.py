"""How a scale bank is attached to a model that `nncf.quantize` and `prepare` made."""

from collections.abc import Mapping
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, is_wrapped
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from tdq_plugin.adapters.nncf.placement import quantized_timestep_operation
from tdq_plugin.adapters.nncf.quantizer import TDQQuantizer
from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import AdapterError
from tdq_plugin.hooks import connect_rows
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.registry import register_adapter
from tdq_plugin.scales.bank import TrainableBank

__all__ = ["NNCFAdapter"]


@register_adapter("nncf")
class NNCFAdapter:
    """Models from `nncf.quantize`; the bank starts at NNCF's static ranges for every t."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        return is_wrapped(model) and any(
            isinstance(hook, TDQQuantizer | BaseQuantizer)
            for _, hook in get_hook_storage(model).named_hooks()
        )

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        found = _tdq_quantizers(model)
        if not found:
            raise AdapterError(_what_is_missing(model))
        return {str(quantizer.name): quantizer for quantizer in found}

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        bank = scale_bank(model).to(_tdq_quantizers(model)[0].static_low.device)
        if isinstance(bank, TrainableBank):
            start = [(q.static_scale, q.static_zero_point) for q in _tdq_quantizers(model)]
            scales, zero_points = torch.tensor(start, device=bank.device).unbind(1)
            bank.set_static(scales, zero_points)
        connect_rows(model, timestep_argument)
        model.register_load_state_dict_pre_hook(_require_ranges)


def _require_ranges(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Refuse float weights: the ranges of NNCF are those of the weights that it has seen."""
    loaded = [name for name, _ in model.named_parameters() if prefix + name in state_dict]
    has_ranges = any(name.startswith(f"{ATR_HOOK_STORAGE}.") for name in loaded)
    weights = [name for name in loaded if not name.startswith("scale_bank.")]
    if weights and not has_ranges:
        raise AdapterError(
            f"The state dict has {weights[0]!r} and no ranges of NNCF's quantizers, which were set "
            "by the weights before. Load float weights before nncf.quantize, or load the state "
            "dict of a prepared model."
        )


def _what_is_missing(model: nn.Module) -> str:
    """What a model needs that is as `nncf.quantize` returned it."""
    operation = quantized_timestep_operation(model)
    if operation is not None:
        return (
            f"NNCF quantized the timestep's own path (the operation {operation!r}), so near "
            "timesteps become one. Quantize the float model by nncf.quantize(model, dataset, "
            "**tdq_quantize_settings()), then call tdq_plugin.adapters.nncf.prepare."
        )
    return (
        "The model is as nncf.quantize returned it. Call tdq_plugin.adapters.nncf.prepare(model, "
        "example_inputs) before attach: NNCF's hooks do not say which layers they belong to."
    )


def _tdq_quantizers(model: nn.Module) -> list[TDQQuantizer]:
    """In order of execution: rows must not move when a model is restored."""
    found = {hook for _, hook in get_hook_storage(model).named_hooks()}
    return sorted((q for q in found if isinstance(q, TDQQuantizer)), key=lambda q: q.order)
