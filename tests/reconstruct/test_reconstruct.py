import copy

import pytest
import torch
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.errors import AdapterError, CalibrationError, ConfigError, TableFormatError
from tdq_plugin.reconstruct import (
    CalibrationSet,
    ReconstructionConfig,
    find_blocks,
    reconstruct,
)
from tdq_plugin.reconstruct.blocks import run_block
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.weights import WeightQuantizer


@pytest.fixture(scope="module")
def template(calibrated):
    return calibrated(activation_bits=3, weight_bits=8)


@pytest.fixture
def model(template, clone):
    return clone(template)


def test_blocks_follow_the_modules(model):
    names = [block.name for block in find_blocks(model.graph)]
    assert names[:3] == ["conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0"]
    assert "mid_block.attentions.0" in names
    assert names[-1] == "conv_out"
    (whole,) = find_blocks(model.graph, "network")
    assert whole.inputs == ()


def test_blocks_cover_every_quantizer_once(model):
    quantizers = {
        node.target
        for block in find_blocks(model.graph)
        for node in block.nodes
        if "post_process" in str(node.target)
    }
    assert len(quantizers) == len(tdq.scale_bank(model).names)


@pytest.mark.parametrize("granularity", ["block", "network"])
def test_blocks_one_after_the_other_are_the_model(model, data, granularity):
    stream = Stream(model, data, batch_size=16)
    blocks = find_blocks(model.graph, granularity)
    for position, block in enumerate(blocks):
        stream.advance(block)
        if position + 1 < len(blocks):
            stream.forget(blocks[position + 1 :])
    (output,) = (stream.values[node] for node in blocks[-1].outputs)
    with torch.no_grad():
        whole = torch.cat([model(*batch) for batch in data.batches(16)])
    assert torch.equal(output, whole)


def test_a_block_with_one_sample_equals_the_batch(model, data):
    block = find_blocks(model.graph)[1]
    stream = Stream(model, data)
    stream.advance(find_blocks(model.graph)[0])
    with torch.no_grad():
        (together,) = run_block(model, block, stream.inputs(block, slice(0, 4))).values()
        (alone,) = run_block(model, block, stream.inputs(block, slice(2, 3))).values()
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)


def _output_error(model, data):
    with torch.no_grad():
        quantized = torch.cat([model(*batch) for batch in data.batches(16)])
        with tdq.calibration(model):
            target = torch.cat([model(*batch) for batch in data.batches(16)])
    return float((quantized - target).square().mean())


@pytest.mark.whole
@pytest.mark.parametrize("granularity", ["block", "network"])
def test_training_lowers_the_error_and_touches_only_the_bank(model, data, granularity):
    before = _output_error(model, data)
    state = {k: v.clone() for k, v in model.state_dict().items() if "scale_bank" not in k}
    required = [p.requires_grad for p in model.parameters()]
    steps = []
    config = ReconstructionConfig(granularity, iterations=40, batch_size=16)
    reconstruct(model, data, config, progress=steps.append)
    assert _output_error(model, data) < 0.95 * before
    assert [p.requires_grad for p in model.parameters()] == required
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert steps[-1].step == steps[-1].steps == len(steps)


def test_an_interrupted_run_goes_on_to_the_same_result(model, clone, data, tmp_path):
    config = ReconstructionConfig("block", iterations=3, batch_size=8)
    twin = clone(model)
    reconstruct(model, data, config)

    def interrupt(progress):
        if progress.step == 20:
            raise KeyboardInterrupt

    start = {key: value.clone() for key, value in tdq.scale_bank(twin).state_dict().items()}
    checkpoint = tmp_path / "scales.safetensors"
    with pytest.raises(KeyboardInterrupt):
        reconstruct(twin, data, config, checkpoint=checkpoint, progress=interrupt)
    tdq.scale_bank(twin).load_state_dict(start)
    steps = []
    reconstruct(twin, data, config, checkpoint=checkpoint, progress=steps.append)
    assert steps[0].step > 3
    for key, value in tdq.scale_bank(model).state_dict().items():
        assert torch.equal(tdq.scale_bank(twin).state_dict()[key], value), key


def test_a_checkpoint_of_another_configuration_is_refused(model, data, tmp_path):
    checkpoint = tmp_path / "scales.safetensors"
    reconstruct(model, data, ReconstructionConfig(iterations=1), checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"another configuration.*Remove it"):
        reconstruct(model, data, ReconstructionConfig(iterations=2), checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(TableFormatError, match="not a readable checkpoint"):
        reconstruct(model, data, ReconstructionConfig(iterations=1), checkpoint=checkpoint)


def test_a_checkpoint_is_no_folder(model, data, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint=.*is a folder; give a file in it"):
        tdq.reconstruct(model, data, ReconstructionConfig(iterations=1), checkpoint=tmp_path)


def test_data_that_are_none(model, data):
    with pytest.raises(
        CalibrationError, match=r"^data is list\. Give it what collect_trajectories"
    ):
        reconstruct(model, [(data.samples, data.timesteps)])
    nothing = CalibrationSet(data.samples[:0], data.timesteps[:0])
    with pytest.raises(CalibrationError, match=r"^data is empty\. Give it what"):
        reconstruct(model, nothing)


def test_samples_that_are_not_finite_are_refused(model, data):
    broken = CalibrationSet(data.samples * float("nan"), data.timesteps)
    with pytest.raises(CalibrationError, match="loss of block 'network' is nan at step 0"):
        reconstruct(model, broken, ReconstructionConfig(iterations=1))


def test_a_refused_loss_leaves_the_bank_as_it_was(model, data):
    before = {key: value.clone() for key, value in tdq.scale_bank(model).state_dict().items()}
    with pytest.raises(CalibrationError, match="is nan at step 0"):
        reconstruct(model, data, ReconstructionConfig(), weighting=lambda t: t * float("nan"))
    for key, value in tdq.scale_bank(model).state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_float_output_of_zero_is_no_error(model, data):
    torch.nn.init.zeros_(model.get_submodule("conv_out").weight)
    torch.nn.init.zeros_(model.get_submodule("conv_out").bias)
    (loss,) = reconstruct(model, data, ReconstructionConfig(iterations=2, batch_size=4))
    assert loss == 0
    assert all(value.isfinite().all() for value in tdq.scale_bank(model).parameters())


def test_a_checkpoint_of_another_bank_is_refused(model, data, tmp_path):
    config, checkpoint = ReconstructionConfig(iterations=1), tmp_path / "scales.safetensors"
    reconstruct(model, data, config, checkpoint=checkpoint)
    live = tdq.scale_bank(model)
    other = tdq.ConstantBank(dict(zip(live.names, live.grids, strict=True)))
    other.set_static(live.base_scale[:, 0] * 2, live.zero_point[:, 0].detach())
    tdq.set_scale_bank(model, other)
    with pytest.raises(
        ConfigError, match=r"another scale bank: GeneratorBank.*instead of ConstantBank.*Remove it"
    ):
        reconstruct(model, data, config, checkpoint=checkpoint)
    assert torch.equal(other.base_scale, live.base_scale * 2)


def test_a_checkpoint_of_other_bits_is_refused(calibrated, clone, data, tmp_path):
    config, checkpoint = ReconstructionConfig(iterations=1), tmp_path / "scales.safetensors"
    reconstruct(clone(calibrated(4, 8)), data, config, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"another set of quantizers.*quant_max\": 15"):
        reconstruct(clone(calibrated(8, 8)), data, config, checkpoint=checkpoint)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_of_other_weight_quantizers_is_refused(
    calibrated, clone, data, tmp_path, bits
):
    config, checkpoint = ReconstructionConfig(iterations=1), tmp_path / "scales.safetensors"
    model = calibrated(4, 8)
    reconstruct(clone(model), data, config, checkpoint=checkpoint)
    other = clone(calibrated(4, bits))
    if bits == 8:
        for module in other.modules():
            if isinstance(module, WeightQuantizer):
                module.set_scale(module.scale.detach() * 2)
    message = "was written from other weights" if bits == 8 else "another set of weight quantizers"
    before = copy.deepcopy(tdq.scale_bank(other).state_dict())
    with pytest.raises(ConfigError, match=message):
        reconstruct(other, data, config, checkpoint=checkpoint)
    for key, value in tdq.scale_bank(other).state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_checkpoint_of_other_weights_is_refused(model, data, tmp_path):
    config, checkpoint = ReconstructionConfig(iterations=1), tmp_path / "scales.safetensors"
    reconstruct(model, data, config, checkpoint=str(checkpoint))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("weight")).mul_(2)
    with pytest.raises(ConfigError, match=r"was written from other weights"):
        reconstruct(model, data, config, checkpoint=checkpoint)


class Conditioned(torch.nn.Module):
    """A denoiser that also sees a condition."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, sample, timestep, label):
        hidden = self.first(sample + label).relu() * (1 + timestep.view(-1, 1) / 1000)
        return self.last(hidden)


@pytest.fixture
def conditioned_data():
    generator = torch.Generator().manual_seed(0)
    label = torch.randn(16, 8, generator=generator)
    return CalibrationSet(
        torch.randn(16, 8, generator=generator), torch.arange(0.0, 960, 60), {"label": label}
    )


def reconstructed(network, data, granularity, inputs, batches):
    """A graph of a network that takes `inputs`; its error has fallen by a tenth at least."""
    example = tuple(value[:2] for value in inputs)
    graph = tdq.trace(network, example)
    mapping = tdq_qconfig_mapping(graph, 3, 8, first_last_bits=None)
    prepared = prepare_qat_fx(graph, mapping, example, backend_config=tdq_backend_config())
    tdq.attach(prepared).eval()
    tdq.calibrate(prepared, batches, warm_start=False)

    def error():
        with torch.no_grad():
            return float((prepared(*inputs) - network(*inputs)).square().mean())

    before = error()
    reconstruct(prepared, data, ReconstructionConfig(granularity, iterations=100, batch_size=16))
    assert error() < 0.9 * before
    return prepared


@pytest.mark.parametrize("granularity", ["block", "network"])
def test_conditions_reach_the_model(conditioned_data, granularity):
    data = conditioned_data
    inputs = data.samples, data.timesteps, data.conditions["label"]
    prepared = reconstructed(Conditioned().eval(), data, granularity, inputs, data.batches(8))
    bare = CalibrationSet(data.samples, data.timesteps)
    with pytest.raises(AdapterError, match=r"has the inputs \['label'\].*the conditions \[\]"):
        reconstruct(prepared, bare, ReconstructionConfig(granularity, iterations=1))


class LabelFirst(Conditioned):
    def forward(self, label, sample, timestep):
        return super().forward(sample, timestep, label)


@pytest.mark.parametrize("granularity", ["block", "network"])
def test_a_condition_may_come_before_the_sample(conditioned_data, granularity):
    data = conditioned_data
    inputs = data.conditions["label"], data.samples, data.timesteps
    reconstructed(LabelFirst().eval(), data, granularity, inputs, [inputs])


class TopLevelHeads(torch.nn.Module):
    """Attention whose layers are blocks of their own, with the heads side by side between them."""

    def __init__(self):
        super().__init__()
        self.query, self.key = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, sample, timestep):
        query, key = (
            layer(sample).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
            for layer in (self.query, self.key)
        )
        return (query @ key.transpose(1, 2)).unflatten(0, (-1, 2))


def test_rows_that_are_no_samples_cannot_be_handed_over():
    graph = tdq.trace(TopLevelHeads().eval(), (torch.randn(2, 5, 8), torch.tensor([1, 2])))
    stream = Stream(graph, CalibrationSet(torch.randn(8, 5, 8), torch.arange(8.0)))
    first, *_ = find_blocks(graph.graph)
    with pytest.raises(AdapterError, match=r"'query' hands .* 16 rows for 8 samples.*'network'"):
        stream.advance(first)


def test_frozen_models_are_refused(model, data):
    tdq.freeze(model, [0, 200, 400, 600, 800])
    with pytest.raises(AdapterError, match=r"FrozenBank.*before freeze"):
        reconstruct(model, data)


def test_numbers_must_be_positive():
    with pytest.raises(ConfigError, match="iterations=0"):
        ReconstructionConfig(iterations=0)
    with pytest.raises(ConfigError, match="zero_point_learning_rate=-1"):
        ReconstructionConfig(zero_point_learning_rate=-1)
