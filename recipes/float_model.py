"""The float model of a recipe: a diffusers pipeline with a UNet2DModel, from a folder or a hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.evaluation.sampling import image_shape
from tdq_plugin.recipes.plan import parameter_bytes

__all__ = [
    "FloatModel",
    "attention_heads",
    "load_float_model",
    "set_attention_heads",
    "set_dropout",
]

# Length of the diffusion process that the methods' scale banks are made for.
TIMESTEPS = 1000


@dataclass(frozen=True)
class FloatModel:
    """A denoiser that predicts noise, and the DDIM sampler of its diffusion process.

    Attributes:
        unet: The denoiser, of images or of latents.
        scheduler: Its diffusion process.
        autoencoder: Between images and latents; None where the denoiser sees the images
            themselves. It stays float in every recipe.
    """

    unet: UNet2DModel
    scheduler: DDIMScheduler
    autoencoder: AutoencoderKL | VQModel | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the denoiser sees."""
        return image_shape(self.unet)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that `encode` takes and `decode` gives."""
        if self.autoencoder is None:
            return self.latent_shape
        config = self.autoencoder.config
        size = self.latent_shape[1] * 2 ** (len(config.block_out_channels) - 1)
        return config.out_channels, size, size

    def to(self, device: torch.device | str) -> "FloatModel":
        """Move the networks to a device."""
        self.unet.to(device)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    @property
    def size_in_bytes(self) -> int:
        """Of all parameters."""
        networks = [network for network in (self.unet, self.autoencoder) if network is not None]
        return sum(parameter_bytes(network) for network in networks)

    def describe(self) -> str:
        """Its size in words."""
        size = f"{self.unet.num_parameters():,} parameters"
        if self.autoencoder is None:
            return size
        beside = f"{self.autoencoder.num_parameters():,} in the float autoencoder"
        return f"{size}, {beside}, images {'x'.join(map(str, self.image_shape))}"

    @torch.no_grad()
    def denoise(self, x: Tensor, t: Any) -> Tensor:
        """The noise in `x`, on the device of `x`."""
        predicted: Tensor = self.unet(x.to(self.unet.device), t, return_dict=False)[0]
        return predicted.to(x.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents `(N, *latent_shape)` of images in [-1, 1], scaled as the denoiser takes them.

        Of a KL autoencoder's distribution, this is the mean.
        """
        if self.autoencoder is None:
            return images
        encoded = self.autoencoder.encode(images.to(self.autoencoder.device))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return (latents * self.autoencoder.config.scaling_factor).to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `(N, *image_shape)` of latents; values may lie a little outside of [-1, 1].

        A VQ autoencoder rounds the latents to its codebook here.
        """
        if self.autoencoder is None:
            return latents
        scaled = latents.to(self.autoencoder.device) / self.autoencoder.config.scaling_factor
        return self.autoencoder.decode(scaled, return_dict=False)[0].to(latents.device)


def load_float_model(name: str | Path, key: str = "model") -> FloatModel:
    """Load a pipeline.

    Args:
        name: Folder of a saved pipeline, or a repository of the Hugging Face hub: a DDPM or DDIM
            pipeline, or an LDMPipeline whose `vqvae` is a VQModel or an AutoencoderKL.
        key: Of the name in the configuration, for messages.

    Raises:
        ConfigError: There is no such pipeline, its networks are not of these kinds or do not fit
            together, it predicts something else than the noise, its scheduler has no betas, the
            process has other than 1000 timesteps, or the sampler's are not at equal distances
            from 0.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(name))
    except (OSError, ValueError, AttributeError) as error:
        # An AttributeError is a pipeline that this release of diffusers does not know.
        raise ConfigError(
            f"{key} = {str(name)!r} is neither the folder of a saved diffusers pipeline nor a "
            f"repository that can be downloaded ({str(error).splitlines()[0]}). "
            f"Set {key}=... to one of these."
        ) from error
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel):
        raise ConfigError(
            f"{key} = {str(name)!r} is a {type(pipeline).__name__} with a {type(unet).__name__}; "
            "this recipe takes a pipeline with a UNet2DModel, such as google/ddpm-cifar10-32."
        )
    return FloatModel(unet.eval(), _scheduler(name, key), _autoencoder(name, pipeline, key))


def _scheduler(name: str | Path, key: str) -> DDIMScheduler:
    """DDIM for the diffusion process of a saved pipeline, from its file.

    Not from the pipeline: a DDIMPipeline makes a DDIM of every scheduler, also of those that know
    no betas.
    """
    try:
        config = DDIMScheduler.load_config(str(name), subfolder="scheduler")
    except OSError:
        # Early repositories, such as google/ddpm-cifar10-32, have no folders.
        config = DDIMScheduler.load_config(str(name))
    if "beta_schedule" not in config:
        raise ConfigError(
            f"{key} = {str(name)!r} has a {config.get('_class_name')} without beta_schedule; this "
            "recipe takes models of DDPM's diffusion process, such as google/ddpm-cifar10-32."
        )
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ConfigError(
            f"{key} = {str(name)!r} predicts {predicts!r}; this recipe takes models that predict "
            "the noise (prediction_type='epsilon')."
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing != "leading":
        raise ConfigError(
            f"{key} = {str(name)!r} has a scheduler with timestep_spacing={spacing!r}; the recipes "
            "visit DDIM's timesteps, and others at a distance from them, which diffusers does with "
            "'leading' alone. Set it in the pipeline's scheduler/scheduler_config.json."
        )
    length = config.get("num_train_timesteps", TIMESTEPS)
    if length != TIMESTEPS:
        raise ConfigError(
            f"{key} = {str(name)!r} has a process of {length} timesteps; the methods of the "
            f"recipes are made for {TIMESTEPS}. In a script of your own, give calibrate and the "
            "bank's configuration num_timesteps."
        )
    # DDIM (arXiv 2010.02502) does not clip. Near pure noise, a quantization error of the noise is
    # a hundredfold error of the image, which clipping turns from zero mean into a shift.
    scheduler: DDIMScheduler = DDIMScheduler.from_config(config, clip_sample=False)
    return scheduler


def _autoencoder(
    name: str | Path, pipeline: DiffusionPipeline, key: str
) -> AutoencoderKL | VQModel | None:
    autoencoder = getattr(pipeline, "vqvae", None)
    if autoencoder is None:
        return None
    if not isinstance(autoencoder, AutoencoderKL | VQModel):
        raise ConfigError(
            f"{key} = {str(name)!r} has a {type(autoencoder).__name__} as its autoencoder; this "
            "recipe takes a VQModel or an AutoencoderKL."
        )
    config, seen = autoencoder.config, pipeline.unet.config.in_channels
    latents = getattr(config, "vq_embed_dim", None) or config.latent_channels
    if latents != seen:
        raise ConfigError(
            f"{key} = {str(name)!r}: the autoencoder's latents have {latents} channels, and the "
            f"UNet takes {seen}."
        )
    return autoencoder.eval().requires_grad_(False)


def set_dropout(unet: UNet2DModel, probability: float) -> None:
    """Set the dropout of the residual blocks, as the model had it when it was trained."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = probability


def attention_heads(unet: UNet2DModel) -> int | None:
    """The number of heads that all attentions have; None if they have other numbers, or none."""
    heads = {module.heads for module in unet.modules() if isinstance(module, Attention)}
    return heads.pop() if len(heads) == 1 else None


def set_attention_heads(unet: UNet2DModel, heads: int) -> None:
    """Give every attention the same number of heads.

    A UNet2DModel's configuration has one width of a head; models with one number of heads, such
    as CompVis' latent diffusion models, need this after they are loaded. Weights stay as they are.

    Raises:
        ConfigError: The channels of an attention are no multiple of it.
    """
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            if module.inner_dim % heads:
                raise ConfigError(
                    f"attention_heads = {heads}: {name} has {module.inner_dim} channels, which is "
                    "no multiple."
                )
            module.heads, module.scale = heads, (module.inner_dim // heads) ** -0.5
