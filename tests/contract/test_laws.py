"""Laws 1 to 4: what the numbers of every adapter obey."""

import copy

import pytest
import torch
from contract.adapters import ADAPTERS
from contract.networks import BATCHES, STEPS, TinyDenoiser, ValueFirst, example_inputs
from contract.recording import recorded_calls

import tdq_plugin as tdq
from tdq_plugin.weights import WeightQuantizer

SAMPLE = BATCHES[2][0][:4]


@pytest.mark.needs("torch's rounding")
@pytest.mark.parametrize("bits", [8, 4])
def test_constant_bank_is_the_static_quantizer_bit_for_bit(make, bits):
    model = make(tdq.ConstantBank, activations=bits, weights=bits)
    with torch.no_grad(), recorded_calls(model) as calls:
        ours = model(SAMPLE, 250)
    handles = []
    for name, quantizer in tdq.named_quantizers(model):
        handles.append(quantizer.register_forward_hook(_native(calls[name], quantizer.grid)))
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            handles.append(module.register_forward_hook(_native_weight))
    assert len(handles) >= len(calls) > 0
    with torch.no_grad():
        assert torch.equal(model(SAMPLE, 250), ours)


@pytest.mark.needs("torch's rounding")
def test_ties_are_rounded_as_the_framework_rounds_them(make):
    model = make(tdq.ConstantBank)
    with torch.no_grad(), recorded_calls(model) as calls:
        model(SAMPLE, 250)
    for name, quantizer in tdq.named_quantizers(model):
        grid, (_, scale, zero_point, _) = quantizer.grid, calls[name]
        ties = (torch.arange(-40, 40) + 0.5)[:, None] * scale
        beside = [torch.nextafter(ties, ties + side) for side in (-1, 1)]
        x = torch.cat([ties, *beside], dim=1)
        # Not called as a module: where scales come by a hook, it would bring its own.
        ours = quantizer.forward(x, scale, zero_point)
        assert torch.equal(ours, _native(calls[name], grid)(quantizer, (x,), None)), name


def _native(call, grid):
    scale, zero_point = call.scale.item(), int(call.zero_point.item())

    def hook(module, args, output):
        limits = grid.quant_min, grid.quant_max
        return torch.fake_quantize_per_tensor_affine(args[0], scale, zero_point, *limits)

    return hook


def _native_weight(module, args, output):
    zeros = torch.zeros_like(module.scale, dtype=torch.int32)
    limits = module.grid.quant_min, module.grid.quant_max
    return torch.fake_quantize_per_channel_affine(args[0], module.scale, zeros, 0, *limits)


@pytest.mark.parametrize("bank", [tdq.GeneratorBank, tdq.LearnedTableBank, tdq.ConstantBank])
def test_frozen_rows_equal_the_live_ones(make, bank):
    model = make(bank)
    live = tdq.scale_bank(model)
    steps = torch.tensor(STEPS, dtype=torch.float32)
    with torch.no_grad():
        dense = live.rows(steps)
        single = [live(step) for step in STEPS]
    frozen = tdq.scale_bank(tdq.freeze(model, STEPS))
    for ours, theirs in zip(frozen.rows(steps), dense, strict=True):
        assert torch.equal(ours, theirs)
    for column, rows in enumerate(single):
        for index in (0, 1):
            ours, theirs = frozen.rows(steps)[index][:, column], rows[index][:, 0]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_scales_do_depend_on_the_timestep(make):
    scales, _ = tdq.scale_bank(tdq.freeze(make(), STEPS)).rows(torch.tensor([0.0, 999.0]))
    assert (scales[:, 0] / scales[:, 1] - 1).abs().max() > 0.2


def test_mixed_timesteps_equal_the_samples_one_by_one(make):
    model = tdq.freeze(make(), STEPS)
    steps = torch.tensor(STEPS[:4])
    with torch.no_grad():
        with recorded_calls(model) as calls:
            mixed = model(SAMPLE, steps)
        single = torch.cat(
            [model(SAMPLE[i : i + 1], step) for i, step in enumerate(steps.tolist())]
        )
    quantizers = dict(tdq.named_quantizers(model))
    for row, (name, call) in enumerate(calls.items()):
        scales, zero_points = model.scale_bank.rows(steps.float())
        row = model.scale_bank.names.index(name)
        inputs, outputs = call.x.chunk(4), call.output.chunk(4)
        for i, (x, output) in enumerate(zip(inputs, outputs, strict=True)):
            alone = quantizers[name].forward(x, scales[row, i : i + 1], zero_points[row, i : i + 1])
            assert torch.equal(alone, output), name
    # A convolution over a batch may sum in another order than over one sample.
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 4)])
def test_all_adapters_give_the_same_values(tmp_path, bits):
    _compare(ADAPTERS, lambda: TinyDenoiser(attention=False), bits, tmp_path)


@pytest.mark.parametrize("network", [TinyDenoiser, ValueFirst])
def test_all_adapters_with_products_give_the_same_names_and_values(tmp_path, network):
    adapters = _adapters_with("products", "grids of products")
    assert len(adapters) == 3
    _compare(adapters, network, (8, 8), tmp_path)


def test_a_name_of_a_product_is_the_same_tensor_in_all_adapters():
    adapters, reference = _adapters_with("products"), {}
    assert len(adapters) == 4
    for adapter in adapters:
        torch.manual_seed(0)
        model = tdq.attach(adapter.prepare(ValueFirst().eval(), example_inputs(), 8, 8)).eval()
        tdq.calibrate(model, BATCHES)
        with torch.no_grad(), recorded_calls(model) as calls:
            model(SAMPLE, 250)
        # NNCF lifts quantizers above a transposition.
        values = {name: call.x.flatten().sort().values for name, call in calls.items()}
        reference = reference or values
        assert {name for name in values if name.startswith("product")} == {
            f"product.{product}.{operand}" for product in (0, 1) for operand in (0, 1)
        }
        assert values.keys() == reference.keys(), adapter.name
        for name, ours in values.items():
            assert (ours - reference[name]).norm() < 0.05 * reference[name].norm(), name


def _adapters_with(*needed):
    return [a for a in ADAPTERS if not set(needed) & set(getattr(a, "lacks", {}))]


def _compare(adapters, network, bits, folder):
    """The first adapter's table through all of them."""
    results, names = {}, set()
    for adapter in adapters:
        torch.manual_seed(0)
        model = network().eval()
        model = tdq.attach(adapter.prepare(model, example_inputs(), *bits)).eval()
        if not results:
            tdq.calibrate(model, BATCHES)
            tdq.scale_bank(tdq.freeze(model, STEPS)).table.save(folder / "table.safetensors")
            names = set(tdq.scale_bank(model).names)
        assert set(tdq.scale_bank(model).names) == names, adapter.name
        tdq.load_scales(model, tdq.load_table(folder / "table.safetensors"))
        run = adapter.with_quantized_weights(model)
        with torch.no_grad():
            results[adapter.name] = [run(SAMPLE, step) for step in STEPS]
    reference = results.pop(adapters[0].name)
    for adapter in adapters[1:]:
        for ours, theirs in zip(results[adapter.name], reference, strict=True):
            if "torch's rounding" in getattr(adapter, "lacks", {}):
                assert (ours - theirs).norm() < 2e-3 * theirs.norm()
            else:
                assert torch.equal(ours, theirs), adapter.name


def test_training_a_copy_leaves_the_original(make):
    model = make()
    twin = copy.deepcopy(model)
    before = model(SAMPLE, 250)
    with torch.no_grad():
        tdq.scale_bank(twin).base_scale.mul_(3)
    assert torch.equal(model(SAMPLE, 250), before)
    assert not torch.equal(twin(SAMPLE, 250), before)
