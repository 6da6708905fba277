"""Which quantizers remain after attach, with which bits and names."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn import functional

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import (
    TDQFakeQuantize,
    TDQWeightFakeQuantize,
    tdq_qconfig,
    tdq_qconfig_mapping,
)
from tdq_plugin.errors import AdapterError, ConfigError
from tdq_plugin.graph.compute import is_quantizer, operand_indices


def bits_of(model):
    bank = tdq.scale_bank(model)
    return {name: grid.bits for name, grid in zip(bank.names, bank.grids, strict=True)}


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unet_has_a_quantizer_for_every_compute_input(prepare, unet, unet_inputs, qat, symmetric):
    options = {"qat": qat, "symmetric_activations": symmetric}
    model = tdq.attach(prepare(copy.deepcopy(unet), unet_inputs, 4, 8, **options))
    bits = bits_of(model)
    layers = [name for name in bits if name.endswith(".input")]
    products = [name for name in bits if name.startswith("product.")]
    # 41 convolutions and linear layers see the sample; query, key and value share their input in
    # each of the 4 attentions, which have a product of three operands.
    assert (len(layers), len(products)) == (41 - 4 * 2, 4 * 3)
    assert not [name for name in bits if "time_emb" in name]
    assert not [name for name in bits if name.endswith(("to_k.input", "to_v.input"))]
    assert {name for name, value in bits.items() if value == 8} == {
        "conv_in.input",
        "conv_out.input",
    }
    assert set(bits.values()) == {4, 8}
    assert {grid.symmetric for grid in tdq.scale_bank(model).grids} == {symmetric}


def test_only_operands_are_quantized(prepare, unet, unet_inputs):
    model = tdq.attach(prepare(copy.deepcopy(unet), unet_inputs))
    for node in model.graph.nodes:
        if is_quantizer(node):
            for user in node.users:
                assert node in [user.args[index] for index in operand_indices(user)]
        for index in operand_indices(node):
            float_layer = "time_emb" in str(node.target)
            assert is_quantizer(node.args[index]) != float_layer


class Products(nn.Module):
    """Every matrix product there is."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.layer = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        left = self.layer(sample) + timestep.reshape(-1, 1, 1)
        return self.product(left, sample.transpose(1, 2).tanh())


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize(
    ("product", "operands"),
    [
        (torch.matmul, [0, 1]),
        (operator.matmul, [0, 1]),
        (torch.bmm, [0, 1]),
        (lambda a, b: torch.baddbmm(torch.ones(1, 1, 1), a, b), [1, 2]),
        (lambda a, b: functional.scaled_dot_product_attention(a, b, a * 2), [0, 1, 2]),
        (lambda a, b: a.matmul(b), [0, 1]),
        (lambda a, b: a.bmm(mat2=b), [0, 1]),
        (lambda a, b: (a * 2).baddbmm(a, batch2=b), [1, 2]),
    ],
)
def test_products_are_quantized(prepare, product, operands, qat):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 4), torch.tensor([1, 2]))
    network = Products(product).eval()
    model = tdq.attach(prepare(network, inputs, qat=qat))
    names = {"layer.input"} | {f"product.0.{index}" for index in operands}
    assert set(bits_of(model)) == names
    tdq.calibrate(model, [inputs])
    expected = network(*inputs)
    assert (model.eval()(*inputs) - expected).norm() < 0.1 * expected.norm()


class Chain(nn.Module):
    """Layers that read other layers' outputs directly, one of them twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.second = nn.Conv1d(4, 4, 1)
        self.branch = nn.Conv1d(4, 4, 1)
        self.twice = nn.Conv1d(4, 4, 1)
        self.last = nn.Conv1d(4, 2, 1)

    def forward(self, sample, timestep):
        hidden = self.first(sample)
        hidden = (self.second(hidden) + self.branch(hidden)).relu() + timestep.reshape(-1, 1, 1)
        return self.last(self.twice(self.twice(hidden)))


CHAIN_INPUTS = (torch.randn(2, 2, 6), torch.tensor([1, 2]))


@pytest.mark.parametrize("qat", [True, False])
def test_every_layer_has_its_own_bits(prepare, qat):
    """torch.ao lets the output observer of one layer serve the next one's input."""
    model = tdq.attach(prepare(Chain(), CHAIN_INPUTS, 4, 4, qat=qat))
    assert bits_of(model) == {
        "first.input": 8,
        "second.input": 4,
        "twice.input": 4,
        "twice.input.1": 4,
        "last.input": 8,
    }


@pytest.mark.parametrize("qat", [True, False])
def test_float_layers_stay_float(prepare, qat):
    model = tdq.attach(prepare(Chain(), CHAIN_INPUTS, 4, 4, qat=qat, float_layers=("tw*",)))
    assert set(bits_of(model)) == {"first.input", "second.input", "last.input"}
    assert not hasattr(model.twice, "weight_fake_quant")
    first = next(node for node in model.graph.nodes if node.target == "twice")
    assert not is_quantizer(first.args[0])


def test_a_user_s_own_qconfig_mapping_is_respected(prepare):
    from torch.ao.quantization import QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig

    graph = tdq.trace(Chain().eval(), CHAIN_INPUTS).train()
    mapping = QConfigMapping().set_module_name("second", tdq_qconfig(5, 6))
    model = prepare_qat_fx(graph, mapping, CHAIN_INPUTS, backend_config=tdq_backend_config())
    assert bits_of(tdq.attach(model)) == {"second.input": 5}
    assert model.second.weight_fake_quant.grid.bits == 6


@pytest.mark.parametrize("first_last_bits", [None, 8])
def test_mapping_of_bits(unet, unet_inputs, first_last_bits):
    graph = tdq.trace(copy.deepcopy(unet), unet_inputs)
    mapping = tdq_qconfig_mapping(graph, 4, 3, first_last_bits=first_last_bits)
    by_name = mapping.module_name_qconfigs
    assert ("conv_in" in by_name) == ("conv_out" in by_name) == (first_last_bits == 8)
    if first_last_bits:
        assert by_name["conv_in"].activation().grid.bits == 8
        assert by_name["conv_out"].weight().grid.bits == 8
    assert mapping.object_type_qconfigs[nn.Conv2d].activation().grid.bits == 4
    assert mapping.object_type_qconfigs[nn.Conv2d].weight().grid.bits == 3
    assert by_name["time_embedding.linear_1"] is None
    assert by_name["mid_block.resnets.0.time_emb_proj"] is None


def test_unknown_float_layer_and_bits(unet, unet_inputs):
    graph = tdq.trace(copy.deepcopy(unet), unet_inputs)
    with pytest.raises(ConfigError, match="'conv_inn' matches none of the model's 51 layers"):
        tdq_qconfig_mapping(graph, float_layers=("conv_inn",))
    with pytest.raises(ConfigError, match="9 bits are not supported"):
        TDQFakeQuantize(bits=9)
    for one in (("mid_block",), "mid_block"):
        named = tdq_qconfig_mapping(graph, float_layers=one).module_name_qconfigs
        assert named["mid_block.resnets.0.conv1"] is None
        assert named.get("down_blocks.0.resnets.0.conv1", "as its type") == "as its type"


def test_a_mapping_for_a_model_that_is_not_traced(unet):
    with pytest.raises(AdapterError, match=r"^A UNet2DModel is no graph, .*tdq_plugin\.trace"):
        tdq_qconfig_mapping(unet)


def test_torch_ao_switches(prepare):
    from torch.ao.quantization import disable_fake_quant, enable_fake_quant

    model = tdq.attach(prepare(Chain(), CHAIN_INPUTS, 2, 2))
    tdq.calibrate(model, [(CHAIN_INPUTS[0], 5)])
    quantized = model.eval()(CHAIN_INPUTS[0], 5)
    model.apply(disable_fake_quant)
    plain = Chain()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(CHAIN_INPUTS[0], 5), plain(CHAIN_INPUTS[0], torch.tensor(5)))
    switched_off, restored = model.state_dict(), copy.deepcopy(model)
    restored.apply(enable_fake_quant)
    assert torch.equal(restored(CHAIN_INPUTS[0], 5), quantized)
    restored.load_state_dict(switched_off)
    assert torch.equal(restored(CHAIN_INPUTS[0], 5), model(CHAIN_INPUTS[0], 5))
    model.apply(enable_fake_quant)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored(CHAIN_INPUTS[0], 5), quantized)


def test_modes_are_in_the_state_dict(prepare):
    model = tdq.attach(prepare(Chain(), CHAIN_INPUTS, 2, 2))
    tdq.calibrate(model, [(CHAIN_INPUTS[0], 5)])
    (_, first), (_, second) = list(tdq.named_quantizers(model))[:2]
    weights = [m for m in model.modules() if isinstance(m, TDQWeightFakeQuantize)]
    first.mode, weights[0].enabled = "off", False
    second.mode = "dynamic"
    second.enable_fake_quant()
    restored = copy.deepcopy(model)
    for _, quantizer in tdq.named_quantizers(restored):
        quantizer.mode = "quantize"
    restored.load_state_dict(model.state_dict())
    assert [q.mode for _, q in tdq.named_quantizers(restored)][:2] == ["off", "quantize"]
    model.load_state_dict(model.state_dict())
    assert [q.mode for _, q in tdq.named_quantizers(model)][:2] == ["off", "dynamic"]
    assert not weights[0].enabled


def test_values_that_share_an_observer_get_quantizers_of_their_own():
    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3)

        def forward(self, sample, timestep):
            hidden = self.first(sample) * timestep.view(-1, 1, 1, 1)
            return self.second(functional.interpolate(hidden, scale_factor=2.0))

    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    graph = tdq.trace(Resized(), inputs).train()
    prepared = prepare_qat_fx(graph, QConfigMapping().set_global(tdq_qconfig()), inputs)
    model = tdq.attach(prepared)
    tdq.calibrate(model, [inputs])
    quantizers = dict(tdq.named_quantizers(model))
    assert list(quantizers) == ["first.input", "second.input"]
    assert len(set(quantizers.values())) == 2
    assert model(*inputs).shape == (2, 1, 10, 10)


def test_what_stays_float_is_told(prepare):
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.up = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 1, 2)

        def forward(self, sample, timestep):
            hidden = self.layer(sample) * timestep.view(-1, 1, 1, 1)
            return torch.einsum("bchw,bcxy->bcw", self.up(hidden), hidden)

    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with pytest.warns(
        UserWarning, match=r"2 operations stay float.*up \(ConvTranspose2d\), einsum"
    ):
        model = tdq.attach(prepare(Rare(), inputs))
    assert tdq.scale_bank(model).names == ("layer.input",)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (nn.MultiheadAttention(4, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1),
            lambda m, x: m(x),
        ),
        (nn.GRU(4, 4), lambda m, x: m(x)[0]),
        (nn.Identity(), lambda m, x: x[0] @ torch.mm(x[1], x[2]).mm(x[0])),
    ],
)
def test_modules_that_the_graph_calls_as_a_whole_are_told(prepare, module, call):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.whole = nn.Linear(4, 4), module

        def forward(self, sample, timestep):
            return call(self.whole, self.first(sample) * timestep.view(-1, 1, 1))

    inputs = torch.randn(3, 4, 4), torch.tensor([3, 900, 5])
    kind = type(module).__name__
    told = r"2 .*: mm \(mm\), mm_1 \(mm\)" if kind == "Identity" else rf"1 .*: whole \({kind}\)"
    with pytest.warns(UserWarning, match=rf"{told}\."):
        prepare(Whole(), inputs)


class Named(nn.Module):
    """Its operands are given by name."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        query, key = self.query(sample), self.key(input=sample)
        attended = functional.scaled_dot_product_attention(query, key=key, value=sample)
        return self.out(input=torch.matmul(attended, other=key.transpose(1, 2)) @ query)


def test_operands_that_are_given_by_name(prepare):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    model = Named().eval()
    expected = model(x, 5)
    prepared = tdq.attach(prepare(model, (x, 5)), tdq.ConstantBank)
    assert list(tdq.scale_bank(prepared).names) == [
        "query.input",
        "product.0.0",
        "product.0.1",
        "product.1.0",
        "product.1.1",
        "product.2.0",
        "out.input",
    ]
    tdq.calibrate(prepared, [(x, 5)])
    lowered = tdq.lower_to_int8(tdq.freeze(prepared, [5]))
    with torch.no_grad():
        torch.testing.assert_close(lowered(x, 5), expected, rtol=0.1, atol=0.05)
