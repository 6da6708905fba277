import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from tdq_plugin.errors import CalibrationError, ConfigError
from tdq_plugin.reconstruct import ReconstructionConfig, collect_trajectories
from tdq_plugin.reconstruct.collect import samples_per_step

SHAPE = (1, 4, 4)


def half(samples, timestep):
    return 0.5 * samples


@pytest.fixture
def scheduler():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    return scheduler


def test_every_step_of_every_trajectory_is_kept(scheduler):
    data = collect_trajectories(half, scheduler, SHAPE, images=6, batch_size=4)
    assert len(data) == 60
    values, counts = data.timesteps.unique(return_counts=True)
    assert values.tolist() == sorted(scheduler.timesteps.tolist())
    assert counts.tolist() == [6] * 10


def test_the_first_samples_are_noise_and_later_ones_come_from_the_scheduler(scheduler):
    data = collect_trajectories(half, scheduler, SHAPE, images=1)
    for index, timestep in enumerate(scheduler.timesteps[:-1]):
        sample = data.samples[index : index + 1]
        following = scheduler.step(half(sample, timestep), timestep, sample).prev_sample
        assert torch.equal(following, data.samples[index + 1 : index + 2])


@pytest.mark.parametrize("images", [0, -1])
def test_no_image(scheduler, images):
    with pytest.raises(ConfigError, match=f"^images = {images}: give 1 or more"):
        collect_trajectories(half, scheduler, SHAPE, images=images)


def test_dropout_is_not_in_the_trajectories(scheduler):
    model = Dropping()
    data = collect_trajectories(model, scheduler, SHAPE, images=2)
    expected = collect_trajectories(half, scheduler, SHAPE, images=2)
    assert torch.equal(data.samples, expected.samples)
    assert model.dropout.training


class Dropping(torch.nn.Module):
    """`half`, in training mode and in the form of diffusers."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, samples, timestep):
        return UNet2DOutput(sample=self.dropout(0.5 * samples))


def test_normal_timesteps_prefer_the_middle_near_the_image(scheduler):
    data = collect_trajectories(half, scheduler, SHAPE, images=20, distribution="normal")
    values, counts = data.timesteps.unique(return_counts=True)
    assert values[counts.argmax()] in (300, 400)
    assert counts.min() >= 1
    assert counts[-1] < counts.max()


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_the_budget_bounds_the_samples(scheduler, distribution):
    budget = 35 * 16 * 4
    data = collect_trajectories(
        half, scheduler, SHAPE, images=20, distribution=distribution, byte_budget=budget
    )
    assert data.samples.numel() * 4 <= budget + 10 * 16 * 4
    assert len(data.timesteps.unique()) == 10


@pytest.mark.parametrize("affordable", [10, 35, 101])
def test_rounding_up_stays_within_the_budget(affordable):
    counts = samples_per_step(10, 256, "normal", 16 * 4, affordable * 16 * 4)
    assert min(counts) >= 1
    assert sum(counts) <= affordable


def test_a_budget_below_one_sample_per_timestep_is_refused(scheduler):
    with pytest.raises(CalibrationError, match=r"100 bytes holds 1 samples, fewer than the 10"):
        collect_trajectories(half, scheduler, SHAPE, byte_budget=100)


def test_progress_reaches_the_end_and_seeds_repeat(scheduler):
    calls = []
    first = collect_trajectories(
        half, scheduler, SHAPE, images=5, batch_size=2, progress=lambda *now: calls.append(now)
    )
    second = collect_trajectories(half, scheduler, SHAPE, images=5, batch_size=2)
    assert calls[-1] == (30, 30)
    assert torch.equal(first.samples, second.samples)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_conditions_stay_with_their_images(scheduler, distribution):
    def shifted(samples, timestep, label):
        return 0.5 * samples + label.view(-1, 1, 1, 1)

    def trajectories(label):
        return collect_trajectories(
            shifted, scheduler, SHAPE, 5, distribution, batch_size=2, conditions={"label": label}
        )

    labels = torch.arange(5.0)
    data = trajectories(labels)
    other = trajectories(labels + 100 * (labels == 3))
    follows = ((data.samples - other.samples).flatten(1).abs().amax(1) > 1e-3).nonzero().flatten()
    assert len(follows)
    assert data.conditions["label"][follows].eq(3).all()
    assert len(data.conditions["label"]) == len(data)
    (samples, timesteps, conditions) = list(data.batches(4))[1]
    assert torch.equal(conditions["label"], data.conditions["label"][4:8])
    assert len(samples) == len(timesteps) == 4
    with pytest.raises(ConfigError, match="'label' has 4 rows for 5 images"):
        trajectories(torch.arange(4.0))


def test_choices_that_there_are_not(scheduler):
    with pytest.raises(ConfigError, match="distribution = 'Normal' is not one of uniform, normal"):
        collect_trajectories(half, scheduler, SHAPE, distribution="Normal")
    with pytest.raises(ConfigError, match="granularity = 'blocks' is not one of block, network"):
        ReconstructionConfig(granularity="blocks")


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_samplers_that_scale_their_input_and_remember_steps(kind):
    scheduler = kind()
    scheduler.set_timesteps(5)
    data = collect_trajectories(half, scheduler, SHAPE, images=3, batch_size=2)
    sampled = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    sampled = sampled * scheduler.init_noise_sigma
    rows = data.samples.reshape(len(scheduler.timesteps), 3, *SHAPE)
    seen = []
    for timestep in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(sampled, timestep))
        sampled = scheduler.step(half(seen[-1], timestep), timestep, sampled).prev_sample
    for row, first_batch in zip(rows, seen, strict=True):
        order = torch.cdist(first_batch.flatten(1), row.flatten(1)).argmin(1)
        torch.testing.assert_close(row[order], first_batch)
