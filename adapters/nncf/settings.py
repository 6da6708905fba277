"""The settings of `nncf.quantize` that a diffusion model needs."""

from collections.abc import Sequence
from typing import Any

import nncf
from nncf.quantization.advanced_parameters import QuantizationParameters

from tdq_plugin.layer_names import TIMESTEP_LAYERS

__all__ = ["TIMESTEP_PATTERNS", "tdq_quantize_settings"]

TIMESTEP_PATTERNS = tuple(
    # NNCF calls an operation `path/of/its/module/function/number`.
    layer.replace(".", "/").replace("*", ".*") + r"/[^/]+/\d+"
    for layer in ("*time_proj*", *TIMESTEP_LAYERS)
)
"""Operations of diffusers' models that see the timestep or a class, and not the sample."""


def tdq_quantize_settings(
    symmetric_activations: bool = False,
    attention: bool = False,
    timestep_patterns: Sequence[str] = TIMESTEP_PATTERNS,
    ignored_patterns: Sequence[str] = (),
) -> dict[str, Any]:
    """Keyword arguments for `nncf.quantize`.

    They quantize the inputs and weights of convolutions, linear layers and matrix products, and
    leave the timestep's own path float: by default NNCF rounds the timestep itself to 8 bits. No
    layer's weights or biases are changed, and weights use the whole grid: the half range that
    NNCF gives to the first layer puts the largest weights exactly between two codes.

    Args:
        symmetric_activations: Signed activations without a zero point; else NNCF chooses
            asymmetric ones, apart from products of two activations.
        attention: Quantize the inputs of `scaled_dot_product_attention`, too. OpenVINO computes
            it in float on the CPU.
        timestep_patterns: Regular expressions for the names of the operations on the timestep's
            path. `prepare` names the operations that were missed and patterns for them.
        ignored_patterns: Regular expressions for further operations that stay float.

    Returns:
        The arguments; `subset_size` and the like may be added to them.

    Example:
        >>> sorted(tdq_quantize_settings())
        ['advanced_parameters', 'ignored_scope', 'model_type', 'preset']
    """
    preset = nncf.QuantizationPreset
    return {
        # NNCF's name for: only layers and products are quantized, sums and norms are not.
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": preset.PERFORMANCE if symmetric_activations else preset.MIXED,
        "ignored_scope": nncf.IgnoredScope(
            patterns=[*timestep_patterns, *ignored_patterns],
            types=[] if attention else ["scaled_dot_product_attention"],
            validate=False,
        ),
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            activations_quantization_params=QuantizationParameters(per_channel=False),
            disable_bias_correction=True,
            overflow_fix=nncf.OverflowFix.DISABLE,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
        ),
    }
