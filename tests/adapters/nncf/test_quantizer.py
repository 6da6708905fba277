"""Laws 1 and 4, and the gradients: NNCF's values, and the core's estimate of their slope."""

import copy

import pytest
import torch
from contract.networks import BATCHES, STEPS, example_inputs
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import (
    AsymmetricQuantizer,
    BaseQuantizer,
    PTQuantizerSpec,
    SymmetricQuantizer,
)

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import TDQQuantizer, prepare
from tdq_plugin.errors import AdapterError
from tdq_plugin.fake_quantize import fake_quantize, quantize
from tdq_plugin.grid import QuantizationGrid

SAMPLE = BATCHES[2][0][:4]
GRIDS = {
    "asymmetric": QuantizationGrid(0, 255),
    "unsigned": QuantizationGrid(0, 255, symmetric=True),
    "signed": QuantizationGrid(-128, 127, symmetric=True),
    "4 bits": QuantizationGrid(0, 15),
    "signed 4 bits": QuantizationGrid(-8, 7, symmetric=True),
}


def hooks(model, kind):
    storage = get_hook_storage(model)
    return {name: hook for name, hook in storage.named_hooks() if isinstance(hook, kind)}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_attached_model_is_nncf_s_own_bit_for_bit(quantized, symmetric, bits):
    static = quantized(symmetric_activations=symmetric)
    # What is no operand of a layer or a product, prepare takes away.
    get_hook_storage(static).delete_hook("post_hooks.conv_out/conv2d/0__0.0")
    for hook in hooks(static, BaseQuantizer).values():
        if hook.scale_shape == (1,):
            hook.num_bits = bits
    model = quantized(symmetric_activations=symmetric)
    tdq.attach(prepare(model, example_inputs(), bits, first_last_bits=None), tdq.ConstantBank)
    assert len(hooks(model, TDQQuantizer)) == 6
    assert hooks(model, TDQQuantizer).keys() | hooks(model, BaseQuantizer) == {
        *hooks(static, BaseQuantizer)
    }
    with torch.no_grad():
        for sample, timesteps in BATCHES:
            assert torch.equal(model(sample, timesteps), static(sample, timesteps))


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_constant_scale_is_nncf_s_quantizer_rescaled(quantized, symmetric):
    natives = hooks(quantized(symmetric_activations=symmetric), BaseQuantizer)
    model = quantized(symmetric_activations=symmetric)
    tdq.attach(prepare(model, example_inputs()))
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for name, quantizer in hooks(model, TDQQuantizer).items():
        native, zero_point = natives[name], quantizer.static_zero_point[None]
        assert isinstance(native, SymmetricQuantizer) == quantizer.grid.symmetric
        for ratio in (0.3, 1.7):
            scale = (quantizer.static_scale * ratio)[None]
            g = scale / quantizer.static_scale
            with torch.no_grad():
                ours = quantizer.forward(x, scale, zero_point)
                assert torch.equal(ours, native(x / g) * g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_the_static_ranges(quantized, dtype):
    model = tdq.attach(prepare(quantized(), example_inputs()))
    before = [(q.static_scale, q.static_zero_point) for _, q in tdq.named_quantizers(model)]
    model.to(dtype)
    assert [(q.static_scale, q.static_zero_point) for _, q in tdq.named_quantizers(model)] == before


@pytest.mark.parametrize(("low", "high"), [(-0.278, 9.87), (-9.87, 0.278), (-0.278, 0.278)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_is_a_code(low, high, bits):
    """NNCF leaves zero between two codes where a range has less than half a step on one side."""
    options = dict.fromkeys(("narrow_range", "half_range", "logarithm_scale"), False)
    options |= {"mode": "asymmetric", "signedness_to_force": None, "scale_shape": (1,)}
    native = AsymmetricQuantizer(PTQuantizerSpec(num_bits=bits, **options))
    native.input_low.data.fill_(low)
    native.input_range.data.fill_(high - low)
    quantizer = TDQQuantizer.from_native(native, "layer.input", 0)
    scale, zero_point = quantizer.static_scale[None], quantizer.static_zero_point[None]
    assert quantizer.static_low / scale == pytest.approx(-zero_point, abs=1e-4)
    x = torch.linspace(1.2 * low, 1.2 * high, 1001)
    with torch.no_grad():
        ours = quantizer.forward(x, scale, zero_point)
    theirs = fake_quantize(x, scale, zero_point, 0, 2**bits - 1)
    assert quantizer.forward(torch.zeros(1), scale, zero_point) == 0
    assert ((ours - theirs).abs() > 0.5 * scale).sum() <= 2


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_are_those_of_the_other_adapters(grid):
    """At most one code, on at most 1e-5 of the values."""
    generator = torch.Generator().manual_seed(0)
    quantizer, different, count = TDQQuantizer(grid, "layer.input", 0), 0, 500_000
    levels = grid.quant_max - grid.quant_min
    quantizer.static_range.fill_(0.0123 * levels)
    scales = torch.logspace(-3, 1, 8)
    for scale in scales.split(1):
        zero_point = torch.zeros(1) if grid.symmetric else torch.tensor([levels // 3.0])
        x = torch.randn(count, generator=generator) * scale * levels / 6
        expected = quantize(x, scale, zero_point, grid.quant_min, grid.quant_max)
        with torch.no_grad():
            codes = quantizer.forward(x, scale, zero_point) / scale + zero_point
        assert (codes - codes.round()).abs().max() < 1e-4
        distance = (codes.round() - expected).abs()
        assert distance.max() <= 1
        different += int(distance.sum())
    assert different <= 1e-5 * count * len(scales)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gradients_are_the_core_s(grid):
    generator = torch.Generator().manual_seed(0)
    scale, zero_point = torch.tensor([0.1, 0.3]), torch.tensor([2.0, 5.0]) * (not grid.symmetric)
    x = torch.randn(2, 3, 50, generator=generator) * (grid.quant_max - grid.quant_min) / 30
    weight = torch.randn(x.shape, generator=generator)

    def gradients(function):
        inputs = [value.clone().requires_grad_() for value in (x, scale, zero_point)]
        (function(*inputs) * weight).sum().backward()
        return [value.grad for value in inputs]

    def core(*values):
        return fake_quantize(*values, grid.quant_min, grid.quant_max)

    for ours, theirs in zip(gradients(TDQQuantizer(grid, "", 0)), gradients(core), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.abs().sum() > 0 or grid.symmetric


def test_gradients_leave_the_value_as_it_is(make):
    model = make(4, 4)
    timesteps = torch.tensor(STEPS[:4])
    with torch.no_grad():
        expected = model(SAMPLE, timesteps)
    assert torch.equal(model(SAMPLE, timesteps), expected)


def test_half_precision(make):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    _, quantizer = next(tdq.named_quantizers(make()))
    scale, zero_point = quantizer.static_scale[None], quantizer.static_zero_point[None]
    half = x.bfloat16()
    with torch.no_grad():
        ours = quantizer.forward(half, scale, zero_point)
        wide = quantizer.forward(half.float(), scale, zero_point)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, wide.bfloat16())


def test_unsigned_dynamic_range_is_finite():
    quantizer = TDQQuantizer(GRIDS["unsigned"], "layer.input", 0)
    quantizer.mode = "dynamic"
    x = torch.rand(2, 10)
    assert (quantizer.forward(x) - x).abs().max() < 1 / 255


def test_a_copy_is_independent(make):
    model = make()
    twin = copy.deepcopy(model)
    before = model(SAMPLE, 250)
    with torch.no_grad():
        for hook in hooks(twin, TDQQuantizer).values():
            hook.static_range.mul_(2)
            hook.static_low.mul_(2)
        tdq.scale_bank(twin).base_scale.mul_(2)
    assert torch.equal(model(SAMPLE, 250), before)
    assert not torch.equal(twin(SAMPLE, 250), before)


def test_tracing_what_is_not_stripped(make):
    model = tdq.freeze(make(), STEPS)
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.adapters\.nncf\.strip"):
        torch.export.export(model, (SAMPLE, torch.tensor([100])))
