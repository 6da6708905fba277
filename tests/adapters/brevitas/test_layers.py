"""In every layer that takes TDQ, a batch of mixed timesteps equals its samples one by one."""

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int8WeightPerChannelFloat
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
)

STEPS = (0, 300, 600, 900)
SIGNED = TDQInt8ActPerTensorFloat.let(bit_width=4)
SHIFTED = TDQShiftedUint8ActPerTensorFloat.let(bit_width=4)
UNSIGNED = TDQUint8ActPerTensorFloat.let(bit_width=4)
WEIGHTS = {"bias_quant": None, "weight_quant": Int8WeightPerChannelFloat}


class SelfAttention(nn.Module):
    """As many tokens as samples, where a wrong dimension would not even raise."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens):
        if not self.attention.batch_first:
            tokens = tokens.transpose(0, 1)
        output, _ = self.attention(tokens, tokens, tokens)
        return output if self.attention.batch_first else output.transpose(0, 1)


class Products(nn.Module):
    def __init__(self, products: nn.Module) -> None:
        super().__init__()
        self.products = products

    def forward(self, tokens):
        heads = tokens.unflatten(2, (2, -1)).transpose(1, 2)
        return self.products(heads, heads.sin(), heads.cos())


def attention(activation, unsigned, **options):
    slots = ("in_proj_input", "q_scaled", "k_transposed", "v", "out_proj_input", "out_proj_output")
    layer = qnn.QuantMultiheadAttention(
        8,
        2,
        in_proj_bias_quant=None,
        out_proj_bias_quant=None,
        attn_output_weights_quant=unsigned,
        **{f"{slot}_quant": activation for slot in slots},
        **options,
    )
    return SelfAttention(layer)


def convolution(layer, dimensions, activation, **options):
    def make():
        return layer(3, 4, (3,) * dimensions, input_quant=activation, **WEIGHTS, **options)

    return make


LAYERS = {
    "Conv1d": (convolution(qnn.QuantConv1d, 1, SIGNED), (3, 8)),
    "Conv2d": (convolution(qnn.QuantConv2d, 2, SHIFTED), (3, 8, 8)),
    "Conv2d, output": (convolution(qnn.QuantConv2d, 2, None, output_quant=SHIFTED), (3, 8, 8)),
    "ConvTranspose2d": (convolution(qnn.QuantConvTranspose2d, 2, SIGNED), (3, 8, 8)),
    "Linear": (lambda: qnn.QuantLinear(8, 4, True, input_quant=SHIFTED, **WEIGHTS), (4, 8)),
    "Linear, input and output": (
        lambda: qnn.QuantLinear(8, 4, True, input_quant=SIGNED, output_quant=SIGNED, **WEIGHTS),
        (8,),
    ),
    "Identity": (lambda: qnn.QuantIdentity(act_quant=SHIFTED), (3, 8, 8)),
    "ReLU": (lambda: qnn.QuantReLU(act_quant=UNSIGNED), (3, 8, 8)),
    "ReLU with input": (lambda: qnn.QuantReLU(act_quant=UNSIGNED, input_quant=SIGNED), (3, 8)),
    "MultiheadAttention": (lambda: attention(SIGNED, UNSIGNED), (4, 8)),
    "MultiheadAttention, batch first": (
        lambda: attention(SHIFTED, UNSIGNED, batch_first=True),
        (4, 8),
    ),
    "MultiheadAttention, split": (
        lambda: attention(SIGNED, UNSIGNED, packed_in_proj=False),
        (4, 8),
    ),
    "ScaledDotProductAttention": (
        lambda: Products(
            qnn.QuantScaledDotProductAttention(
                q_scaled_quant=SIGNED,
                k_transposed_quant=SHIFTED,
                v_quant=SIGNED,
                attn_output_weights_quant=UNSIGNED,
                sdpa_output_quant=SIGNED,
            )
        ),
        (4, 8),
    ),
}


@pytest.fixture(params=LAYERS)
def model_and_sample(request, around):
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    model = tdq.attach(around(make()).eval())
    sizes = torch.linspace(1, 4, len(STEPS)).reshape(-1, *[1] * len(shape))
    sample = torch.randn(len(STEPS), *shape) * sizes
    tdq.calibrate(model, [(sample, torch.tensor(STEPS))])
    return model, sample


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_mixed_timesteps_equal_the_samples_one_by_one(model_and_sample, frozen):
    model, sample = model_and_sample
    if frozen:
        tdq.freeze(model, STEPS)
    with torch.no_grad():
        mixed = model(sample, torch.tensor(STEPS))
        single = torch.cat([model(x[None], step) for x, step in zip(sample, STEPS, strict=True)])
        same = model(sample, STEPS[0])
    torch.testing.assert_close(mixed, single, rtol=1e-5, atol=1e-6)
    # The scales do differ, so that a wrong one would be seen.
    assert (same[1:] - mixed[1:]).abs().max() > 1e-3


def test_every_slot_has_a_row(model_and_sample):
    model, sample = model_and_sample
    model.train()
    model(sample, torch.tensor(STEPS)).square().sum().backward()
    gradients = tdq.scale_bank(model).biases[-1].grad
    assert (gradients.flatten(1).abs().sum(1) > 0).all()


def test_names_of_the_rows(around):
    model = tdq.attach(around(attention(SIGNED, UNSIGNED)))
    assert tdq.scale_bank(model).names == (
        "layer.attention.in_proj.input",
        "layer.attention.out_proj.input",
        "layer.attention.out_proj.output",
        "layer.attention.attn_output_weights_quant.act",
        "layer.attention.q_scaled_quant.act",
        "layer.attention.k_transposed_quant.act",
        "layer.attention.v_quant.act",
    )


def test_frames_and_heads_share_the_scale_of_their_sample(around):
    model = tdq.attach(around(qnn.QuantIdentity(act_quant=SIGNED)).eval())
    sample = torch.randn(2, 3, 5) * torch.tensor([1.0, 9.0])[:, None, None]
    tdq.calibrate(model, [(sample, torch.tensor([100, 700]))])
    with torch.no_grad():
        frames = model(sample.flatten(0, 1), torch.tensor([100, 700]))
        assert torch.equal(frames, model(sample, torch.tensor([100, 700])).flatten(0, 1))
