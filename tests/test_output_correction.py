"""The output correction: it matches mean samples, looks timesteps up exactly, and comes back."""

import copy
from collections.abc import Callable
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
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import save_file
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.errors import CalibrationError, LookupRuleError, ScaleError, TableFormatError


def offsets_only(timesteps: Tensor, offsets: Tensor) -> tdq.OutputCorrection:
    ones = torch.ones(offsets.shape[:2])
    return tdq.OutputCorrection(timesteps, ones, 0 * ones, offsets)


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
    correction = offsets_only(torch.tensor([998.0, 999.0]), torch.ones(2, 1, 2, 2) * 0.5)
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


class Dropping(nn.Module):
    """A denoiser in training mode, in the form of diffusers."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.denoiser, self.dropout = denoiser, nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=self.dropout(self.denoiser(x, t)))


def test_it_is_fitted_without_dropout(noise: Tensor, correction: tdq.OutputCorrection) -> None:
    models = Dropping(biased), Dropping(reference)
    found = tdq.fit_output_correction(*models, sampler(), noise)
    for name, value in correction.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert all(model.dropout.training for model in models)


def test_programs_that_have_one_mode_are_fitted(
    noise: Tensor, correction: tdq.OutputCorrection
) -> None:
    """As graphs of `convert_pt2e` are."""

    class OneMode(Dropping):
        def train(self, mode: bool = True) -> nn.Module:
            raise NotImplementedError("Calling train() or eval() is not supported")

    model = OneMode(biased)
    model.dropout.p = 0.0
    found = tdq.fit_output_correction(model, reference, sampler(), noise)
    assert torch.equal(found.offsets, correction.offsets)


def test_gains_find_what_output_and_sample_tell(noise: Tensor) -> None:
    """Each channel has its own error, which is linear in both."""
    noise = noise.reshape(32, 2, 4, 4)
    kept = torch.tensor([0.9, 1.2])[:, None, None]
    added = torch.tensor([0.05, -0.1])[:, None, None]

    def blurred(x: Tensor, t: Tensor) -> Tensor:
        return kept * reference(x, t) + added * x + 0.1

    correction = tdq.fit_output_correction(blurred, reference, sampler(), noise)
    expected = (1 / kept).flatten().expand(8, 2), (-added / kept).flatten().expand(8, 2)
    torch.testing.assert_close(correction.output_gains, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(correction.sample_gains, expected[1], rtol=1e-3, atol=1e-3)
    corrected = tdq.CorrectedDenoiser(blurred, correction)
    other = torch.randn(16, 2, 4, 4)
    timestep = sampler().timesteps[3]
    torch.testing.assert_close(
        corrected(other, timestep), reference(other, timestep), atol=1e-3, rtol=1e-3
    )


def test_output_and_sample_may_be_the_same(noise: Tensor) -> None:
    """Near pure noise they almost are; the gains stay small all the same."""
    correction = tdq.fit_output_correction(lambda x, t: 0.9 * x, lambda x, t: x, sampler(), noise)
    together = 0.9 * correction.output_gains + correction.sample_gains
    torch.testing.assert_close(together, torch.ones(8, 1), rtol=1e-4, atol=1e-4)
    assert correction.output_gains.max() < 1.2
    assert correction.sample_gains.abs().max() < 0.2


def test_gains_that_explain_little_are_left_out(noise: Tensor) -> None:
    """They would shrink what is not linear in the sample; here that is small above t = 500."""

    def curved(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + (0.001 if t > 500 else 1) * (x * 3).sin()

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return (curved(x, t) * 4).round() / 4

    correction = tdq.fit_output_correction(rounded, curved, sampler(), noise)
    low = correction.timesteps <= 500
    assert correction.output_gains[low].unique().tolist() == [1.0]
    assert correction.sample_gains[low].unique().tolist() == [0.0]
    assert correction.output_gains[~low].abs().max() < 0.1
    assert (correction.sample_gains[~low] - 0.7).abs().max() < 0.1


def test_without_gains_offsets_do_all(noise: Tensor) -> None:
    asked: list[float] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return biased(x, t)

    correction = tdq.fit_output_correction(counted, reference, sampler(), noise, explained=1)
    assert len(asked) == len(set(asked)) == 8
    assert correction.output_gains.unique().tolist() == [1.0]
    assert correction.sample_gains.unique().tolist() == [0.0]
    assert correction.offsets.any()


def test_small_shifts_in_half_precision(noise: Tensor) -> None:
    """Their squares are below what float16 can hold."""

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + 1e-4

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x

    small = noise * 0.01
    for dtype, tolerance in ((torch.float32, 0.1), (torch.float16, 0.3)):
        noises = small.to(dtype)
        offsets = tdq.fit_output_correction(shifted, exact, sampler(), noises, explained=1).offsets
        assert offsets.mean() == pytest.approx(-1e-4, rel=tolerance)
        # An output and a sample that tell each other share the gains, and so what is to be shifted.
        correction = tdq.fit_output_correction(shifted, exact, sampler(), noises)
        corrected = tdq.CorrectedDenoiser(shifted, correction)
        left = [(corrected(small, t) - exact(small, t)).mean() for t in sampler().timesteps]
        assert abs(torch.stack(left).mean()) < tolerance * 1e-4


def test_a_model_without_bias_is_hardly_touched(noise: Tensor) -> None:
    def noisy(x: Tensor, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(t))
        return reference(x, t) + 0.3 * torch.randn(x.shape, generator=generator)

    correction = tdq.fit_output_correction(noisy, reference, sampler(), noise, batch_size=64)
    # Means of 64 samples would be offsets of 0.3 / 8.
    assert correction.offsets.square().mean().sqrt() < 0.02


def test_a_mixed_batch_equals_its_samples(correction: tdq.OutputCorrection) -> None:
    output, sample = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
    timesteps = sampler().timesteps
    mixed = correction(output, timesteps, sample)
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        torch.testing.assert_close(mixed[one], correction(output[one], timestep, sample[one]))


def test_another_samplers_timestep_is_refused(correction: tdq.OutputCorrection) -> None:
    with pytest.raises(LookupRuleError, match=r"no timestep \[7.0\].*Fit one for this sampler"):
        correction(torch.zeros(1, 1, 4, 4), 7, torch.zeros(1, 1, 4, 4))


def test_it_comes_back_bit_equal(tmp_path: Path, correction: tdq.OutputCorrection) -> None:
    correction.save(tmp_path / "correction.safetensors")
    loaded = tdq.load_correction(tmp_path / "correction.safetensors")
    for key, value in correction.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_equal_tensors_may_be_the_same(tmp_path: Path) -> None:
    ones, path = torch.ones(2, 1), tmp_path / "correction.safetensors"
    offsets = torch.zeros(2, 1, 4, 4)
    made = tdq.OutputCorrection(torch.tensor([1.0, 2.0]), ones, ones, offsets)
    made.save(path)
    offsets.add_(1)
    assert not made.offsets.any()
    assert torch.equal(tdq.load_correction(path).sample_gains, ones)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"timesteps": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x01")
    with pytest.raises(
        TableFormatError, match=r"holds \['timesteps'\].* version 2 is expected. Fit it anew"
    ):
        tdq.load_correction(tmp_path / "other.safetensors")
    for name in ("broken", "missing"):
        with pytest.raises(TableFormatError, match="not a readable safetensors file"):
            tdq.load_correction(tmp_path / f"{name}.safetensors")


ONES = torch.ones(2, 1)
POSSIBLE = (torch.tensor([0.0, 1.0]), ONES, ONES, torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(3), r"shapes \[\(3,\), .*a gain for each channel, and an offset"),
        (1, torch.ones(2, 3), r"\(2, 3\), .*a gain for each channel"),
        (2, torch.ones(2), r"\(2,\), .*a gain for each channel"),
        (3, torch.zeros(2, 4, 4), r"an offset \(C, H, W\)"),
        (0, torch.tensor([5.0, 1.0]), "timesteps of a correction ascend"),
        (2, torch.full((2, 1), torch.inf), "gains and offsets are finite"),
        (3, torch.full((2, 1, 4, 4), torch.nan), "gains and offsets are finite"),
    ],
)
def test_impossible_corrections_are_refused(changed: int, value: Tensor, message: str) -> None:
    parts = list(POSSIBLE)
    parts[changed] = value
    with pytest.raises(ScaleError, match=message):
        tdq.OutputCorrection(*parts)


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


def test_what_is_no_share_is_refused(noise: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"explained = 95 is no share"):
        tdq.fit_output_correction(biased, reference, sampler(), noise, explained=95)


def test_one_sample_is_refused(noise: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"1 samples do not tell.*Give 2"):
        tdq.fit_output_correction(biased, reference, sampler(), noise[:1])


@pytest.mark.parametrize(
    ("shape", "timesteps"), [((1, 1, 4, 4), (0, 125)), ((2, 3, 4, 4), 125), ((2, 1, 1, 1), 125)]
)
def test_shapes_that_would_broadcast_are_refused(
    correction: tdq.OutputCorrection, shape: tuple[int, ...], timesteps: Any
) -> None:
    with pytest.raises(ScaleError, match=r"offsets of shape .* fit a correction for this size"):
        correction(torch.zeros(shape), torch.tensor(timesteps), torch.zeros(shape))


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
    correction = offsets_only(scheduler.timesteps.flip(0), torch.full((8, 1, 8, 8), 0.1))
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = tdq.CorrectedDenoiser(unet, correction)

    images = pipeline(num_inference_steps=8, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    x, timestep = torch.randn(2, 1, 8, 8), scheduler.timesteps[0]
    expected = unet(x, timestep).sample + 0.1
    torch.testing.assert_close(pipeline.unet(x, timestep).sample, expected)
    torch.testing.assert_close(pipeline.unet(x, timestep, return_dict=False)[0], expected)
