"""Statistics per timestep: exact where they can be, a uniform sample else, and mergeable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdq_plugin.errors import CalibrationError
from tdq_plugin.observe import TimestepObserver, results


def observer(**options) -> TimestepObserver:
    return TimestepObserver("conv.input", **({"num_timesteps": 100, "bins": 4} | options))


def batch(seed: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 5, generator=generator) * (seed + 1)
    return x, torch.randint(100, (size,), generator=generator).float()


def test_limits_deviation_and_mean_timestep_of_each_bin() -> None:
    seen = observer()
    x, timesteps = batch(0, size=40)
    seen.update(x, timesteps)
    result = seen.result()
    for row, low in enumerate([0, 25, 50, 75]):
        chosen = (timesteps >= low) & (timesteps < low + 25)
        values = x[chosen]
        assert result.limits[row].tolist() == [values.min().item(), values.max().item()]
        assert result.deviation[row] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
        assert result.timesteps[row] == pytest.approx(timesteps[chosen].mean().item())


def test_only_bins_with_data_are_reported() -> None:
    seen = observer()
    seen.update(torch.ones(2, 3), torch.tensor([30.0, 99.0]))
    assert seen.result().timesteps.tolist() == [30.0, 99.0]


def test_few_values_fill_the_sample_by_repetition() -> None:
    seen = observer(samples=8)
    seen.update(torch.tensor([[5.0]]), torch.tensor([10.0]))
    assert seen.result().values.tolist() == [[5.0] * 8]


def test_one_timestep_for_the_batch_and_several_rows_per_timestep() -> None:
    one, spread, heads = observer(), observer(), observer()
    x = torch.arange(12.0).reshape(4, 3)
    one.update(x, torch.tensor([10.0]))
    spread.update(x, torch.full((4,), 10.0))
    heads.update(x, torch.tensor([10.0, 60.0]))
    assert torch.equal(one.result().limits, spread.result().limits)
    assert heads.result().limits.tolist() == [[0.0, 5.0], [6.0, 11.0]]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.data())
def test_merging_equals_seeing_it_all(seeds: list[int], data) -> None:
    split = data.draw(st.integers(1, len(seeds) - 1))
    alone, first, second = observer(), observer(seed=1), observer(seed=2)
    for index, seed in enumerate(seeds):
        alone.update(*batch(seed))
        (first if index < split else second).update(*batch(seed))
    first.merge(second)
    expected, merged = alone.result(), first.result()
    assert torch.equal(merged.limits, expected.limits)
    torch.testing.assert_close(merged.deviation, expected.deviation)
    torch.testing.assert_close(merged.timesteps, expected.timesteps)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_sample_is_uniform_over_all_values(parts: int) -> None:
    """Values 0 .. 9999 come in order: a sample that preferred early or late ones would show."""
    observers = [observer(bins=1, samples=500, seed=seed) for seed in range(parts)]
    for index, chunk in enumerate(torch.arange(10_000.0).split(500)):
        observers[index % parts].update(chunk[None], torch.tensor([0.0]))
    for other in observers[1:]:
        observers[0].merge(other)
    values = observers[0].result().values[0]
    quarters = torch.histc(values, bins=4, min=0, max=10_000)
    # 125 expected; 4 standard deviations of a binomial are 39.
    assert bool(((quarters - 125).abs() < 39).all()), quarters.tolist()
    assert len(values.unique()) > 450


def test_a_merged_sample_weighs_each_side_by_its_number_of_values() -> None:
    few, many = observer(bins=1, samples=400, seed=1), observer(bins=1, samples=400, seed=2)
    few.update(torch.zeros(1, 1000), torch.tensor([0.0]))
    many.update(torch.ones(1, 9000), torch.tensor([0.0]))
    few.merge(many)
    assert few.result().values.mean().item() == pytest.approx(0.9, abs=0.06)


def test_same_seed_same_sample() -> None:
    results = []
    for _ in range(2):
        seen = observer(samples=16, seed=3)
        seen.update(*batch(1))
        results.append(seen.result().values)
    assert torch.equal(*results)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(wrong: float) -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = wrong
    with pytest.raises(CalibrationError, match=r"'conv.input' has NaN or infinite .* \[7.0, 8.0\]"):
        observer().update(x, torch.tensor([7.0, 8.0]))


@pytest.mark.parametrize(
    ("timestep", "remedy"),
    [
        (-1.0, "Timesteps are not negative: .* wrap it in a module whose forward"),
        (100.0, "Set num"),
    ],
)
def test_timesteps_outside_the_process(timestep: float, remedy: str) -> None:
    message = rf"\[{timestep}\] are not within 0 .. 100. {remedy}"
    with pytest.raises(CalibrationError, match=message):
        observer().update(torch.zeros(1, 3), torch.tensor([timestep]))


def test_no_data() -> None:
    with pytest.raises(CalibrationError, match=r"'conv.input' saw no calibration data. Run"):
        observer().result()


def test_layers_that_no_batch_reached() -> None:
    names = ("down.conv.input", "rare.linear.input", "rare.linear.input.1")
    observers = {name: observer() for name in names}
    with pytest.raises(CalibrationError, match=r"'conv.input' saw no calibration data. Run"):
        results(observers)
    observers["down.conv.input"].update(*batch(0))
    message = (
        r"No calibration batch reached 2 of the model's 3 quantizers: \['rare.linear.input', .*"
        r"Calibrate with data for which .* float_layers=\['rare.linear'\] where"
    )
    with pytest.raises(CalibrationError, match=message):
        results(observers)
    for name in names[1:]:
        observers[name].update(*batch(1))
    assert list(results(observers)) == list(names)


def test_only_observers_of_the_same_quantizer_merge() -> None:
    with pytest.raises(CalibrationError, match=r"'conv.input' with 5 bins cannot be merged"):
        observer().merge(observer(bins=5))
    with pytest.raises(CalibrationError, match=r"of 1000 timesteps .* one of 100 timesteps"):
        observer().merge(observer(num_timesteps=1000))


def test_rows_that_are_no_samples_are_refused() -> None:
    seen = observer()
    with pytest.raises(
        CalibrationError, match=r"'conv.input' has the shape \(1, 6, 4\).*5 samples"
    ):
        seen.update(torch.ones(1, 6, 4), torch.arange(5.0))
