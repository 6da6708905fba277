"""What Brevitas can do and TDQ cannot is refused, with what to do instead."""

import brevitas.nn as qnn
import pytest
import torch
from brevitas.export.manager import BaseManager, _set_proxy_export_handler, _set_proxy_export_mode
from brevitas.quant import (
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
)
from contract.networks import BATCHES, STEPS

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    TDQInt8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
    quantize_layerwise,
    tdq_layer_map,
)
from tdq_plugin.errors import AdapterError, ConfigError, TimestepError

ACTIVATION = TDQInt8ActPerTensorFloat
BOTH = {"input_quant": ACTIVATION, "weight_quant": Int8WeightPerChannelFloat}
SAMPLE = BATCHES[2][0][:4]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: qnn.QuantLinear(2, 2, False, return_quant_tensor=True, **BOTH),
        lambda: qnn.QuantConv2d(2, 2, 1, output_quant=ACTIVATION, return_quant_tensor=True),
        lambda: qnn.QuantReLU(act_quant=TDQUint8ActPerTensorFloat, return_quant_tensor=True),
    ],
)
def test_quant_tensors(around, layer):
    with pytest.raises(AdapterError, match=r"'layer' has return_quant_tensor=True.*Set return"):
        tdq.attach(around(layer()))


def test_a_bias_with_the_scale_of_the_input(around):
    with pytest.raises(AdapterError, match=r"bias quantizer of 'layer'.*bias_quant=None"):
        tdq.attach(around(qnn.QuantLinear(2, 2, True, bias_quant=Int32Bias, **BOTH)))
    attention = qnn.QuantMultiheadAttention(4, 2, in_proj_input_quant=ACTIVATION)
    with pytest.raises(AdapterError, match=r"bias quantizer of 'layer.in_proj'"):
        tdq.attach(around(attention))


def test_recurrent_layers(around):
    layer = qnn.QuantLSTM(4, 4, io_quant=ACTIVATION, bias_quant=None)
    with pytest.raises(AdapterError, match=r"'layer.*QuantLSTM.*Leave its quantizers to Brevitas"):
        tdq.attach(around(layer))


def test_layers_that_are_not_called(around):
    def quantized(*float_layers):
        encoder = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = around(torch.nn.Sequential(encoder, torch.nn.Linear(4, 4)))
        return quantize_layerwise(model, float_layers=float_layers)

    with pytest.raises(AdapterError, match=r"is a Transformer.*float_layers=\['layer\.0'\]"):
        tdq.attach(quantized("layer.0.self_attn"))
    model = tdq.attach(quantized("layer.0"))
    assert tdq.scale_bank(model).names == ("layer.1.input",)


@pytest.mark.parametrize("layer", [qnn.QuantConvTranspose1d, qnn.QuantConvTranspose2d])
@pytest.mark.parametrize("activation", [ACTIVATION, None])
def test_transposed_convolutions_in_groups(around, layer, activation):
    def model(weight_quant):
        up = layer(4, 4, 2, groups=2, input_quant=activation, weight_quant=weight_quant)
        return around(torch.nn.Sequential(qnn.QuantIdentity(act_quant=ACTIVATION), up))

    message = r"'layer\.1' is a transposed convolution with groups=2.*float_layers=\['layer\.1'\]"
    with pytest.raises(AdapterError, match=message):
        tdq.attach(model(Int8WeightPerChannelFloat))
    tdq.attach(model(Int8WeightPerTensorFloat))
    tdq.attach(model(None))


@pytest.mark.parametrize("bias", [None, Int8BiasPerTensorFloatInternalScaling])
def test_biases_that_are_accepted(around, bias):
    model = tdq.attach(around(qnn.QuantLinear(3, 3, True, bias_quant=bias, **BOTH))).eval()
    sample, timesteps = torch.randn(2, 3), torch.tensor([1, 900])
    tdq.calibrate(model, [(sample, timesteps)])
    single = [model(sample[i : i + 1], timesteps[i]) for i in (0, 1)]
    torch.testing.assert_close(model(sample, timesteps), torch.cat(single))


def test_a_layer_without_bias_whose_bias_would_be_refused(around):
    tdq.attach(around(qnn.QuantLinear(2, 2, False, bias_quant=Int32Bias, **BOTH)))


def test_other_layers_may_do_as_they_like(around):
    first = qnn.QuantLinear(2, 2, True, input_quant=ACTIVATION, return_quant_tensor=False)
    second = qnn.QuantIdentity(return_quant_tensor=True)
    tdq.attach(around(torch.nn.Sequential(first, second)))


def test_a_single_scale(calibrated):
    proxy = calibrated().conv_in.input_quant
    with pytest.raises(AdapterError, match="no single scale"):
        proxy.scale()
    with pytest.raises(AdapterError, match="no single zero point"):
        proxy.zero_point()
    assert proxy.bit_width() == 8
    proxy.disable_quant = True
    assert proxy.bit_width() is None


def test_a_layer_outside_of_a_call(calibrated):
    model = calibrated()
    with pytest.raises(TimestepError, match=r"at_timestep"):
        model.conv_in(SAMPLE)


class ManagerWithoutHandler(BaseManager):
    """As one of Brevitas, for a format that knows no TDQ."""

    handlers = ()


def test_an_export_that_knows_no_tdq(calibrated):
    model = tdq.freeze(calibrated(), STEPS)
    before = model(SAMPLE, STEPS[1])
    with pytest.raises(AdapterError, match="no handler for TDQActQuantProxy"):
        model.apply(lambda module: _set_proxy_export_handler(ManagerWithoutHandler, module))
    _set_proxy_export_mode(model, enabled=False)
    assert torch.equal(model(SAMPLE, STEPS[1]), before)


def test_an_estimator_that_there_is_not():
    quantizer = ACTIVATION.let(tdq_estimator="LSQ")
    with pytest.raises(ConfigError, match="tdq_estimator = 'LSQ' is not one of lsq, pact, nipq, "):
        qnn.QuantLinear(2, 2, True, input_quant=quantizer)


def test_an_option_that_tdq_does_not_have():
    with pytest.raises(ConfigError, match=r"\['tdq_banks'\] are no options of TDQ; there are"):
        tdq_layer_map(tdq_banks="constant")
