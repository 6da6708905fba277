"""Activations that are not batch-major are found by samples that change places."""

import pytest
import torch
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.batch_layout import check_layout, fingerprints, next_places
from tdq_plugin.errors import CalibrationError

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))


def checked(activation):
    """Check an activation that is a function of the batch."""
    before, after = ([fingerprints(activation(x), 4)] for x in (X, next_places(X, 4)))
    check_layout({"layer": before}, {"layer": after})


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x,
        lambda x: x.flatten(0, 1),
        lambda x: x.repeat_interleave(2, dim=0),
        lambda x: x.transpose(1, 2) * 1e-6,
        torch.zeros_like,
    ],
)
def test_batch_major(activation):
    checked(activation)


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x[:, :4].transpose(0, 1),
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda x: torch.cat([x, x]),
        lambda x: torch.arange(20.0).reshape(4, 5),
        lambda x: x[:, :4].transpose(0, 1) * 1e-6,
    ],
    ids=["tokens first", "tokens first, flat", "doubled", "of no sample", "small"],
)
def test_another_layout(activation):
    with pytest.raises(CalibrationError, match=r"'layer' does not hold the 4 samples.*float_layer"):
        checked(activation)


class Denoiser(nn.Module):
    def __init__(self, doubled=False):
        super().__init__()
        self.first, self.last, self.doubled = nn.Linear(8, 8), nn.Linear(8, 8), doubled

    def forward(self, x, t, context=None):
        if self.doubled:
            x, t = torch.cat([x, -x]), torch.cat([t, t])
        hidden = self.first(x) * (1 + t.reshape(-1, 1, 1) / 1000)
        hidden = hidden if context is None else hidden + context["mean"][:, None]
        return self.last(hidden)


T = torch.tensor([10.0, 300.0, 600.0, 990.0])


def test_guidance_inside_the_model():
    model = tdq.attach(quantize_eager(Denoiser(doubled=True), 8, 8))
    with pytest.raises(CalibrationError, match=r"'first.input' does not hold the 4 samples"):
        tdq.calibrate(model, [(torch.randn(4, 4, 8), T)])


def test_conditions_move_with_their_samples_and_nothing_is_seen_twice():
    batches = [(torch.randn(4, 4, 8), T, {"context": {"mean": torch.randn(4, 8)}})] * 2
    model = tdq.attach(quantize_eager(Denoiser(), 8, 8))
    with tdq.calibration(model) as observers, torch.no_grad():
        for x, t, conditions in batches:
            model(x, t, **conditions)
    seen = tdq.calibrate(model, batches)
    for name, observer in observers.items():
        assert torch.equal(observer.result().values, seen[name].values)
        assert torch.equal(observer.result().deviation, seen[name].deviation)


def test_frames_that_the_caller_has_put_together():
    model = tdq.attach(quantize_eager(Frames(), 8, 8))
    observed = tdq.calibrate(model, [(torch.randn(8, 8), T)])
    assert len(observed["layer.input"].timesteps) == 4


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, t):
        return self.layer(x * (1 + t.repeat_interleave(2)[:, None] / 1000))
