"""Latent diffusion models: loading, encoding and decoding, and the architecture of the paper's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from torch import nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.compvis.architecture import churches_pipeline
from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel, load_float_model, set_attention_heads
from tdq_plugin.recipes.objectives import NoisedImages

IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def model(tiny_latent_pipeline: Path) -> FloatModel:
    return load_float_model(tiny_latent_pipeline)


@pytest.fixture(scope="module")
def save(
    tiny_latent_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[nn.Module], Path]:
    """Saves the tiny pipeline with another autoencoder."""
    unet = UNet2DModel.from_pretrained(tiny_latent_pipeline, subfolder="unet")

    def with_autoencoder(autoencoder: nn.Module) -> Path:
        folder = tmp_path_factory.mktemp("pipeline")
        LDMPipeline(autoencoder, unet, DDIMScheduler()).save_pretrained(folder)
        return folder

    return with_autoencoder


def vq_model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        num_vq_embeddings=8,
        scaling_factor=0.5,
    )


def test_shapes(model: FloatModel) -> None:
    assert (model.latent_shape, model.image_shape) == ((2, 8, 8), (1, 16, 16))
    latents = model.encode(IMAGES)
    assert latents.shape[1:] == model.latent_shape
    assert model.decode(latents).shape[1:] == model.image_shape
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


def test_a_model_of_images_has_no_latents(tiny_pipeline: Path) -> None:
    model = load_float_model(tiny_pipeline)
    assert model.latent_shape == model.image_shape == (1, 16, 16)
    assert model.encode(IMAGES) is IMAGES
    assert model.decode(IMAGES) is IMAGES
    assert "autoencoder" not in model.describe()


def test_latents_are_scaled_means(model: FloatModel) -> None:
    assert isinstance(model.autoencoder, AutoencoderKL)
    encoded = model.autoencoder.encode(IMAGES).latent_dist
    torch.testing.assert_close(model.encode(IMAGES), 2 * encoded.mean)


def test_images_are_those_of_the_pipeline(model: FloatModel, tiny_latent_pipeline: Path) -> None:
    pipeline = LDMPipeline.from_pretrained(tiny_latent_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(
        batch_size=2, generator=generator, num_inference_steps=3, output_type="np"
    ).images
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    scheduler = scheduler_with(model.scheduler, 3)
    images = sample(model.denoise, scheduler, noise, decode=model.decode)
    torch.testing.assert_close(
        images.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(expected), rtol=1e-4, atol=1e-5
    )


def test_training_images_are_mirrored_before_they_are_encoded(model: FloatModel) -> None:
    inputs = NoisedImages(IMAGES[:1], model.scheduler, 16, seed=0, flip=True, encode=model.encode)
    drawn = inputs.draw(0, slice(None))
    assert drawn.noise is not None
    signal = model.scheduler.alphas_cumprod[drawn.timesteps].sqrt()[:, None, None, None]
    clean = (drawn.samples - (1 - signal**2).sqrt() * drawn.noise) / signal
    clear = drawn.timesteps < 500
    straight, mirrored = (
        (clean[clear] - model.encode(image)).abs().amax(dim=(1, 2, 3)) < 1e-3
        for image in (IMAGES[:1], IMAGES[:1].flip(-1))
    )
    assert bool((straight ^ mirrored).all())
    assert straight.any()
    assert mirrored.any()


def test_vq_latents_are_rounded_when_they_are_decoded(save: Callable[[nn.Module], Path]) -> None:
    model = load_float_model(save(vq_model()))
    assert isinstance(model.autoencoder, VQModel)
    assert (model.latent_shape, model.image_shape) == ((2, 8, 8), (1, 16, 16))
    latents = model.encode(IMAGES)
    torch.testing.assert_close(latents, 0.5 * model.autoencoder.encode(IMAGES).latents)
    codes = model.autoencoder.quantize(latents / 0.5)[0]
    assert not torch.allclose(codes, latents / 0.5)
    torch.testing.assert_close(model.decode(0.5 * codes), model.decode(latents))


def test_another_autoencoder(save: Callable[[nn.Module], Path]) -> None:
    other = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(ConfigError, match=r"has a AutoencoderTiny as its autoencoder; this recipe"):
        load_float_model(save(other))


def test_latents_of_another_number_of_channels(save: Callable[[nn.Module], Path]) -> None:
    config: dict[str, Any] = dict(vq_model().config) | {"latent_channels": 3}
    folder = save(VQModel.from_config(config))
    with pytest.raises(ConfigError, match=r"latents have 3 channels, and the UNet takes 2"):
        load_float_model(folder)


def test_attention_heads(tiny_latent_pipeline: Path) -> None:
    unet = load_float_model(tiny_latent_pipeline).unet
    set_attention_heads(unet, 4)
    attention = unet.mid_block.attentions[0]
    assert (attention.heads, attention.scale) == (4, 0.5)
    with pytest.raises(ConfigError, match=r"attention_heads = 3: .* has 16 channels, which is no"):
        set_attention_heads(unet, 3)


def test_the_architecture_of_the_paper() -> None:
    """Sizes as those of CompVis' model; on no device, so that it takes no time."""
    with torch.device("meta"):
        pipeline = churches_pipeline()
    model = FloatModel(pipeline.unet, pipeline.scheduler, pipeline.vqvae)
    assert (model.latent_shape, model.image_shape) == ((4, 32, 32), (3, 256, 256))
    assert model.describe().startswith("294,966,916 parameters, 83,653,863 in the float")
    attentions = [m for m in model.unet.modules() if hasattr(m, "to_q")]
    assert len(attentions) == 4 * 2 + 1 + 4 * 3
    assert {(m.heads, m.group_norm is None) for m in attentions} == {(8, False)}
    timesteps = scheduler_with(pipeline.scheduler, 200).timesteps
    assert (timesteps[0], timesteps[-1]) == (996, 1)
