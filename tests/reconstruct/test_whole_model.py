import copy

import pytest
import torch
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.errors import AdapterError
from tdq_plugin.reconstruct import CalibrationSet, ReconstructionConfig, reconstruct
from tdq_plugin.reconstruct.whole_model import whole_model_objective


@pytest.fixture(scope="module")
def eager(unet, data):
    model = tdq.attach(quantize_eager(copy.deepcopy(unet), 3, 8, first_last_bits=None)).eval()
    tdq.calibrate(model, data.batches(16))
    return model


@pytest.fixture
def model(eager):
    return copy.deepcopy(eager)


def _error(model, unet, data):
    with torch.no_grad():
        pairs = [(model(*batch)[0], unet(*batch)[0]) for batch in data.batches(16)]
    return sum(float((quantized - target).square().mean()) for quantized, target in pairs)


@pytest.mark.whole
def test_a_model_that_is_no_graph_is_trained_on_its_output(model, unet, data):
    before = _error(model, unet, data)
    (loss,) = reconstruct(model, data, ReconstructionConfig(iterations=40, batch_size=16))
    assert loss > 0
    assert _error(model, unet, data) < 0.95 * before


def test_the_model_without_quantizers_is_the_default_reference(model, unet, data):
    twin = copy.deepcopy(model)
    config = ReconstructionConfig(iterations=3, batch_size=16)
    losses = reconstruct(model, data, config)
    assert losses == pytest.approx(reconstruct(twin, data, config, reference=unet), rel=1e-4)
    elsewhere = reconstruct(model, data, config, reference=lambda x, t: torch.ones_like(x))
    assert elsewhere != pytest.approx(losses, rel=0.5)


def test_a_reference_in_training_mode_has_no_dropout(model, data):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, sample, timestep):
            return self.dropout(sample)

    reference = Dropped()
    (target,) = whole_model_objective(model, data, reference).targets
    assert torch.equal(target, data.samples)
    assert reference.training
    assert reference.dropout.training


class TimestepFirst(nn.Module):
    """Its own order of arguments."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, t, x):
        return self.layer(x * (1 + t[:, None] / 1000))


class OptionalArguments(TimestepFirst):
    """Arguments that are not given stand between sample and timestep."""

    def forward(self, x, y=None, t=None):
        return super().forward(t, x if y is None else x + y)


class ConditionFirst(TimestepFirst):
    """The condition comes before the sample."""

    def forward(self, y, x, t):
        return super().forward(t, x + y)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", [TimestepFirst, OptionalArguments, ConditionFirst])
def test_arguments_in_any_order(kind, reference):
    torch.manual_seed(0)
    model, samples = kind().eval(), torch.randn(16, 4)
    conditions = {"y": torch.randn(16, 4)} if kind is ConditionFirst else {}
    data = CalibrationSet(samples, torch.arange(16.0) * 60, conditions)
    floating = copy.deepcopy(model)
    attached = tdq.attach(quantize_eager(model, 2, 8, first_last_bits=None), tdq.ConstantBank)
    tdq.calibrate(attached, [{"x": samples, "t": data.timesteps, **conditions}])
    config = ReconstructionConfig(iterations=50, batch_size=16, learning_rate=1e-2)
    first = reconstruct(copy.deepcopy(attached), data, ReconstructionConfig(iterations=1))
    (loss,) = reconstruct(attached, data, config, reference=floating if reference else None)
    assert loss < first[0]


def test_no_argument_for_the_sample():
    model = tdq.attach(quantize_eager(TimestepFirst().eval()), tdq.ConstantBank)
    tdq.calibrate(model, [{"x": torch.ones(2, 4), "t": torch.tensor([1, 2])}])
    data = CalibrationSet(torch.ones(2, 4), torch.tensor([1.0, 2.0]), {"x": torch.ones(2, 4)})
    with pytest.raises(AdapterError, match=r"arguments \['t', 'x'\], .* none is left for the samp"):
        reconstruct(model, data)


def test_a_finished_checkpoint_is_not_trained_again(model, data, tmp_path):
    config = ReconstructionConfig(iterations=2, batch_size=8)
    twin = copy.deepcopy(model)
    losses = reconstruct(model, data, config, checkpoint=tmp_path / "scales.safetensors")
    steps = []
    again = reconstruct(
        twin, data, config, checkpoint=tmp_path / "scales.safetensors", progress=steps.append
    )
    assert (steps, again) == ([], losses)
    for key, value in tdq.scale_bank(model).state_dict().items():
        assert torch.equal(tdq.scale_bank(twin).state_dict()[key], value), key


def test_blocks_and_rounding_need_a_graph(model, data):
    with pytest.raises(AdapterError, match=r"granularity='block'.*needs a traced graph"):
        reconstruct(model, data, ReconstructionConfig("block"))
    with pytest.raises(AdapterError, match=r"learn_rounding=True needs a traced graph"):
        reconstruct(model, data, ReconstructionConfig(learn_rounding=True))
