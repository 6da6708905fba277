"""A converted UNet in diffusers' pipelines."""

import copy

import numpy as np
import pytest
import torch
from cpu import needs_vnni
from deploy.networks import frozen
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, LDMPipeline
from diffusers_models import one_level_unet

from tdq_plugin.deploy.openvino import OVDenoiser, load_openvino, save_openvino, to_openvino
from tdq_plugin.errors import TableFormatError

STEPS = 4


def scheduler():
    made = DDIMScheduler()
    made.set_timesteps(STEPS)
    return made


@pytest.fixture(scope="module")
def unet():
    return one_level_unet(in_channels=4, out_channels=4).eval()


@pytest.fixture(scope="module")
def quantized(unet):
    example = (torch.zeros(2, 4, 8, 8), torch.tensor([0, 1]))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [(noise, torch.full((4,), int(t))) for t in scheduler().timesteps]
    return frozen(model=copy.deepcopy(unet), batches=batches, example=example, steps=scheduler())


@pytest.fixture(scope="module")
def denoiser(unet, quantized):
    return OVDenoiser(to_openvino(quantized, (torch.zeros(2, 4, 8, 8), 0)), unet.config)


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
    return pipeline(batch_size=2, **options).images


@needs_vnni
def test_ddim_pipeline_samples_in_three_lines(denoiser, quantized, unet, tmp_path):
    denoiser.save(tmp_path / "unet")
    loaded = OVDenoiser.load(tmp_path / "unet")
    pipeline = DDIMPipeline(unet=loaded, scheduler=DDIMScheduler())
    images = draw(pipeline)
    assert images.shape == (2, 8, 8, 4)
    trained = draw(DDIMPipeline(unet=OVDenoiser(quantized, unet.config), scheduler=DDIMScheduler()))
    float32 = draw(DDIMPipeline(unet=unet, scheduler=DDIMScheduler()))
    assert np.abs(images - trained).mean() < 0.3 * np.abs(float32 - trained).mean()
    assert pipeline.to("cpu").unet is loaded
    pipeline.unet = denoiser
    np.testing.assert_allclose(draw(pipeline), images, atol=1e-5)


@pytest.mark.whole
def test_ldm_pipeline(denoiser):
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    pipeline = LDMPipeline(vqvae=decoder, unet=denoiser, scheduler=DDIMScheduler())
    assert draw(pipeline).shape == (2, 8, 8, 3)


def test_it_answers_like_a_unet(denoiser, unet):
    sample = torch.randn(2, 4, 8, 8)
    output = denoiser(sample, scheduler().timesteps[0])
    assert type(output) is type(unet(sample, 0))
    (plain,) = denoiser(sample, 750, return_dict=False, class_labels=None)
    assert torch.equal(output.sample, plain)
    assert denoiser(sample.double(), 750).sample.dtype == torch.float64
    assert (denoiser.dtype, denoiser.device) == (unet.dtype, unet.device)
    assert denoiser.config.sample_size == unet.config["sample_size"]


def test_a_unet_from_a_folder(denoiser, unet, tmp_path):
    unet.save_pretrained(tmp_path / "float")
    config = type(unet).from_pretrained(tmp_path / "float").config
    OVDenoiser(denoiser.model, config).save(tmp_path / "model")
    assert OVDenoiser.load(tmp_path / "model").config.sample_size == config["sample_size"]


def test_a_folder_without_configuration(denoiser, tmp_path):
    save_openvino(denoiser.model, tmp_path / "model")
    with pytest.raises(TableFormatError, match=r"without the UNet's configuration.*load_openvino"):
        OVDenoiser.load(tmp_path / "model")
    assert load_openvino(tmp_path / "model").input_names == ("sample", "timestep")
