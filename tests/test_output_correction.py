"""The output correction: it matches mean samples, looks timesteps up exactly, and comes back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import save_file
from torch import Tensor

import tdq_plugin as tdq
from tdq_plugin.errors import CalibrationError, LookupRuleError, ScaleError, TableFormatError


def sampler(**settings: object) -> DDIMScheduler:
    scheduler = DDIMScheduler(**{"clip_sample": False, **settings})
    scheduler.set_timesteps(8)
    return scheduler


def reference(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.7 + 0.1 * (x * 3).sin()


def biased(x: Tensor, t: Tensor) -> Tensor:
    """Far from the reference at every step, in a way that depends on the pixel and on x."""
    ramp = torch.linspace(-0.2, 0.3, x.shape[-1])
    return reference(x, t) * 1.05 + ramp + float(t) / 5000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_model_leaves_the_timesteps_of_its_correction(dtype: torch.dtype) -> None:
    correction = tdq.OutputCorrection(torch.tensor([998.0, 999.0]), torch.ones(2, 1, 2, 2) * 0.5)
    corrected = tdq.CorrectedDenoiser(lambda x, t: x, correction).to(dtype)
    output = corrected(torch.zeros(1, 1, 2, 2, dtype=dtype), 999)
    assert output.dtype == dtype
    assert output.unique().tolist() == [0.5]


def mean_images(denoiser: object, scheduler: DDIMScheduler, noise: Tensor) -> list[Tensor]:
    means, current = [], noise
    for timestep in scheduler.timesteps:
        current = scheduler.step(denoiser(current, timestep), timestep, current).prev_sample
        means.append(current.mean(0))
    return means


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def correction(noise: Tensor) -> tdq.OutputCorrection:
    return tdq.fit_output_correction(biased, reference, sampler(), noise, batch_size=24)


def test_mean_samples_become_the_references(
    noise: Tensor, correction: tdq.OutputCorrection
) -> None:
    wanted = mean_images(reference, sampler(), noise)
    corrected = mean_images(tdq.CorrectedDenoiser(biased, correction), sampler(), noise)
    uncorrected = mean_images(biased, sampler(), noise)
    for step, mean in enumerate(wanted):
        assert (corrected[step] - mean).abs().max() < 0.05 * (uncorrected[step] - mean).abs().max()


def test_small_shifts_in_half_precision(noise: Tensor) -> None:
    """Their squares are below what float16 can hold."""

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + 1e-4

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x

    single, half = (
        tdq.fit_output_correction(shifted, exact, sampler(), (noise * 0.01).to(dtype))
        for dtype in (torch.float32, torch.float16)
    )
    assert single.offsets.mean() == pytest.approx(-1e-4, rel=0.1)
    assert half.offsets.mean() == pytest.approx(-1e-4, rel=0.3)


def test_a_model_without_bias_is_hardly_touched(noise: Tensor) -> None:
    def noisy(x: Tensor, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(t))
        return reference(x, t) + 0.3 * torch.randn(x.shape, generator=generator)

    correction = tdq.fit_output_correction(noisy, reference, sampler(), noise, batch_size=64)
    # Means of 64 samples would be offsets of 0.3 / 8.
    assert correction.offsets.square().mean().sqrt() < 0.02


def test_a_mixed_batch_equals_its_samples(correction: tdq.OutputCorrection) -> None:
    output = torch.randn(8, 1, 4, 4)
    timesteps = sampler().timesteps
    mixed = correction(output, timesteps)
    for row, timestep in enumerate(timesteps):
        torch.testing.assert_close(
            mixed[row : row + 1], correction(output[row : row + 1], timestep)
        )


def test_another_samplers_timestep_is_refused(correction: tdq.OutputCorrection) -> None:
    with pytest.raises(LookupRuleError, match=r"no timestep \[7.0\].*Fit one for this sampler"):
        correction(torch.zeros(1, 1, 4, 4), 7)


def test_it_comes_back_bit_equal(tmp_path: Path, correction: tdq.OutputCorrection) -> None:
    correction.save(tmp_path / "correction.safetensors")
    loaded = tdq.load_correction(tmp_path / "correction.safetensors")
    for key, value in correction.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"timesteps": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x01")
    with pytest.raises(TableFormatError, match=r"holds \['timesteps'\].* version 1 is expected"):
        tdq.load_correction(tmp_path / "other.safetensors")
    for name in ("broken", "missing"):
        with pytest.raises(TableFormatError, match="not a readable safetensors file"):
            tdq.load_correction(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("timesteps", "offsets", "message"),
    [
        (torch.zeros(2), torch.zeros(3, 1, 1, 1), "one offset for each timestep"),
        (torch.tensor([5.0, 1.0]), torch.zeros(2, 1, 1, 1), "timesteps of a correction ascend"),
        (torch.tensor([0.0]), torch.full((1, 1, 1, 1), torch.nan), "offsets are finite"),
    ],
)
def test_impossible_corrections_are_refused(
    timesteps: Tensor, offsets: Tensor, message: str
) -> None:
    with pytest.raises(ScaleError, match=message):
        tdq.OutputCorrection(timesteps, offsets)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_samplers_that_are_not_linear_are_refused(setting: str, noise: Tensor) -> None:
    scheduler = sampler(**{setting: True})
    with pytest.raises(CalibrationError, match=r"At t = \d+, .* clip_sample=False"):
        tdq.fit_output_correction(biased, reference, scheduler, noise)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        PNDMScheduler(skip_prk_steps=True),
        DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
)
def test_samplers_that_remember_steps_are_refused_and_unchanged(
    scheduler: Any, noise: Tensor
) -> None:
    scheduler.set_timesteps(4)
    before = copy.deepcopy(vars(scheduler))
    with pytest.raises(CalibrationError, match="is not linear in the predicted noise"):
        tdq.fit_output_correction(biased, reference, scheduler, noise)
    assert str(vars(scheduler)) == str(before)


def test_one_sample_is_refused(noise: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"1 samples do not tell.*Give 2"):
        tdq.fit_output_correction(biased, reference, sampler(), noise[:1])


@pytest.mark.parametrize(
    ("shape", "timesteps"), [((1, 1, 4, 4), (0, 125)), ((2, 3, 4, 4), 125), ((2, 1, 1, 1), 125)]
)
def test_shapes_that_would_broadcast_are_refused(
    correction: tdq.OutputCorrection, shape: tuple[int, ...], timesteps: Any
) -> None:
    with pytest.raises(ScaleError, match=r"Offsets of shape .* fit a correction for this size"):
        correction(torch.zeros(shape), torch.tensor(timesteps))


def test_it_takes_the_unets_place_in_a_pipeline() -> None:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    scheduler = sampler()
    correction = tdq.OutputCorrection(scheduler.timesteps.flip(0), torch.full((8, 1, 8, 8), 0.1))
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = tdq.CorrectedDenoiser(unet, correction)

    images = pipeline(num_inference_steps=8, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    x, timestep = torch.randn(2, 1, 8, 8), scheduler.timesteps[0]
    expected = unet(x, timestep).sample + 0.1
    torch.testing.assert_close(pipeline.unet(x, timestep).sample, expected)
    torch.testing.assert_close(pipeline.unet(x, timestep, return_dict=False)[0], expected)
