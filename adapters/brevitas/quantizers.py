"""TDQ in a Brevitas layer: the classes to give as `input_quant`, `act_quant` or `output_quant`."""

from dataclasses import replace

from brevitas.inject import ExtendedInjector, value
from brevitas.quant import (
    Int8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
)

from tdq_plugin.adapters.brevitas.bank_choice import BankChoice, BankKind, choose_bank
from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.adapters.brevitas.tensor_quant import TDQTensorQuant
from tdq_plugin.grid import QuantizationGrid, activation_grid

__all__ = [
    "TDQInt8ActPerTensorFloat",
    "TDQShiftedUint8ActPerTensorFloat",
    "TDQUint8ActPerTensorFloat",
]

OPTIONS = (
    "tdq_estimator",
    "tdq_bank",
    "tdq_width",
    "tdq_depth",
    "tdq_groups",
    "tdq_num_timesteps",
)

# Brevitas gives these functions the attributes of a quantizer's class that have their arguments'
# names, and takes what they return as another attribute.


def _grid(
    bit_width: int, signed: bool, narrow_range: bool, tdq_symmetric: bool
) -> QuantizationGrid:
    grid = replace(activation_grid(int(bit_width), signed), symmetric=tdq_symmetric)
    if not narrow_range:
        return grid
    if signed:
        return replace(grid, quant_min=grid.quant_min + 1)
    return replace(grid, quant_max=grid.quant_max - 1)


def _bank_choice(
    tdq_bank: BankKind | None,
    tdq_width: int | None,
    tdq_depth: int | None,
    tdq_groups: int | None,
    tdq_num_timesteps: int | None,
) -> BankChoice | None:
    return choose_bank(
        tdq_bank,
        width=tdq_width,
        depth=tdq_depth,
        groups=tdq_groups,
        num_timesteps=tdq_num_timesteps,
    )


class _TDQ(ExtendedInjector):
    """The names that make a quantizer of Brevitas one of TDQ."""

    proxy_class = TDQActQuantProxy
    tensor_quant = TDQTensorQuant
    update_state_dict_impl = None
    tdq_grid = value(_grid)
    tdq_bank_choice = value(_bank_choice)
    tdq_symmetric = True
    tdq_estimator = "lsq"
    tdq_bank = None
    tdq_width = None
    tdq_depth = None
    tdq_groups = None
    tdq_num_timesteps = None


class TDQInt8ActPerTensorFloat(_TDQ, Int8ActPerTensorFloat):
    """Signed codes without a zero point: `Int8ActPerTensorFloat` with a scale for each timestep.

    `let` and prefixed arguments of layers set, besides `bit_width` and `narrow_range`:

    * `restrict_scaling_type`: `fp` and `log_fp` are the same here, `power_of_two`.
    * `tdq_estimator`: `lsq`, `pact`, `nipq`, or `brevitas` for Brevitas' own arithmetic.
    * `tdq_bank`: `generator`, `learned_table` or `constant`; and its size, `tdq_width`,
      `tdq_depth`, `tdq_groups`, `tdq_num_timesteps`. All quantizers of a model must agree;
      `tdq_plugin.attach(model, bank=...)` overrides them.

    Example:
        >>> from brevitas.nn import QuantLinear
        >>> quantizer = TDQInt8ActPerTensorFloat.let(bit_width=4, tdq_width=32)
        >>> layer = QuantLinear(8, 8, True, input_quant=quantizer)
    """


class TDQUint8ActPerTensorFloat(_TDQ, Uint8ActPerTensorFloat):
    """Unsigned codes without a zero point, for values that are never negative.

    Options as for `TDQInt8ActPerTensorFloat`.
    """


class TDQShiftedUint8ActPerTensorFloat(_TDQ, ShiftedUint8ActPerTensorFloat):
    """Unsigned codes with a zero point, which is the same at all timesteps.

    Options as for `TDQInt8ActPerTensorFloat`.
    """

    tdq_symmetric = False
