"""Put the weights of CompVis' latent-diffusion into an LDMPipeline of the same architecture."""

from collections.abc import Iterable, Mapping
from math import prod

import torch
from diffusers import DDIMScheduler, LDMPipeline
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.compvis.names import autoencoder_layers, unet_layers

__all__ = ["load_compvis", "load_weights"]

PARTS = ("to_q", "to_k", "to_v")
NAMED = 3
# What the loss and the moving average need; neither is a part of the networks.
IGNORED = ("first_stage_model.loss.", "model_ema.decay", "model_ema.num_updates")


def load_compvis(pipeline: LDMPipeline, tensors: Mapping[str, Tensor], ema: bool) -> None:
    """Set all weights and the scaling factor of the latents.

    Args:
        pipeline: Of the checkpoint's architecture, with an AutoencoderKL.
        tensors: The checkpoint's, by CompVis' names.
        ema: Take the moving average of the UNet's weights, which CompVis samples with, not the
            weights after the last step.

    Raises:
        ConfigError: A tensor is missing, is of another shape or is not used, or the noise schedule
            is another one.
    """
    load_weights(pipeline, tensors, ema)
    _check_schedule(pipeline.scheduler, tensors)
    if "scale_factor" not in tensors:
        raise ConfigError(
            "The checkpoint has no tensor 'scale_factor', by which CompVis multiplies the latents; "
            "keep it when you write a state dict to another file."
        )
    pipeline.vqvae.register_to_config(scaling_factor=float(tensors["scale_factor"]))


def load_weights(pipeline: LDMPipeline, tensors: Mapping[str, Tensor], ema: bool) -> None:
    """The weights alone, as in `load_compvis`."""
    unet = _sources(pipeline.unet, unet_layers(pipeline.unet), "model.diffusion_model.")
    autoencoder = _sources(pipeline.vqvae, autoencoder_layers(pipeline.vqvae), "first_stage_model.")
    stored = {source: source for source in (*unet.values(), *autoencoder.values())}
    if ema:
        stored |= {source: _averaged(source) for source in unet.values()}
    _check_names(stored.values(), tensors, ema)
    for network, sources in ((pipeline.unet, unet), (pipeline.vqvae, autoencoder)):
        network.load_state_dict(
            {
                name: _value(network, name, source, tensors[stored[source]])
                for name, source in sources.items()
            }
        )


def _sources(network: nn.Module, layers: dict[str, str], prefix: str) -> dict[str, str]:
    """Of each parameter, CompVis' name."""
    sources = {}
    for name in network.state_dict():
        layer, _, parameter = name.rpartition(".")
        sources[name] = f"{prefix}{layers[layer]}.{parameter}"
    return sources


def _averaged(source: str) -> str:
    """CompVis keeps averages as buffers, whose names must not have dots."""
    return "model_ema." + source.removeprefix("model.").replace(".", "")


def _check_names(needed: Iterable[str], tensors: Mapping[str, Tensor], ema: bool) -> None:
    if ema and not any(name.startswith("model_ema.") for name in tensors):
        raise ConfigError(
            "ema = True: the checkpoint has no averaged weights (model_ema.*). ema=false imports "
            "those after its last step."
        )
    needed = set(needed)
    ignored = (*IGNORED, "model.diffusion_model." if ema else "model_ema.")
    # Names without a dot are the buffers of the diffusion process itself.
    networks = {name for name in tensors if "." in name and not name.startswith(ignored)}
    missing, unused = sorted(needed - set(tensors)), sorted(networks - needed)
    if missing or unused:
        raise ConfigError(
            "The checkpoint is not of this architecture: tensors that it lacks: "
            f"{_some(missing)}; tensors that have no place: {_some(unused)}."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "none") + more


def _value(network: nn.Module, name: str, source: str, tensor: Tensor) -> Tensor:
    shape = tuple(network.get_parameter(name).shape)
    if ".qkv." not in source:
        return _shaped(source, tensor, shape)
    # Channels are sorted by head, and only then by query, key and value (`QKVAttentionLegacy`).
    attention, layer, _ = name.rsplit(".", 2)
    joint = _shaped(source, tensor, (len(PARTS) * shape[0], *shape[1:]))
    by_head = joint.unflatten(0, (network.get_submodule(attention).heads, len(PARTS), -1))
    return by_head[:, PARTS.index(layer)].flatten(0, 1)


def _shaped(source: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Attentions of CompVis are convolutions of kernel size 1, those of diffusers are linear."""
    if tuple(tensor.shape[: len(shape)]) != shape or tensor.numel() != prod(shape):
        raise ConfigError(
            f"The checkpoint is not of this architecture: {source} has the shape "
            f"{tuple(tensor.shape)}, {shape} was expected."
        )
    return tensor.reshape(shape)


def _check_schedule(scheduler: DDIMScheduler, tensors: Mapping[str, Tensor]) -> None:
    """Against the checkpoint's own betas, where it has them; half precision is enough for that."""
    expected = scheduler.betas
    betas = tensors.get("betas", expected).float()
    if betas.shape != expected.shape or not torch.allclose(betas, expected, rtol=2e-3, atol=0):
        raise ConfigError(
            f"The checkpoint's noise schedule has {len(betas)} betas from {betas[0]:.4g} to "
            f"{betas[-1]:.4g}; this architecture's has {len(expected)} from {expected[0]:.4g} to "
            f"{expected[-1]:.4g}, linear in the square root."
        )
