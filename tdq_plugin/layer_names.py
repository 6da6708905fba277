"""Choosing layers by name: those that a user wants float, and those of the timestep's path."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from tdq_plugin.errors import ConfigError

__all__ = ["TIMESTEP_LAYERS", "choose_layers", "layers_to_quantize"]

TIMESTEP_LAYERS = (
    "*time_emb*",
    "*timestep_embedder*",
    "*class_emb*",
    "*time_text_embed*",
    "*adaln_single*",
    "*norm*.linear",
    "proj_out_1",
)
"""Layers of diffusers' models that see the timestep or a class, and not the sample."""


def choose_layers(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The layers that match any of the patterns: a name, a module above, or a wildcard.

    A text is one pattern.

    Raises:
        ConfigError: A pattern matches nothing.

    Example:
        >>> choose_layers(["conv_in", "mid.0.conv", "mid.1.conv"], ["mid.0", "*_in"])
        ['conv_in', 'mid.0.conv']
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {
            name for name in layers if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        }
        if not matched:
            raise ConfigError(
                f"{pattern!r} matches none of the model's {len(layers)} layers; "
                f"the first are {list(layers[:3])}. Correct the name or the wildcard."
            )
        chosen |= matched
    return [name for name in layers if name in chosen]


def layers_to_quantize(
    layers: Sequence[str],
    float_layers: Sequence[str] = (),
    timestep_layers: Sequence[str] = TIMESTEP_LAYERS,
) -> list[str]:
    """The layers that are left, where there is no graph to tell the timestep's path.

    Args:
        layers: Names of a model's layers.
        float_layers: As for `choose_layers`.
        timestep_layers: Wildcards; those that match nothing do not matter.

    Raises:
        ConfigError: An entry of `float_layers` matches nothing.

    Example:
        >>> layers_to_quantize(["conv_in", "time_embedding.linear_1", "conv_out"], ["conv_out"])
        ['conv_in']
    """
    excluded = set(choose_layers(layers, float_layers))
    excluded |= {name for name in layers if any(fnmatchcase(name, p) for p in timestep_layers)}
    return [name for name in layers if name not in excluded]
