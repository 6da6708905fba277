"""TDQ by its name in the configurations of `brevitas_examples`."""

from tdq_plugin.adapters.brevitas.quantizers import (
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
)

__all__ = ["register_with_brevitas_examples"]


def register_with_brevitas_examples() -> None:
    """Let `generate_quantizers(input_scale_type="tdq", ...)` of `brevitas_examples` give TDQ.

    Formats and methods are those of static scales: `int`, `float_scale`, `stats`, `per_tensor`,
    `sym` or `asym`. The command lines of the examples check their choices and do not take it.
    """
    from brevitas_examples.common.generative.quantize import INPUT_QUANT_MAP

    quantizers = {"sym": TDQInt8ActPerTensorFloat, "asym": TDQShiftedUint8ActPerTensorFloat}
    INPUT_QUANT_MAP["int"]["tdq"] = {"float_scale": {"stats": {"per_tensor": quantizers}}}
