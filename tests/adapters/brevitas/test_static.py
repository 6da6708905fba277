"""Law 1 against Brevitas' own quantizers, and the gradients of both."""

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import (
    Int8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
)

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
)
from tdq_plugin.fake_quantize import fake_quantize

PAIRS = {
    "signed": (TDQInt8ActPerTensorFloat, Int8ActPerTensorFloat, 0),
    "unsigned": (TDQUint8ActPerTensorFloat, Uint8ActPerTensorFloat, 0),
    "shifted": (TDQShiftedUint8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat, 37),
}
SCALE = 0.0371


@pytest.fixture
def constant(around):
    """`constant(quantizer, scale, zero_point)`: an identity with one scale for all timesteps."""

    def build(quantizer, scale=SCALE, zero_point=0):
        model = tdq.attach(around(qnn.QuantIdentity(act_quant=quantizer)), tdq.ConstantBank)
        tdq.scale_bank(model).set_static(torch.tensor([scale]), torch.tensor([float(zero_point)]))
        return model.eval()

    return build


def with_ties(scale):
    """Values at, beside and far from the ties between two codes."""
    ties = (torch.arange(-260, 260) + 0.5) * scale
    beside = [torch.nextafter(ties, ties + side) for side in (-1, 1)]
    generator = torch.Generator().manual_seed(0)
    return torch.cat([ties, *beside, torch.randn(100_000, generator=generator) * 60 * scale])[None]


def stock(quantizer, scale, zero_point, bits):
    """What Brevitas' quantizer computes from a given scale and zero point."""
    arithmetic = quantizer.let(bit_width=bits).int_quant
    values = torch.tensor(scale), torch.tensor(float(zero_point)), torch.tensor(float(bits))
    return lambda x: arithmetic(*values, x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pair", PAIRS)
def test_brevitas_arithmetic_is_brevitas_bit_for_bit(constant, pair, bits):
    ours, theirs, zero_point = PAIRS[pair]
    zero_point = min(zero_point, 2**bits - 1)
    model = constant(ours.let(bit_width=bits, tdq_estimator="brevitas"), SCALE, zero_point)
    x = with_ties(SCALE)
    expected = stock(theirs, SCALE, zero_point, bits)(x)
    assert torch.equal(model(x, 5), expected)
    assert len(expected.unique()) == 2**bits


@pytest.mark.parametrize("pair", PAIRS)
def test_own_arithmetic_differs_at_ties_only(constant, pair):
    ours, theirs, zero_point = PAIRS[pair]
    expected = stock(theirs, SCALE, zero_point, 8)(with_ties(SCALE))
    steps = (constant(ours, SCALE, zero_point)(with_ties(SCALE), 5) - expected) / SCALE
    assert steps.abs().max() <= 1.001
    assert (steps[0, 3 * 520 :] != 0).float().mean() <= 1e-5


@pytest.mark.parametrize("pair", ["signed", "unsigned"])
def test_own_arithmetic_is_brevitas_where_the_division_is_exact(constant, pair):
    """Brevitas adds a zero point before it rounds: with an odd one, ties go the other way."""
    ours, theirs, _ = PAIRS[pair]
    x = with_ties(2.0**-5)
    assert torch.equal(constant(ours, 2.0**-5)(x, 5), stock(theirs, 2.0**-5, 0, 8)(x))


def test_the_whole_static_quantizer(constant):
    static = Int8ActPerTensorFloat.let(scaling_impl_type="const", scaling_init=128 * SCALE)
    model = constant(TDQInt8ActPerTensorFloat.let(tdq_estimator="brevitas"))
    x = with_ties(SCALE)
    assert torch.equal(model(x, 700), qnn.QuantIdentity(act_quant=static).eval()(x))


def gradients(function, x):
    x, scale = x.clone().requires_grad_(), torch.tensor([SCALE], requires_grad=True)
    function(x, scale).square().sum().backward()
    return x.grad, scale.grad


@pytest.mark.parametrize("estimator", ["lsq", "pact", "brevitas"])
def test_gradients(constant, estimator):
    model = constant(TDQInt8ActPerTensorFloat.let(bit_width=4, tdq_estimator=estimator))
    (_, quantizer), *_ = tdq.named_quantizers(model)
    # In the half step beyond the last code, LSQ clips and Brevitas rounds back.
    x, zero = torch.linspace(-9, 9, 2001)[None] * SCALE, torch.zeros(1)
    arithmetic, bits = Int8ActPerTensorFloat.let(bit_width=4).int_quant, torch.tensor(4.0)
    formulas = {
        "lsq": lambda x, s: fake_quantize(x, s, zero, -8, 7),
        "pact": lambda x, s: fake_quantize(x, s, zero, -8, 7, "pact"),
        "brevitas": lambda x, s: arithmetic(s.reshape(()), zero.reshape(()), bits, x),
    }
    ours = gradients(lambda x, s: quantizer.forward(x, s, zero), x)
    for name, formula in formulas.items():
        same = [torch.equal(a, b) for a, b in zip(ours, gradients(formula, x), strict=True)]
        assert all(same) == (name == estimator)
