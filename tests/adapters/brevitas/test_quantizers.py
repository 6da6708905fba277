"""What the names of a quantizer set, and what they cannot."""

import brevitas.nn as qnn
import pytest
import torch

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    TDQActQuantProxy,
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
    quantize_layerwise,
)
from tdq_plugin.errors import ConfigError
from tdq_plugin.grid import QuantizationGrid


class Two(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = (qnn.QuantIdentity(act_quant=q) for q in (first, second))

    def forward(self, sample, timestep):
        return self.second(self.first(sample))


@pytest.mark.parametrize(
    ("quantizer", "grid"),
    [
        (TDQInt8ActPerTensorFloat, QuantizationGrid(-128, 127, True)),
        (TDQInt8ActPerTensorFloat.let(bit_width=4), QuantizationGrid(-8, 7, True)),
        (TDQInt8ActPerTensorFloat.let(narrow_range=True), QuantizationGrid(-127, 127, True)),
        (TDQInt8ActPerTensorFloat.let(signed=False), QuantizationGrid(0, 255, True)),
        (TDQUint8ActPerTensorFloat, QuantizationGrid(0, 255, True)),
        (TDQUint8ActPerTensorFloat.let(narrow_range=True), QuantizationGrid(0, 254, True)),
        (TDQShiftedUint8ActPerTensorFloat.let(bit_width=3), QuantizationGrid(0, 7)),
    ],
)
def test_codes(around, quantizer, grid):
    model = tdq.attach(around(qnn.QuantIdentity(act_quant=quantizer)))
    assert tdq.scale_bank(model).grids == (grid,)


def test_arguments_of_a_layer_with_the_prefix_of_the_slot(around):
    layer = qnn.QuantLinear(
        4,
        4,
        True,
        input_quant=TDQInt8ActPerTensorFloat,
        input_bit_width=5,
        input_tdq_bank="learned_table",
        input_tdq_groups=7,
    )
    bank = tdq.scale_bank(tdq.attach(around(layer)))
    assert bank.grids == (QuantizationGrid(-16, 15, True),)
    assert bank.groups == 7


@pytest.mark.parametrize(
    ("names", "kind", "sizes"),
    [
        ({}, tdq.GeneratorBank, {}),
        ({"tdq_width": 24}, tdq.GeneratorBank, {"width": 24, "depth": 4}),
        ({"tdq_bank": "generator", "tdq_depth": 2}, tdq.GeneratorBank, {"width": 64, "depth": 2}),
        ({"tdq_num_timesteps": 100}, tdq.GeneratorBank, {"num_timesteps": 100}),
        ({"tdq_bank": "learned_table", "tdq_groups": 8}, tdq.LearnedTableBank, {"groups": 8}),
        ({"tdq_bank": "constant"}, tdq.ConstantBank, {}),
    ],
)
def test_bank_that_the_quantizers_ask_for(names, kind, sizes):
    quantizer = TDQInt8ActPerTensorFloat.let(**names)
    bank = tdq.scale_bank(tdq.attach(Two(quantizer, quantizer.let(bit_width=4))))
    assert type(bank) is kind
    for name, size in sizes.items():
        assert getattr(getattr(bank, "config", bank), name) == size


def test_quantizers_that_ask_for_different_banks():
    model = Two(TDQInt8ActPerTensorFloat.let(tdq_width=8), TDQInt8ActPerTensorFloat)
    with pytest.raises(ConfigError, match=r"'first.act' asks for.*8.*'second.act' asks for none"):
        tdq.attach(model)
    assert type(tdq.scale_bank(tdq.attach(model, tdq.ConstantBank))) is tdq.ConstantBank


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"tdq_bank": "mlp"}, "tdq_bank = 'mlp' is not one of generator, learned_table, constant"),
        ({"tdq_bank": "constant", "tdq_width": 8}, "tdq_width = 8 says nothing .* takes no size"),
        ({"tdq_groups": 8}, "tdq_groups = 8 says nothing to tdq_bank = 'generator'"),
        ({"bit_width": 9}, "9 bits are not supported"),
        ({"bit_width_impl_type": "parameter"}, "BitWidthParameter.*'const'"),
        ({"restrict_scaling_type": "int"}, "IntRestrictValue.*'power_of_two'"),
        ({"float_to_int_impl_type": "floor"}, "FloorSte.*tdq_estimator='brevitas'"),
        (
            {"scaling_per_output_type": "channel", "per_channel_broadcastable_shape": (1, 3, 1)},
            r"not scales of shape \(1, 3, 1\)",
        ),
    ],
)
def test_names_that_a_tdq_activation_cannot_have(names, message):
    with pytest.raises(ConfigError, match=message):
        qnn.QuantIdentity(act_quant=TDQInt8ActPerTensorFloat.let(**names))


def test_other_roundings_by_the_arithmetic_of_brevitas(around):
    quantizer = TDQInt8ActPerTensorFloat.let(
        float_to_int_impl_type="floor", tdq_estimator="brevitas"
    )
    model = tdq.attach(around(qnn.QuantIdentity(act_quant=quantizer)))
    tdq.scale_bank(model).set_static(torch.tensor([0.5]), torch.zeros(1))
    x = torch.tensor([[0.9, -0.1]])
    assert torch.equal(model(x, 3), torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("restriction", ["fp", "log_fp", "power_of_two"])
def test_restricted_scales(around, restriction):
    quantizer = TDQInt8ActPerTensorFloat.let(restrict_scaling_type=restriction)
    model = tdq.attach(around(qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=False)))
    x = torch.randn(64, 9) * torch.tensor([1.0, 7.0]).repeat_interleave(32)[:, None]
    timesteps = torch.tensor([100.0, 700.0]).repeat_interleave(32)
    tdq.calibrate(model, [(x, timesteps)])
    (proxy,) = (m for m in model.modules() if isinstance(m, TDQActQuantProxy))
    learned = tdq.scale_bank(model)(torch.tensor([100.0, 700.0]))[0][0]
    used = proxy.tdq_tensor_quant.restricted(learned)
    if restriction == "power_of_two":
        assert torch.equal(used.log2(), learned.log2().round())
    else:
        assert torch.equal(used, learned)
    x.requires_grad_()
    model.train()(x, timesteps).square().sum().backward()
    assert tdq.scale_bank(model).biases[-1].grad.abs().sum() > 0
    live = model(x, timesteps)
    torch.testing.assert_close(tdq.freeze(model, [100, 700])(x, timesteps), live)


@pytest.mark.parametrize("symmetric", [False, True])
def test_names_of_a_layer_map_reach_all_its_quantizers(symmetric):
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3), torch.nn.Linear(4, 4))
    quantize_layerwise(model, symmetric_activations=symmetric, tdq_estimator="pact")
    proxies = [m for m in model.modules() if isinstance(m, TDQActQuantProxy)]
    assert len(proxies) == 2
    for proxy in proxies:
        assert proxy.tdq_tensor_quant.quantizer.estimator == "pact"
        assert proxy.tdq_tensor_quant.quantizer.grid.symmetric == symmetric


@pytest.mark.parametrize("estimator", ["lsq", "brevitas"])
def test_mixed_timesteps_in_bfloat16(around, estimator):
    quantizer = TDQShiftedUint8ActPerTensorFloat.let(tdq_estimator=estimator)
    model = tdq.attach(around(qnn.QuantConv2d(2, 3, 3, input_quant=quantizer))).eval()
    sample, timesteps = torch.randn(3, 2, 8, 8), torch.tensor([0, 250, 999])
    tdq.calibrate(model, [(sample * (1 + timesteps.reshape(-1, 1, 1, 1) / 500), timesteps)])
    model, sample = model.bfloat16(), sample.bfloat16()
    with torch.no_grad():
        mixed = model(sample, timesteps)
        one_by_one = [model(sample[i : i + 1], timesteps[i]) for i in range(3)]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, torch.cat(one_by_one))
