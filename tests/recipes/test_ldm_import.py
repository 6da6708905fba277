"""Import of CompVis' checkpoint, against networks that compute what CompVis' do.

These have random weights: the published file is not at hand here.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from compvis_networks import LatentDiffusion
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.compvis.architecture import churches_pipeline
from tdq_plugin.recipes.compvis.weights import load_weights
from tdq_plugin.recipes.float_model import load_float_model, set_attention_heads
from tdq_plugin.recipes.ldm_churches_import import plan, run

pytestmark = pytest.mark.whole

HEADS = 4
SIZES: dict[str, Any] = {
    "width": 32,
    "multiples": (1, 2, 2),
    "attention": 2,
    "heads": HEADS,
    "widths": (32, 64),
}


def tiny_churches() -> LDMPipeline:
    """The architecture of the recipe with fewer levels and narrower ones: latents 4x8x8."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=8,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
    )
    set_attention_heads(unet, HEADS)
    autoencoder = AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64),
        down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",),
    )
    churches = dict(_on_no_device().scheduler.config)
    return LDMPipeline(autoencoder, unet, DDIMScheduler.from_config(churches))


def _on_no_device() -> LDMPipeline:
    with torch.device("meta"):
        return churches_pipeline()


def _compvis(seed: int) -> LatentDiffusion:
    """Small activations, so that what a norm adds to a variance shows; every norm a different one.

    With PyTorch's first weights, a network with another epsilon would pass.
    """
    torch.manual_seed(seed)
    model = LatentDiffusion(**SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "emb" not in name:
                parameter.mul_(0.2)
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def trained() -> LatentDiffusion:
    return _compvis(seed=1)


@pytest.fixture(scope="module")
def average() -> LatentDiffusion:
    return _compvis(seed=2)


@pytest.fixture(scope="module")
def tensors(trained: LatentDiffusion, average: LatentDiffusion) -> dict[str, Tensor]:
    return trained.checkpoint(average)


def _run(checkpoint: Path, *overrides: str) -> Path:
    keys = [f"checkpoint={checkpoint}", f"output={checkpoint.parent}", "threads=1", *overrides]
    return run(find_recipe("ldm-churches-import").configure(keys), tiny_churches)


def _saved(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def _draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _check_equal(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.std()
    assert_close(ours / scale, theirs / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ema", [True, False])
@torch.no_grad()
def test_noise_and_images_are_those_of_compvis(
    ema: bool,
    trained: LatentDiffusion,
    average: LatentDiffusion,
    tensors: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    model = load_float_model(_run(_saved(tensors, tmp_path), f"ema={ema}"))
    set_attention_heads(model.unet, HEADS)
    unet, autoencoder = model.unet.double(), model.autoencoder.double()
    latents, timesteps = _draw(3, 4, 8, 8), torch.tensor([1, 400, 999])
    denoiser = deepcopy(average if ema else trained).double().model.diffusion_model
    _check_equal(unet(latents, timesteps).sample, denoiser(latents, timesteps))
    images = _draw(2, 3, 16, 16)
    first = deepcopy(trained).double().first_stage_model
    _check_equal(autoencoder.encode(images).latent_dist.parameters, first.encode(images))
    _check_equal(model.encode(images), 0.25 * first.encode(images)[:, :4])
    _check_equal(model.decode(latents), first.decode(latents / 0.25))
    assert_close(model.scheduler.alphas_cumprod, trained.alphas_cumprod)


def test_every_layer_of_the_real_size_has_its_tensor() -> None:
    """The whole architecture, names and shapes; on no device, so that it takes no time."""
    with torch.device("meta"):
        compvis = LatentDiffusion()
        tensors = compvis.checkpoint(LatentDiffusion())
    for ema in (True, False):
        load_weights(_on_no_device(), tensors, ema)


def test_a_file_of_torch_save(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "model.ckpt")
    load_float_model(_run(tmp_path / "model.ckpt"))


def test_plan(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    keys = [f"checkpoint={_saved(tensors, tmp_path)}", f"output={tmp_path}"]
    printed = str(plan(find_recipe("ldm-churches-import").configure(keys), tiny_churches))
    assert "moving average" in printed
    assert "multiplied by 0.25" in printed
    assert not (tmp_path / "ldm-lsun-churches").exists()


def test_an_existing_folder_stays(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "ldm-lsun-churches").mkdir()
    with pytest.raises(ConfigError, match=r"ldm-lsun-churches exists\. Remove it, or choose"):
        _run(_saved(tensors, tmp_path))
    assert not any((tmp_path / "ldm-lsun-churches").iterdir())


CONVOLUTION = "model_ema.diffusion_modelinput_blocks10in_layers2weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CONVOLUTION: None}, rf"tensors that it lacks: {CONVOLUTION}; .* no place: none\.$"),
        (
            {f"cond_stage_model.{name}": torch.zeros(1) for name in "abcde"},
            r"lacks: none; .* cond_stage_model.a, .*b, cond_stage_model.c and 2 more\.$",
        ),
        ({"first_stage_model.loss.logvar": torch.zeros(1)}, None),
        (
            {CONVOLUTION: torch.zeros(3, 32, 3, 3)},
            r"in_layers.2.weight has the shape \(3, 32, 3, 3\), \(32, 32, 3, 3\) was expected",
        ),
        ({"scale_factor": None}, r"has no tensor 'scale_factor'"),
        (
            {"betas": torch.linspace(0.0015, 0.0155, 1000)},
            r"has 1000 betas from 0\.0015 to 0\.0155; .* linear in the square root",
        ),
        ({"betas": torch.ones(10)}, r"has 10 betas from 1 to 1; .* has 1000 from 0\.0015"),
    ],
    ids=["missing", "unused", "loss", "shape", "scale", "schedule", "steps"],
)
def test_tensors_that_do_not_fit(
    changes: dict[str, Tensor | None],
    message: str | None,
    tensors: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    changed = {name: value for name, value in (tensors | changes).items() if value is not None}
    checkpoint = _saved(changed, tmp_path)
    if message is None:
        _run(checkpoint)
        return
    with pytest.raises(ConfigError, match=message):
        _run(checkpoint)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_no_average(trained: LatentDiffusion, tmp_path: Path) -> None:
    checkpoint = _saved(trained.checkpoint(), tmp_path)
    with pytest.raises(ConfigError, match=r"ema = True: the checkpoint has no averaged weights"):
        _run(checkpoint)
    load_float_model(_run(checkpoint, "ema=false"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.ckpt", None, r"absent.ckpt': there is no such file\.$"),
        ("broken.safetensors", b"broken", r"is not a readable safetensors file"),
        ("broken.ckpt", b"broken", r"torch.load\(weights_only=True\) refuses it"),
    ],
)
def test_files_that_are_no_checkpoint(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        _run(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A path is an object of a class that torch does not know, as Lightning's callbacks are.
        ({"state_dict": {}, "callbacks": Path()}, r"weights_only=False .* safetensors.torch.save_"),
        ([1, 2], r"holds a list that is no state dict\.$"),
    ],
)
def test_what_torch_saved_besides(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ConfigError, match=message):
        _run(tmp_path / "model.ckpt")
