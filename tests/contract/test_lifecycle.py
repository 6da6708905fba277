"""Copies, state dicts, threads, training and calibration, through every adapter."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from contract.adapters import exportable, inference
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from torch import distributed, nn

import tdq_plugin as tdq

SAMPLE = BATCHES[2][0][:4]


def test_state_dict_of_an_attached_model_loads_into_a_fresh_one(make, attach_only, tmp_path):
    trained, fresh = make(), attach_only()
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(SAMPLE, 250), trained(SAMPLE, 250))


def test_table_loads_into_a_fresh_model(make, attach_only, tmp_path):
    frozen, fresh = tdq.freeze(make(), STEPS), attach_only()
    tdq.scale_bank(frozen).table.save(tmp_path / "table.safetensors")
    tdq.load_scales(fresh, tmp_path / "table.safetensors")
    fresh.load_state_dict(frozen.state_dict())
    for step in STEPS:
        assert torch.equal(fresh(SAMPLE, step), frozen(SAMPLE, step))


@pytest.mark.needs("weights loaded late")
def test_float_weights_may_be_loaded_before_or_after_attach(adapter):
    torch.manual_seed(0)
    initial, trained = TinyDenoiser().eval(), TinyDenoiser().eval()
    with torch.no_grad():
        trained.conv_down.weight.mul_(4)
    outputs = []
    for late in (False, True):
        start = copy.deepcopy(initial if late else trained)
        model = tdq.attach(adapter.prepare(start, example_inputs(), 8, 8)).eval()
        if late:
            model.load_state_dict(trained.state_dict(), strict=False)
        tdq.calibrate(model, BATCHES)
        outputs.append(model(SAMPLE, 250))
    assert torch.equal(*outputs)


def test_a_frozen_copy_does_not_freeze_the_original(make):
    model = make()
    tdq.freeze(copy.deepcopy(model), STEPS)
    assert isinstance(tdq.scale_bank(model), tdq.GeneratorBank)
    model(SAMPLE, 3)


@pytest.mark.needs("threads")
def test_threads_with_different_timesteps_do_not_meet(make):
    model = tdq.freeze(make(), STEPS)
    with torch.no_grad():
        alone = {step: model(SAMPLE, step) for step in STEPS}

    def run(step):
        with torch.no_grad():
            return all(torch.equal(model(SAMPLE, step), alone[step]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, [0, 250, 600, 999]))


@pytest.mark.parametrize("timestep", [250, 250.0, torch.tensor(250), torch.tensor([250])])
def test_forms_of_the_timestep(make, timestep):
    model = tdq.freeze(make(), STEPS)
    with torch.no_grad():
        expected = model(SAMPLE[:1], torch.tensor([250.0]))
        assert torch.equal(model(SAMPLE[:1], timestep), expected)
        assert torch.equal(model(sample=SAMPLE[:1], timestep=timestep), expected)


def test_gradients_reach_every_generator(make):
    model = make().train()
    model(SAMPLE, torch.tensor(STEPS[:4])).square().mean().backward()
    bank = tdq.scale_bank(model)
    learned = {"weights": bank.weights[-1], "biases": bank.biases[-1], "zero": bank.zero_point}
    for name, parameter in learned.items():
        assert parameter.grad.isfinite().all()
        is_learned = ~bank.symmetric.flatten() if name == "zero" else slice(None)
        assert (parameter.grad.flatten(1).abs().sum(1) > 0)[is_learned].all(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name


def test_training_lowers_the_quantization_error(make):
    model = make(activations=3).train()
    timesteps = torch.tensor(STEPS[:4])
    with tdq.calibration(model), torch.no_grad():
        target = model(SAMPLE, timesteps)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    errors = []
    for _ in range(30):
        error = (model(SAMPLE, timesteps) - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(error.item())
    assert sum(errors[-3:]) / 3 < 0.7 * errors[0]


class Noisy(TinyDenoiser):
    """The denoiser with dropout behind its first layer."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, sample, timestep):
        return super().forward(self.dropout(sample), timestep)


def test_calibration_and_reconstruction_see_no_dropout(adapter):
    model = tdq.attach(adapter.prepare(Noisy().eval(), example_inputs(), 8, 8)).train()
    flags = {name: module.training for name, module in model.named_modules()}
    seen = tdq.calibrate(model, BATCHES)
    again = tdq.calibrate(model, BATCHES)
    for name, observation in seen.items():
        assert torch.equal(observation.limits, again[name].limits), name
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_calibration_is_float_and_leaves_no_trace(attach_only):
    model = attach_only()
    bank = tdq.scale_bank(model)
    with tdq.calibration(model) as observers, torch.no_grad():
        first = model(SAMPLE, torch.tensor(STEPS[:4]))
        for _, quantizer in tdq.named_quantizers(model):
            quantizer.mode = "off"
        assert torch.equal(model(SAMPLE, torch.tensor(STEPS[:4])), first)
    assert tdq.scale_bank(model) is bank
    assert set(observers) == set(bank.names)
    for name, quantizer in tdq.named_quantizers(model):
        assert quantizer.mode == "quantize"
        assert not quantizer.observed
        # One bin of timesteps for each of the four samples.
        assert len(observers[name].result().timesteps) == 4


@pytest.mark.parametrize("inference_mode", [False, True])
def test_calibration_needs_neither_gradients_nor_flags_of_the_caller(attach_only, inference_mode):
    expected, model = attach_only(), attach_only()
    tdq.calibrate(expected, BATCHES)
    if not inference_mode:
        tdq.scale_bank(model).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode(inference_mode):
        tdq.calibrate(model, BATCHES)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model(SAMPLE, 250), expected(SAMPLE, 250))
    tdq.scale_bank(model).requires_grad_(True)
    model(SAMPLE, 250).square().mean().backward()
    assert all(parameter.grad is not None for parameter in tdq.scale_bank(model).parameters())


def test_modes_off_and_dynamic(make):
    model = make(activations=8)
    quantizers = [quantizer for _, quantizer in tdq.named_quantizers(model)]
    outputs = {}
    for mode in ("quantize", "off", "dynamic"):
        for quantizer in quantizers:
            quantizer.mode = mode
        outputs[mode] = model(SAMPLE, 250)
    size = outputs["off"].norm()
    assert 0 < (outputs["quantize"] - outputs["off"]).norm() < 0.2 * size
    assert 0 < (outputs["dynamic"] - outputs["off"]).norm() < 0.2 * size


@pytest.mark.needs("compilation")
def test_compiles_without_recompilation(adapter, make):
    torch._dynamo.reset()
    model = tdq.freeze(make(), STEPS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    recompiling = torch._dynamo.config.patch(error_on_recompile=True)
    with torch.no_grad(), inference(adapter, model), recompiling:
        for step in STEPS:
            timestep = torch.tensor([step])
            torch.testing.assert_close(compiled(SAMPLE, timestep), model(SAMPLE, timestep))
        with pytest.raises(RuntimeError) as caught:
            compiled(SAMPLE, torch.tensor([3]))
    # Dynamo puts errors of its own on top when a compiled GraphModule raises.
    cause = caught.value
    while cause.__context__ is not None:
        cause = cause.__context__
    assert "not in the frozen scale table" in str(cause)


def test_exports(adapter, make):
    model = exportable(adapter, tdq.freeze(make(), STEPS))
    with torch.no_grad(), inference(adapter, model):
        program = torch.export.export(model, (SAMPLE, torch.tensor([100])))
        for step in STEPS:
            timestep = torch.tensor([step])
            exported = program.module()(SAMPLE, timestep)
            torch.testing.assert_close(exported, model(SAMPLE, timestep))


def test_distributed_data_parallel(make, tmp_path):
    model = make().train()
    reference = copy.deepcopy(model)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(SAMPLE, torch.tensor(STEPS[:4])).square().mean().backward()
    finally:
        distributed.destroy_process_group()
    reference(SAMPLE, torch.tensor(STEPS[:4])).square().mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, theirs.grad)
