"""The three trainable banks: how they start, what they fit, and what they keep in float32."""

import copy
import io

import pytest
import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError, ConfigError, ScaleError, TimestepError
from tdq_plugin.grid import activation_grid
from tdq_plugin.scales import (
    DEFAULT,
    PAPER,
    ConstantBank,
    GeneratorBank,
    GeneratorConfig,
    LearnedTableBank,
    TrainableBank,
)
from tdq_plugin.scales.bank import inverse_softplus

GRIDS = {
    "conv": activation_grid(8),
    "linear": activation_grid(4),
    "product.0": activation_grid(4, symmetric=True),
}
STATIC = torch.tensor([0.05, 1.5, 3e-4])
ZERO_POINTS = torch.tensor([128.0, 3.0, 0.0])
TIMESTEPS = torch.arange(1000.0)
BANKS = {
    "generator": GeneratorBank,
    "softplus": lambda grids, **o: GeneratorBank(grids, GeneratorConfig(output="softplus"), **o),
    "table": LearnedTableBank,
    "groups": lambda grids, **options: LearnedTableBank(grids, groups=20, **options),
    "constant": ConstantBank,
}


def make(kind: str, **options) -> TrainableBank:
    bank = BANKS[kind](GRIDS, **options)
    bank.set_static(STATIC, ZERO_POINTS)
    return bank


def smooth_curve() -> Tensor:
    """Scales `(3, 1000)` that grow or shrink by up to a factor of 4 over t."""
    growth = torch.stack([TIMESTEPS / 1000, 1 - TIMESTEPS / 1000, (TIMESTEPS / 250).sin()])
    return STATIC[:, None] * growth.exp()


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("timestep_zero_point", [False, True])
def test_starts_at_the_static_scale_for_every_timestep(
    kind: str, timestep_zero_point: bool
) -> None:
    scales, zero_points = make(kind, timestep_zero_point=timestep_zero_point)(TIMESTEPS)
    assert scales.shape == zero_points.shape == (3, 1000)
    assert torch.equal(scales, scales[:, :1].expand_as(scales))
    assert torch.equal(zero_points, ZERO_POINTS[:, None].expand_as(zero_points))
    if kind == "softplus":
        torch.testing.assert_close(scales[:, 0], STATIC, rtol=1e-6, atol=0)
    else:
        assert torch.equal(scales[:, 0], STATIC)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("generator", 0.02), ("softplus", 0.1), ("table", 1e-6)]
)
def test_warm_start_follows_the_observed_scales(kind: str, tolerance: float) -> None:
    bank = make(kind)
    seen = torch.arange(10, 1000, 20) if kind != "table" else TIMESTEPS.long()
    bank.warm_start(seen.float(), smooth_curve()[:, seen], ZERO_POINTS[:, None].expand(3, 1000))
    scales, _ = bank(TIMESTEPS[10:990])
    error = (scales / smooth_curve()[:, 10:990]).log().abs()
    assert error.mean() < tolerance
    assert all(parameter.grad is None for parameter in bank.parameters())


def test_warm_start_of_groups_is_a_staircase() -> None:
    bank = make("groups")
    bank.warm_start(TIMESTEPS, smooth_curve(), ZERO_POINTS[:, None].expand(3, 1000))
    scales, _ = bank(TIMESTEPS)
    assert torch.equal(scales, scales[:, ::50].repeat_interleave(50, dim=1))
    assert (scales / smooth_curve()).log().abs().max() < 0.15


def test_warm_start_of_a_constant_is_the_static_scale() -> None:
    bank = make("constant")
    with torch.no_grad():
        bank.curve.fill_(0.3)
    bank.warm_start(TIMESTEPS, smooth_curve(), ZERO_POINTS[:, None].expand(3, 1000))
    assert torch.equal(bank(7)[0], bank.base_scale)


@pytest.mark.parametrize(("outside", "wanted"), [(-2.0, 40.0), (300.0, 200.0)])
def test_a_zero_point_outside_of_its_codes_comes_back(outside: float, wanted: float) -> None:
    bank = make("constant")
    with torch.no_grad():
        bank.zero_point[0] = outside
    optimizer = torch.optim.Adam([bank.zero_point], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        (bank(0)[1][0] - wanted).square().sum().backward()
        optimizer.step()
    assert abs(bank.zero_point[0].item() - wanted) < 1


def test_a_zero_point_at_its_limit_is_not_pushed_further() -> None:
    bank = make("constant")
    with torch.no_grad():
        bank.zero_point[0] = 0.0
    bank(0)[1][0].sum().backward()
    assert bank.zero_point.grad is not None
    assert not bank.zero_point.grad.any()


def test_a_printed_bank_tells_what_it_is() -> None:
    assert "3 quantizers, output='exponential'" in repr(make("generator"))
    assert "depth=4" in repr(make("generator"))
    assert "20 groups of 1000 timesteps" in repr(make("groups"))


def test_a_compiled_bank_without_scales_raises() -> None:
    bank = torch.compile(ConstantBank(GRIDS), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="Some quantizers have no scale yet"):
        bank(torch.tensor([7.0]))


def test_warm_start_of_a_zero_point_that_moves() -> None:
    bank = make("table", timestep_zero_point=True)
    moving = torch.stack([TIMESTEPS / 10 + 100, (TIMESTEPS / 100), torch.zeros(1000)]).round()
    bank.warm_start(TIMESTEPS, smooth_curve(), moving)
    assert torch.equal(bank(TIMESTEPS)[1], moving)


def test_the_paper_preset_spreads_over_timesteps_from_the_start() -> None:
    bank = GeneratorBank(GRIDS, PAPER)
    bank.set_static(STATIC, ZERO_POINTS)
    scales, _ = bank(TIMESTEPS)
    assert bank.frequencies[0] == 1.0
    assert len(bank.frequencies) == 32
    assert bool((scales.amax(dim=1) / scales.amin(dim=1) > 1.01).all())
    assert DEFAULT.initialisation == "zero_output"


@pytest.mark.parametrize("kind", BANKS)
def test_scales_stay_positive_and_codes_stay_on_the_grid(kind: str) -> None:
    bank = make(kind, timestep_zero_point=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 3)
        bank.zero_point.copy_(torch.tensor([[900.0], [-7.3], [5.0]]))
    scales, zero_points = bank(TIMESTEPS)
    assert bool((scales > 0).all())
    assert torch.equal(zero_points, zero_points.round())
    assert zero_points[0].max() <= 255
    assert zero_points[1].min() >= 0
    assert not zero_points[2].any()


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("timestep_zero_point", [False, True])
def test_every_parameter_gets_a_gradient(kind: str, timestep_zero_point: bool) -> None:
    bank = make(kind, timestep_zero_point=timestep_zero_point)
    if kind in ("generator", "softplus"):
        # The last layer starts at zero, so the first step moves only that layer.
        torch.nn.init.normal_(bank.weights[-1], generator=torch.Generator().manual_seed(0))
    scales, zero_points = bank(TIMESTEPS)
    (scales.sum() + zero_points.sum()).backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_training_moves_only_the_rows_it_sees() -> None:
    bank = make("table")
    scales, _ = bank(torch.tensor([3.0, 5.0]))
    scales.sum().backward()
    touched = bank.table.grad.abs().sum(dim=(0, 2)).nonzero().flatten()
    assert touched.tolist() == [3, 5]


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_a_model_leaves_its_bank_in_float32(kind: str, dtype: torch.dtype) -> None:
    model = torch.nn.ModuleDict({"scale_bank": make(kind), "layer": torch.nn.Linear(2, 2)})
    expected = model["scale_bank"](TIMESTEPS)
    model.to(dtype)
    assert model["layer"].weight.dtype == dtype
    for tensor in model["scale_bank"].state_dict().values():
        assert tensor.dtype == torch.float32
    for value, before in zip(model["scale_bank"](TIMESTEPS), expected, strict=True):
        assert torch.equal(value, before)


def test_loading_a_bank_without_scales_into_one_that_ran() -> None:
    bank, empty = make("constant"), ConstantBank(GRIDS).state_dict()
    bank(5)
    bank.load_state_dict(empty)
    with pytest.raises(CalibrationError, match="3 of 3 quantizers have no scale yet"):
        bank(5)


@pytest.mark.parametrize("option", ["encoding", "initialisation"])
def test_a_choice_of_the_generator_that_there_is_not(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = 'other' is not one of "):
        GeneratorConfig(**{option: "other"})


def test_an_output_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="output = 'exp' is not one of exponential, softplus"):
        ConstantBank(GRIDS, output="exp")


def test_a_bank_moves_to_another_device() -> None:
    bank = make("generator").to("meta")
    assert {tensor.device.type for tensor in bank.state_dict().values()} == {"meta"}
    assert bank.device.type == "meta"


@pytest.mark.parametrize("kind", BANKS)
def test_a_copy_is_independent(kind: str) -> None:
    bank = make(kind)
    duplicate = copy.deepcopy(bank)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
    assert torch.equal(bank(7)[0], make(kind)(7)[0])
    assert not torch.equal(duplicate(7)[0], bank(7)[0])


@pytest.mark.parametrize("kind", BANKS)
def test_state_dict_round_trip(kind: str) -> None:
    bank = make(kind)
    bank.warm_start(TIMESTEPS[::50], smooth_curve()[:, ::50], ZERO_POINTS[:, None].expand(3, 20))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    loaded = BANKS[kind](GRIDS, **({"seed": 9} if kind in ("generator", "softplus") else {}))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for value, expected in zip(loaded(TIMESTEPS), bank(TIMESTEPS), strict=True):
        assert torch.equal(value, expected)


def test_seed_decides_the_start() -> None:
    same = [GeneratorBank(GRIDS, PAPER, seed=seed).weights[0] for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


@pytest.mark.parametrize("kind", BANKS)
def test_mixed_timesteps_equal_one_by_one(kind: str) -> None:
    bank = make(kind)
    bank.warm_start(TIMESTEPS[::50], smooth_curve()[:, ::50], ZERO_POINTS[:, None].expand(3, 20))
    timesteps = torch.tensor([1.0, 500.0, 999.0, 1.0])
    together = bank(timesteps)[0]
    alone = torch.cat([bank(t)[0] for t in timesteps], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", BANKS)
def test_fractional_timesteps_are_evaluated(kind: str) -> None:
    assert torch.isfinite(make(kind)(torch.tensor([0.0, 2.5, 999.0]))[0]).all()


@pytest.mark.parametrize("kind", BANKS)
def test_a_bank_without_scales_says_so(kind: str) -> None:
    with pytest.raises(CalibrationError, match=r"3 of 3 quantizers .* 'conv'. Run tdq_plugin.cal"):
        BANKS[kind](GRIDS)(5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_that_is_not_positive(wrong: float) -> None:
    with pytest.raises(ScaleError, match=f"static scale of 'linear' is {wrong}; it must be pos"):
        ConstantBank(GRIDS).set_static(torch.tensor([1.0, wrong, 1.0]), ZERO_POINTS)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_learned_table(timestep: int) -> None:
    with pytest.raises(TimestepError, match=rf"{timestep} .* not within 0 .. 1000. Build the bank"):
        make("table")(timestep)


@pytest.mark.parametrize("timestep", [-1, 1001])
def test_a_timestep_beyond_the_generators(timestep: int) -> None:
    message = rf"{timestep} .. {timestep} are not within 0 .. 1000, where.*larger num_timesteps"
    with pytest.raises(TimestepError, match=message):
        make("generator")(timestep)
    with pytest.raises(TimestepError, match=message):
        make("generator").fit(torch.tensor([float(timestep)]), torch.zeros(3, 1, 1))


def test_the_paper_s_encoding_has_no_end() -> None:
    bank = GeneratorBank(GRIDS, PAPER)
    bank.set_static(STATIC, ZERO_POINTS)
    assert bool(bank(4000)[0].isfinite().all())


@pytest.mark.parametrize("groups", [0, 1001])
def test_number_of_groups(groups: int) -> None:
    with pytest.raises(ConfigError, match=rf"groups = {groups} is not in 1 .. 1000"):
        LearnedTableBank(GRIDS, groups=groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding_size": 5}, "encoding_size = 5 is not even and positive"),
        ({"encoding_size": 0}, "encoding_size = 0 is not even and positive"),
        ({"depth": 0}, "depth = 0 and width = 64 must be positive"),
        ({"width": 0}, "depth = 4 and width = 0 must be positive"),
    ],
)
def test_generator_configuration(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig(**options)


@pytest.mark.parametrize("value", [1e-10, 1e-3, 1.0, 30.0, 1e4])
def test_inverse_softplus(value: float) -> None:
    found = torch.nn.functional.softplus(inverse_softplus(torch.tensor(value)))
    assert found.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 7, 36, 72, 105, 1000])
def test_groups_change_exactly_where_they_should(groups: int) -> None:
    bank = LearnedTableBank({"conv": GRIDS["conv"]}, groups=groups)
    bank.set_static(STATIC[:1], ZERO_POINTS[:1])
    with torch.no_grad():
        bank.table.copy_(torch.arange(groups).reshape(1, -1, 1))
    expected = [t * groups // 1000 for t in range(1000)]
    assert bank.curves(TIMESTEPS).flatten().tolist() == expected
    assert bank.curves(torch.tensor([999.99994])).item() == groups - 1
