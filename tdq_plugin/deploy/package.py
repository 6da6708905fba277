"""An int8 model as a folder: weights and table as safetensors, the description as JSON."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from tdq_plugin.deploy.activations import DynamicCodes, DynamicValues
from tdq_plugin.deploy.layers import Int8Layer
from tdq_plugin.deploy.lookup import TimestepLookup
from tdq_plugin.deploy.lower import LOOKUP, Int8Description, describe, lower_to_int8
from tdq_plugin.deploy.placement import Operand, insert_quantizers
from tdq_plugin.errors import AdapterError, TableFormatError, TableMismatchError
from tdq_plugin.files import atomic_folder, recover_folder
from tdq_plugin.graph.trace import trace
from tdq_plugin.grid import weight_grid
from tdq_plugin.scales.frozen import FrozenBank, Lookup
from tdq_plugin.table import load_table
from tdq_plugin.weights import WeightQuantizer

__all__ = ["FORMAT_VERSION", "load_int8", "read_description", "save_int8"]

FORMAT_VERSION = 1
_FORMAT = "tdq-int8"
_WEIGHTS, _TABLE, _JSON = "model.safetensors", "scale_table.safetensors", "quantization.json"
_BANK = f"{LOOKUP}.bank."


def save_int8(
    model: fx.GraphModule, folder: str | Path, *, extra: dict[str, Any] | None = None
) -> None:
    """Write a lowered model as a folder of three files, atomically.

    `model.safetensors` holds int8 codes (two to a byte for 4 bits and less), their scales, biases
    and the layers that stay float; `scale_table.safetensors` the scale table;
    `quantization.json` what is needed to lower the float architecture again.

    Args:
        model: From `lower_to_int8`.
        folder: The folder to create or replace.
        extra: Further facts for `quantization.json`, under the key `extra`; JSON values.

    Raises:
        AdapterError: The model is not lowered, or its activations are dynamic.
    """
    description = describe(model)
    bank = _bank(model)
    content = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "lookup": bank.lookup,
        **asdict(description),
        "extra": extra or {},
    }
    with atomic_folder(folder, marker=_JSON) as temporary:
        save_file(_state(model, description), temporary / _WEIGHTS)
        bank.table.save(temporary / _TABLE)
        (temporary / _JSON).write_text(json.dumps(content, indent=1) + "\n")


def load_int8(
    folder: str | Path, float_model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]
) -> fx.GraphModule:
    """Read a folder from `save_int8` into the architecture of the float model.

    Args:
        folder: The folder.
        float_model: The architecture; its weights are not used, and it stays as it is.
        example_inputs: One call of the model, as `trace` takes it.

    Returns:
        The lowered model; its outputs are bit-equal to the saved one's.

    Raises:
        TableFormatError: A file is missing, truncated, or of an unknown version.
        TableMismatchError: The folder belongs to another architecture, or to other heads, if its
            `extra` notes `attention_heads`, as recipes do.
    """
    content = read_description(folder)
    description, lookup = _parse(folder, content)
    _check_heads(float_model, content)
    state = _read_tensors(Path(folder) / _WEIGHTS)
    bank = FrozenBank(load_table(Path(folder) / _TABLE), lookup)
    graph_module = trace(
        copy.deepcopy(float_model).eval(),
        example_inputs,
        timestep_argument=description.timestep_argument,
    )
    insert_quantizers(graph_module, description.operands, bank)
    _add_weight_quantizers(graph_module, description)
    lowered = lower_to_int8(graph_module, cache_timestep_path=description.cache_timestep_path)
    _load_state(lowered, state, description)
    return lowered


def read_description(
    folder: str | Path,
    kind: str = _FORMAT,
    version: int = FORMAT_VERSION,
    writer: str = "save_int8",
) -> dict[str, Any]:
    """The content of `quantization.json`.

    Args:
        folder: A folder that `writer` wrote.
        kind: The format that the folder must have.
        version: The format version that it must have.
        writer: What writes such folders.

    Raises:
        TableFormatError: The file is missing, not JSON, or of an unknown version.
    """
    recover_folder(folder)
    path = Path(folder) / _JSON
    held = sorted(file.name for file in path.parent.glob("*"))
    if held and _JSON not in held:
        raise TableFormatError(
            f"{path} is not readable JSON: the folder has none, but {held[:5]}. Give the folder "
            f"that {writer} wrote; recipes of other adapters write other files."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableFormatError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise TableFormatError(
            f"{path} is no {kind.removeprefix('tdq-')} model. Give the folder that {writer} wrote."
        )
    if content.get("version") != version:
        raise TableFormatError(
            f"{path} has format version {content.get('version')!r}; this release reads version "
            f"{version}. Update tdq-plugin."
        )
    return content


def _parse(folder: str | Path, content: dict[str, Any]) -> tuple[Int8Description, Lookup]:
    try:
        operands = {
            name: [Operand(**operand) for operand in found]
            for name, found in content["operands"].items()
        }
        description = Int8Description(
            operands,
            content["weight_bits"],
            content["cache_timestep_path"],
            # Folders that were written before it was stored have one of the usual names.
            content.get("timestep_argument"),
        )
        return description, content["lookup"]
    except (KeyError, TypeError, AttributeError) as error:
        raise TableFormatError(f"{folder}/{_JSON} is not complete: {error!r}.") from error


def _check_heads(model: nn.Module, content: dict[str, Any]) -> None:
    """See that attentions have the heads that the recipes noted: no weight's shape shows them."""
    saved = content.get("extra", {}).get("attention_heads")
    found = (getattr(module, "heads", None) for module in model.modules())
    heads = {number for number in found if isinstance(number, int)}
    if saved is not None and heads and heads != {saved}:
        raise TableMismatchError(
            f"The attentions of this {type(model).__name__} have {sorted(heads)} heads, those of "
            f"the saved model {saved}. Call set_attention_heads(model, {saved}) of "
            "tdq_plugin.recipes.float_model first."
        )


def _bank(model: fx.GraphModule) -> FrozenBank:
    lookup = getattr(model, LOOKUP, None)
    is_dynamic = any(isinstance(m, DynamicCodes | DynamicValues) for m in model.modules())
    if is_dynamic or not isinstance(lookup, TimestepLookup):
        raise AdapterError(
            "A model with dynamic activations has no scale table to save. "
            "Call lower_to_int8 with activations='table'."
        )
    return lookup.bank


def _add_weight_quantizers(graph_module: fx.GraphModule, description: Int8Description) -> None:
    for path, bits in description.weight_bits.items():
        try:
            layer: Any = graph_module.get_submodule(path)
        except AttributeError as error:
            raise TableMismatchError(
                f"This model has no layer {path!r}. Load into the architecture that was saved."
            ) from error
        quantizer = WeightQuantizer(weight_grid(bits))
        # Any scale will do: the saved codes and scales take the place of what it gives.
        quantizer.set_scale(torch.ones(len(layer.weight)))
        layer.weight_fake_quant = quantizer


def _state(model: fx.GraphModule, description: Int8Description) -> dict[str, Tensor]:
    state = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
        if not key.startswith(_BANK)
    }
    for path in _packed_layers(description):
        state[f"{path}.codes"] = _pack_nibbles(state[f"{path}.codes"])
    return state


def _load_state(
    model: fx.GraphModule, state: dict[str, Tensor], description: Int8Description
) -> None:
    for path in _packed_layers(description):
        layer, key = model.get_submodule(path), f"{path}.codes"
        assert isinstance(layer, Int8Layer)
        if key in state and len(state[key]) == (layer.codes.numel() + 1) // 2:
            state[key] = _unpack_nibbles(state[key], layer.codes.shape)
    bank = {key: value for key, value in model.state_dict().items() if key.startswith(_BANK)}
    try:
        model.load_state_dict({**state, **bank})
    except RuntimeError as error:
        raise TableMismatchError(
            f"The folder belongs to another architecture than this {type(model).__name__}: {error}"
        ) from error


def _packed_layers(description: Int8Description) -> list[str]:
    return [path for path, bits in description.weight_bits.items() if bits <= 4]


def _pack_nibbles(codes: Tensor) -> Tensor:
    flat = nn.functional.pad(codes.flatten() + 8, (0, codes.numel() % 2)).view(torch.uint8)
    return flat[0::2] | (flat[1::2] << 4)


def _unpack_nibbles(packed: Tensor, shape: torch.Size) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return nibbles[: shape.numel()].view(torch.int8).sub(8).reshape(shape)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise TableFormatError(f"{path} is not a readable safetensors file: {error}.") from error
