"""Which operators get quantizers, by this package's quantizer and by torchao's own."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QuantizationConfig,
    X86InductorQuantizer,
)

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import (
    TDQFakeQuantize,
    TDQQuantizer,
    TDQWeightFakeQuantize,
    export,
    tdq_activation_spec,
    tdq_weight_spec,
)
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.errors import AdapterError, ConfigError
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.reconstruct.blocks import find_blocks


def grids(model):
    bank = tdq.scale_bank(model)
    return dict(zip(bank.names, bank.grids, strict=True))


def attached(exported, prepare=prepare_qat_pt2e, **options):
    return tdq.attach(prepare(copy.deepcopy(exported), TDQQuantizer(4, 8, **options))).eval()


def x86_quantizer():
    quantizer = X86InductorQuantizer()
    configuration = QuantizationConfig(
        tdq_activation_spec(8), None, tdq_weight_spec(8), None, is_qat=True
    )
    quantizer.set_global(configuration)
    return quantizer


def quantized_weights(model):
    """Names of the parameters that are fake-quantized."""
    return {
        node.args[0].target
        for node in model.graph.find_nodes(op="call_module")
        if isinstance(model.get_submodule(node.target), TDQWeightFakeQuantize)
    }


@pytest.mark.parametrize("prepare", [prepare_qat_pt2e, prepare_pt2e])
def test_names_and_values_are_those_of_fx(unet, unet_inputs, exported_unet, prepare):
    graph = tdq.trace(copy.deepcopy(unet), unet_inputs)
    mapping, backend = tdq_qconfig_mapping(graph, 4, 8), tdq_backend_config()
    fx = prepare_qat_fx(graph.train(), mapping, unet_inputs, backend_config=backend)
    fx, model = tdq.attach(fx).eval(), attached(exported_unet, prepare)
    assert grids(model) == grids(fx)
    x, _ = unet_inputs
    tdq.calibrate(fx, [(x, step) for step in (0, 500)])
    tdq.load_scales(model, tdq.freeze(fx, [0, 500]).scale_bank.table)
    with torch.no_grad():
        for step in (0, 500):
            assert torch.equal(model(x, step), fx(x, step))


def test_float_layers_and_outer_bits(exported_unet):
    known = grids(attached(exported_unet, first_last_bits=None))
    assert {grid.bits for grid in known.values()} == {4}
    left = grids(attached(exported_unet, float_layers=("conv_in", "*.to_q")))
    assert set(known) - set(left) == {"conv_in.input", *(n for n in known if ".to_q." in n)}
    assert {name for name, grid in left.items() if grid.bits == 8} == {"conv_out.input"}


def test_a_float_layer_that_is_not_there(exported_unet):
    with pytest.raises(ConfigError, match="'conv_inn' matches none of the model's"):
        attached(exported_unet, float_layers=("conv_inn",))


def test_bits_that_are_not_supported():
    with pytest.raises(ConfigError, match="9 bits are not supported"):
        TDQQuantizer(9)


def test_the_quantizer_of_a_backend(exported_unet, unet_inputs):
    """torchao's own annotates additions and the time embedding, too, which TDQ leaves float."""
    prepared = prepare_qat_pt2e(copy.deepcopy(exported_unet), x86_quantizer())
    before = sum(isinstance(module, TDQFakeQuantize) for module in prepared.modules())
    annotated = quantized_weights(prepared)
    model = tdq.attach(prepared).eval()
    names = tdq.scale_bank(model).names
    layers = {name for name in grids(attached(exported_unet)) if not name.startswith("product")}
    assert set(names) == layers
    assert before > len(names)
    assert sum(isinstance(module, TDQFakeQuantize) for module in model.modules()) == len(names)
    assert "time_embedding.linear_1.weight" in annotated - quantized_weights(model)
    assert quantized_weights(model) == quantized_weights(attached(exported_unet))
    tdq.calibrate(model, [unet_inputs], samples=64)
    with tdq.calibration(model), torch.no_grad():
        expected = model(*unet_inputs)
    with torch.no_grad():
        assert (model(*unet_inputs) - expected).norm() < 0.1 * expected.norm()


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.layer(self.layer(sample).tanh()) * timestep[:, None]

    exported = export(Twice(), (torch.ones(2, 4), torch.tensor([1.0, 2.0])))
    assert tdq.scale_bank(attached(exported)).names == ("layer.input", "layer.input.1")


class Blurred(nn.Module):
    """A convolution with a fixed kernel between two layers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.full((4, 1, 3, 3), 1 / 9))
        self.first, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, sample, timestep):
        blurred = nn.functional.conv2d(self.first(sample), self.kernel, padding=1, groups=4)
        return self.last(blurred) * timestep[:, None, None, None]


def test_a_kernel_that_is_no_parameter_stays_float():
    exported = export(Blurred(), (torch.ones(2, 1, 6, 6), torch.tensor([1.0, 2.0])))
    model = attached(exported)
    assert tdq.scale_bank(model).names == ("first.input", "last.input")
    assert quantized_weights(model) == {"first.weight", "last.weight"}


def test_products_without_any_layer():
    class Products(nn.Module):
        def forward(self, sample, timestep):
            return torch.matmul(sample, sample.transpose(1, 2)) * timestep[:, None, None]

    exported = export(Products(), (torch.ones(2, 3, 4), torch.tensor([1.0, 2.0])))
    assert set(grids(attached(exported))) == {"product.0.0", "product.0.1"}


def test_layers_that_torchao_lets_share_a_quantizer():
    class Shared(TDQQuantizer):
        def annotate(self, model):
            super().annotate(model)
            first, second = (n for n in model.graph.nodes if Q_ANNOTATION_KEY in n.meta)
            annotation = second.meta[Q_ANNOTATION_KEY]
            edge = first.args[0], first
            annotation.input_qspec_map[second.args[0]] = SharedQuantizationSpec(edge)
            return model

    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.second(self.first(sample).tanh()) * timestep[:, None]

    exported = export(TwoLayers(), (torch.ones(2, 4), torch.tensor([1.0, 2.0])))
    prepared = prepare_qat_pt2e(exported, Shared(8, 8))
    assert len({m for m in prepared.modules() if isinstance(m, TDQFakeQuantize)}) == 1
    model = tdq.attach(prepared).eval()
    first, second = (quantizer for _, quantizer in tdq.named_quantizers(model))
    assert first is not second
    assert tdq.scale_bank(model).names == ("first.input", "second.input")
    tdq.calibrate(model, [(torch.randn(8, 4), 3)], samples=16)
    scales, _ = tdq.scale_bank(model)(3)
    assert scales[0] != scales[1]


def test_attach_after_it_was_refused(exported_unet):
    quantizer = TDQQuantizer(8, 8)
    prepared = prepare_qat_pt2e(copy.deepcopy(exported_unet), quantizer)
    with pytest.raises(ConfigError, match="no bank"):
        tdq.attach(prepared, bank=refuse)
    model = tdq.attach(prepared)
    quantizers = [m for m in model.modules() if isinstance(m, TDQFakeQuantize)]
    assert len(quantizers) == len(tdq.scale_bank(model).names)


def refuse(grids):
    raise ConfigError("no bank")


def test_state_dicts_remember_what_is_switched_off(exported_unet, unet_inputs):
    model, other = attached(exported_unet), attached(exported_unet)
    tdq.calibrate(model, [unet_inputs], samples=16)
    for module in model.modules():
        if isinstance(module, TDQFakeQuantize | TDQWeightFakeQuantize):
            module.disable_fake_quant()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(*unet_inputs), exported_unet(*unet_inputs))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (TDQFakeQuantize, torch.per_channel_affine),
        (TDQWeightFakeQuantize, torch.per_tensor_symmetric),
    ],
)
def test_a_specification_of_another_kind(kind, scheme):
    with pytest.raises(ConfigError, match=r"is static and per .*Correct the QuantizationSpec"):
        kind(qscheme=scheme)
    with pytest.raises(ConfigError, match="is_dynamic=True"):
        kind(is_dynamic=True)


def test_blocks_are_those_of_fx(unet, unet_inputs, exported_unet):
    """But for operators between them: an exported graph cannot name a concatenation."""
    graph = tdq.trace(copy.deepcopy(unet), unet_inputs)
    models = graph, attached(exported_unet)
    blocks = [[block.name for block in find_blocks(model.graph)] for model in models]
    expected, ours = ([name for name in names if "." in name] for names in blocks)
    assert ours == expected
    assert len(ours) > 8


@pytest.mark.whole
@pytest.mark.parametrize("granularity", ["block", "network"])
def test_reconstruction_lowers_the_error(exported_unet, granularity):
    model = attached(exported_unet)
    x, steps = torch.randn(16, 1, 8, 8), torch.linspace(0, 999, 16).round()
    tdq.calibrate(model, [(x, steps)], samples=64)
    with tdq.calibration(model), torch.no_grad():
        expected = model(x, steps)

    def error():
        with torch.no_grad():
            return float((model(x, steps) - expected).square().mean())

    before = error()
    configuration = tdq.ReconstructionConfig(granularity=granularity, iterations=20, batch_size=8)
    tdq.reconstruct(model, CalibrationSet(x, steps), configuration)
    assert error() < 0.95 * before


def test_learned_rounding_needs_modules(exported_unet, unet_inputs):
    model = attached(exported_unet)
    tdq.calibrate(model, [unet_inputs], samples=16)
    data = CalibrationSet(torch.randn(4, 1, 8, 8), torch.arange(4.0))
    configuration = tdq.ReconstructionConfig(iterations=1, learn_rounding=True)
    with pytest.raises(AdapterError, match="learn"):
        tdq.reconstruct(model, data, configuration)
