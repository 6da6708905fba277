"""`strip`: a frozen model without NNCF's quantizers, for `torch.export` and OpenVINO."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.wrapper import is_wrapped
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from tdq_plugin.adapters.nncf.plain import FakeQuantizeWeight, Ratios, RescaledFakeQuantize
from tdq_plugin.adapters.nncf.quantizer import TDQQuantizer, is_traced
from tdq_plugin.attach import named_quantizers
from tdq_plugin.errors import AdapterError, TimestepError
from tdq_plugin.float32 import require_float32
from tdq_plugin.freeze import frozen_bank
from tdq_plugin.hooks import disconnect_rows
from tdq_plugin.scales.frozen import FrozenBank
from tdq_plugin.timestep import as_timesteps, find_timestep_argument

__all__ = ["StrippedModel", "strip"]


def strip(model: nn.Module, timestep_argument: str | None = None) -> "StrippedModel":
    """Replace all quantizers of a frozen model by torch's operators; on a copy.

    Every activation quantizer becomes `g(t) * FakeQuantize(x / g(t))`, whose fake quantization is
    constant, every weight quantizer a plain fake quantization, and so does an activation quantizer
    whose scale stands still over t. NNCF's own `nncf.strip` knows 8 bits only, and its result
    cannot be exported by torch.

    Args:
        model: From `prepare`, `attach` and `freeze`.
        timestep_argument: As for `attach`.

    Returns:
        A module `forward(sample, timestep)` that returns a tensor. It can be traced and exported,
        with one timestep for each call and any batch size.

    Raises:
        AdapterError: The model is not frozen, not NNCF's or not float32, a quantizer is switched
            off or dynamic, its table interpolates, or its zero points move with t.
    """
    if not is_wrapped(model):
        raise AdapterError(
            f"This {type(model).__name__} has no hooks of NNCF. Give a model that was quantized by "
            "nncf.quantize and prepared by tdq_plugin.adapters.nncf.prepare."
        )
    bank = frozen_bank(model, "a stripped model")
    if bank.lookup == "linear" or bank.zero_points.shape[0] > 1:
        raise AdapterError(
            "A stripped model has constant zero points and reads rows of its table; this one has "
            f"lookup={bank.lookup!r} and {bank.zero_points.shape[0]} zero points for each "
            "quantizer. Freeze with all timesteps that are needed, and lookup='exact' or 'nearest'."
        )
    require_float32(model, "stripped model")
    _check_quantizers(model)
    timestep = find_timestep_argument(model.forward, timestep_argument)
    return StrippedModel(copy.deepcopy(model), timestep)


class StrippedModel(nn.Module):
    """A quantized denoiser of torch's operators; made by `strip`.

    It runs one call at a time: NNCF's hooks, which it keeps, do not work in several threads.

    Args:
        model: The frozen model, which is changed.
        timestep_argument: Name of its argument that holds the timestep.

    Attributes:
        bank: The table that was frozen.
        ratios: `g(t)` of every activation quantizer, shape `(T, L)`.
        reciprocals: `1 / g(t)`, shape `(T, L)`.
        quantizers: The activation quantizers, in the order of the table.
    """

    ratios: Tensor
    reciprocals: Tensor

    def __init__(self, model: nn.Module, timestep_argument: str) -> None:
        super().__init__()
        bank = frozen_bank(model, "a stripped model")
        quantizers = [q for _, q in named_quantizers(model) if isinstance(q, TDQQuantizer)]
        base = _base_scales(quantizers, bank)
        self.register_buffer("ratios", bank.scales / base)
        self.register_buffer("reciprocals", base / bank.scales)
        arguments = list(inspect.signature(model.forward).parameters)
        self.timestep_argument = timestep_argument
        self.sample_argument = next(name for name in arguments if name != timestep_argument)
        self._now = Ratios()
        plain = _plain_quantizers(quantizers, base, bank, self._now)
        _exchange(model, dict(zip(quantizers, plain, strict=True)))
        disconnect_rows(model)
        del model.scale_bank
        self.bank, self.model = bank, model.eval()
        # Registered again, and last: tracers name a module by the path that they see last, and
        # those of NNCF's hooks hold slashes, which OpenVINO cuts.
        self.quantizers = nn.ModuleList(plain)

    def forward(self, sample: Tensor, timestep: Tensor | float, **conditions: Any) -> Tensor:
        """Denoise.

        Args:
            sample: Shape `(B, ...)`.
            timestep: A number, or a tensor of shape `()` or `(B,)` with equal values.
            **conditions: Further arguments of the model, by name.

        Raises:
            LookupRuleError: The timestep is not in the table.
            TimestepError: There is more than one timestep.
        """
        if isinstance(timestep, Tensor) and is_traced():
            # A traced graph cannot raise: whoever runs it must give a timestep of the table.
            value = timestep.reshape(-1)[:1].to(torch.float32)
        else:
            value = self._check(timestep)
        row = (self.bank.timesteps - value).abs().argmin(dim=0, keepdim=True)
        ratios, reciprocals = (
            table.index_select(0, row)[0] for table in (self.ratios, self.reciprocals)
        )
        arguments = {self.sample_argument: sample, self.timestep_argument: timestep}
        self._now.now = ratios, reciprocals
        try:
            output = self.model(**arguments, **conditions)
        finally:
            self._now.now = None
        return _tensor(output)

    def _check(self, timestep: Tensor | float) -> Tensor:
        timesteps = as_timesteps(timestep, self.bank.device)
        self.bank.index(timesteps)
        if bool((timesteps != timesteps[0]).any()):
            raise TimestepError(
                f"A stripped model takes one timestep for each call, not {timesteps.tolist()[:5]}. "
                "Call it once for each timestep, or use the model that was not stripped."
            )
        return timesteps[:1]


def _check_quantizers(model: nn.Module) -> None:
    for _, quantizer in named_quantizers(model):
        quantizer.require_quantizing("stripped model")
    for name, hook in get_hook_storage(model).named_hooks():
        if isinstance(hook, BaseQuantizer) and not hook.is_enabled_quantization():
            raise AdapterError(
                f"The weight quantizer {name!r} is switched off, so the stripped model would "
                "differ from the model. Switch it on (enable_quantization)."
            )


def _moves(bank: FrozenBank) -> Tensor:
    """Whose scale depends on t, shape `(L,)`."""
    return (bank.scales != bank.scales[0]).any(dim=0)


def _base_scales(quantizers: list[TDQQuantizer], bank: FrozenBank) -> Tensor:
    """NNCF's static scales; a scale that stands still over t is its own, with a ratio of 1."""
    static = torch.stack([quantizer.static_scale for quantizer in quantizers])
    return torch.where(_moves(bank), static, bank.scales[0])


def _plain_quantizers(
    quantizers: list[TDQQuantizer], base: Tensor, bank: FrozenBank, ratios: Ratios
) -> list[RescaledFakeQuantize]:
    rows = [row if moves else None for row, moves in enumerate(_moves(bank).tolist())]
    zero_points = [int(value) for value in bank.zero_points[0].tolist()]
    settings = zip(quantizers, base.tolist(), zero_points, rows, strict=True)
    return [RescaledFakeQuantize(*setting, ratios) for setting in settings]


def _exchange(model: nn.Module, plain: Mapping[nn.Module, nn.Module]) -> None:
    """Put plain quantizers in the place of NNCF's hooks, those of weights as well."""
    storage, exchanged = get_hook_storage(model), dict(plain)
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        if isinstance(hook, BaseQuantizer):
            exchanged.setdefault(hook, FakeQuantizeWeight(hook))
        if hook in exchanged:
            storage.set_submodule(name, exchanged[hook])


def _tensor(output: Any) -> Tensor:
    """The tensor in what a denoiser returns: diffusers wrap it as `sample`, or in a tuple."""
    value = getattr(output, "sample", output)
    result: Tensor = value[0] if isinstance(value, tuple) else value
    return result
