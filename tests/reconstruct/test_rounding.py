"""Learned rounding of weights (AdaRound) within a reconstruction."""

import copy

import pytest
import torch
from torch.ao.quantization.quantize_fx import prepare_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy import lower_to_int8
from tdq_plugin.errors import AdapterError, ConfigError
from tdq_plugin.grid import weight_grid
from tdq_plugin.reconstruct import ReconstructionConfig, find_blocks, reconstruct
from tdq_plugin.reconstruct.rounded_layers import RoundedLayers
from tdq_plugin.rounding import LearnedRounding, rounding_penalty
from tdq_plugin.weights import WeightQuantizer

EXAMPLE = (torch.randn(2, 1, 8, 8), torch.tensor([3, 400]))
QUICK = {"iterations": 3, "batch_size": 8, "learn_rounding": True}


@pytest.fixture(scope="module")
def templates(calibrated):
    return {bits: calibrated(activation_bits=8, weight_bits=bits) for bits in (2, 3)}


@pytest.fixture
def model(templates, clone):
    return clone(templates[3])


@pytest.fixture
def weight():
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def rounding_of(weight, bits, method="minmax", symmetric=True):
    quantizer = WeightQuantizer(weight_grid(bits, symmetric))
    quantizer.initialise(weight, method)
    return LearnedRounding(quantizer, weight)


def layers(model):
    found = {name: m for name, m in model.named_modules() if hasattr(m, "weight_fake_quant")}
    assert found
    return found


def codes(model):
    return {name: m.weight_fake_quant.codes(m.weight) for name, m in layers(model).items()}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_start_is_the_weight_itself_inside_the_range(weight, bits):
    rounding = rounding_of(weight, bits, "mse")
    scale = rounding.quantizer.scale.detach().reshape(-1, 1, 1, 1)
    grid = rounding.quantizer.grid
    clipped = weight.clamp(grid.quant_min * scale, grid.quant_max * scale)
    torch.testing.assert_close(rounding(weight).detach(), clipped)


def test_deciding_at_the_start_is_rounding_to_nearest(weight):
    rounding = rounding_of(weight, 3)
    rounding.hard = True
    assert torch.equal(rounding(weight), rounding.quantizer(weight))


def test_the_penalty_starts_after_a_fifth_and_vanishes_when_all_is_decided(weight):
    rounding = rounding_of(weight, 3)
    assert rounding_penalty([rounding], 0.19) == 0
    early, late = rounding_penalty([rounding], 0.2), rounding_penalty([rounding], 0.99)
    assert early > late > 0
    rounding.hard = True
    assert rounding_penalty([rounding], 0.99) == 0


def test_the_penalty_moves_each_weight_to_the_side_that_it_is_on(weight):
    rounding = rounding_of(weight, 3)
    rounding_penalty([rounding], 0.9).backward()
    undecided = (rounding.v.abs() > 1e-3) & (rounding.v.grad != 0)
    assert undecided.any()
    assert torch.equal(rounding.v.grad.sign()[undecided], -rounding.v.sign()[undecided])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_quantizer_reproduces_the_rounded_weight_bit_for_bit(weight, bits, dtype, symmetric):
    weight = (weight + 0.4).to(dtype)
    rounding = rounding_of(weight, bits, "mse", symmetric)
    torch.nn.init.normal_(rounding.v, generator=torch.Generator().manual_seed(1))
    rounding.hard = True
    rounded, quantizer = rounding(weight), rounding.quantizer
    expected = (weight.float() / quantizer.scale.reshape(-1, 1, 1, 1)).floor() + (rounding.v >= 0)
    expected += quantizer.zero_point.reshape(-1, 1, 1, 1)
    expected = expected.clamp(quantizer.grid.quant_min, quantizer.grid.quant_max)
    assert rounded.dtype == dtype
    assert torch.equal(quantizer(rounded), rounded)
    assert torch.equal(quantizer.codes(rounded), expected.to(torch.int8))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("granularity", "iterations", "bits"), [("block", 10, 2), ("network", 30, 3)]
)
def test_learned_rounding_beats_the_nearest(
    templates, clone, unet, data, granularity, iterations, bits
):
    with torch.no_grad():
        target = torch.cat([unet(*batch).sample for batch in data.batches(16)])

    def error(learn_rounding):
        model = clone(templates[bits])
        config = ReconstructionConfig(
            granularity, iterations, batch_size=16, learn_rounding=learn_rounding
        )
        reconstruct(model, data, config)
        with torch.no_grad():
            output = torch.cat([model(*batch) for batch in data.batches(16)])
        return float((output - target).square().mean())

    assert error(learn_rounding=True) < 0.9 * error(learn_rounding=False)


def test_a_rounded_model_is_not_rounded_again(model, data, tmp_path):
    config = ReconstructionConfig(iterations=1, batch_size=8, learn_rounding=True)
    reconstruct(model, data, config, checkpoint=tmp_path / "scales.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"reconstructed already.*nothing left to do"):
        reconstruct(model, data, config, checkpoint=tmp_path / "scales.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("granularity", ["block", "network"])
def test_codes_move_by_one_at_most_and_nothing_else_changes(model, data, granularity):
    before, state = codes(model), copy.deepcopy(model.state_dict())
    types = {name: type(layer.weight_fake_quant) for name, layer in layers(model).items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    config = ReconstructionConfig(granularity, iterations=8, batch_size=8, learn_rounding=True)
    reconstruct(model, data, config)
    after = codes(model)
    moved = torch.cat([(after[k].int() - before[k].int()).abs().flatten() for k in before])
    assert moved.max() == 1
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight), name
    assert {name: type(m.weight_fake_quant) for name, m in layers(model).items()} == types
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert model.state_dict().keys() == state.keys()
    rounded = {f"{name}.weight" for name in before}
    for key, value in model.state_dict().items():
        if key not in rounded and "scale_bank" not in key:
            assert torch.equal(value, state[key]), key


def test_only_the_layers_of_the_block_are_learned(model):
    block = next(b for b in find_blocks(model.graph) if b.name == "down_blocks.0.resnets.0")
    with RoundedLayers(model) as rounded:
        rounded.learn(block)
        learned = set(rounded.state_dict())
    assert learned
    assert learned < set(layers(model))
    assert all(name.startswith("down_blocks.0.resnets.0.") for name in learned)


@pytest.mark.whole
def test_an_interrupted_run_goes_on_to_the_same_result(model, clone, data, tmp_path):
    config = ReconstructionConfig("block", **QUICK)
    twin = clone(model)
    reconstruct(model, data, config)

    def interrupt(progress):
        if progress.step == 20:
            raise KeyboardInterrupt

    start = copy.deepcopy(twin.state_dict())
    checkpoint = tmp_path / "scales.safetensors"
    with pytest.raises(KeyboardInterrupt):
        reconstruct(twin, data, config, checkpoint=checkpoint, progress=interrupt)
    for key, value in twin.state_dict().items():
        assert "scale_bank" in key or torch.equal(value, start[key]), key
    twin.load_state_dict(start)
    steps = []
    reconstruct(twin, data, config, checkpoint=checkpoint, progress=steps.append)
    assert steps[0].step > 3
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def test_the_integer_model_runs_on_the_learned_codes(model, data):
    reconstruct(model, data, ReconstructionConfig(**QUICK))
    tdq.freeze(model, data.timesteps.unique().tolist())
    lowered = lower_to_int8(model)
    learned = codes(model)
    stored = {n: m.codes for n, m in lowered.named_modules() if hasattr(m, "codes")}
    assert stored
    for name, value in stored.items():
        assert torch.equal(value, learned[name]), name


def test_a_model_without_weight_quantizers_is_refused(unet, data):
    graph = tdq.trace(copy.deepcopy(unet), EXAMPLE)
    mapping = tdq_qconfig_mapping(graph, activation_bits=8, weight_bits=3)
    prepared = prepare_fx(graph, mapping, EXAMPLE, backend_config=tdq_backend_config())
    tdq.attach(prepared)
    tdq.calibrate(prepared, data.batches(8))
    with pytest.raises(AdapterError, match=r"GraphModule has none.*prepare_qat_fx"):
        reconstruct(prepared, data, ReconstructionConfig(**QUICK))


@pytest.mark.parametrize("field", ["rounding_learning_rate", "rounding_regularisation"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        ReconstructionConfig(**{field: 0})
