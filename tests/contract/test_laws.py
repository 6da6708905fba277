"""Laws 1 to 4: what the numbers of every adapter obey."""

import copy

import pytest
import torch
from contract.adapters import ADAPTERS
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
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
    results = {}
    for adapter in ADAPTERS:
        torch.manual_seed(0)
        model = TinyDenoiser(attention=False).eval()
        model = tdq.attach(adapter.prepare(model, example_inputs(), *bits)).eval()
        if not results:
            tdq.calibrate(model, BATCHES)
            tdq.scale_bank(tdq.freeze(model, STEPS)).table.save(tmp_path / "table.safetensors")
        tdq.load_scales(model, tdq.load_table(tmp_path / "table.safetensors"))
        run = adapter.with_quantized_weights(model)
        with torch.no_grad():
            results[adapter.name] = [run(SAMPLE, step) for step in STEPS]
    reference = results.pop(ADAPTERS[0].name)
    for adapter in ADAPTERS[1:]:
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
