"""Law 5 on OpenVINO: every kind of layer, at every timestep and batch size, against float64."""

from functools import cache

import pytest
import torch
from contract.networks import STEPS
from cpu import needs_vnni
from deploy.networks import prepared
from deploy.test_layers import relative_error
from deploy.test_lower import exact_layer
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_qconfig_mapping
from tdq_plugin.deploy.openvino import to_openvino

LAYERS = {
    "conv2d": nn.Conv2d(6, 10, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "grouped": nn.Conv2d(6, 12, 3, padding=1, groups=3, bias=False),
    "depthwise": nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "pointwise": nn.Conv2d(6, 9, 1),
    "conv1d": nn.Conv1d(6, 10, 3, padding=1),
    "linear": nn.Linear(6, 10),
    "linear without bias": nn.Linear(6, 3, bias=False),
}


class ManyLayers(nn.Module):
    """All layers side by side on the same values, each output flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS.values())

    def forward(self, sample, timestep):
        line = sample.flatten(2)
        inputs = [sample] * 4 + [line] + [line.transpose(1, 2)] * 2
        outputs = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        everything = torch.cat([output.flatten(1) for output in outputs], dim=1)
        return everything * (1 + timestep.reshape(-1, 1) / 1000)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (0.3 + torch.randn(4, 6, 9, 9, generator=generator) * (1 + t / 500), torch.full((4,), t))
        for t in STEPS
    ]


@cache
def converted(bits, symmetric):
    example = (torch.zeros(2, 6, 9, 9), torch.zeros(2))
    model = ManyLayers()
    options = {"symmetric_activations": symmetric, "first_last_bits": None}
    mapping = tdq_qconfig_mapping(tdq.trace(model, example), bits, bits, **options)
    frozen = tdq.attach(prepared(model, mapping=mapping, example=example))
    tdq.calibrate(frozen, batches())
    table = tdq.scale_bank(tdq.freeze(frozen, STEPS)).table
    # The layers' inputs hold the same values, and shall be away from ties for all quantizers.
    values = (table.scales, table.zero_points)
    columns = (value[:, :1].expand(-1, 3).contiguous() for value in values)
    tdq.load_scales(frozen, tdq.ScaleTable(table.grids, table.timesteps, *columns))
    return frozen, to_openvino(frozen, example)


def away_from_ties(frozen, timesteps):
    """Values that no rounding error can move to another code of the quantizer of t, and codes."""
    bank = frozen.scale_bank
    scales, zeros = (row[0].reshape(-1, 1, 1, 1) for row in bank(timesteps))
    grid = bank.grids[0]
    generator = torch.Generator().manual_seed(2)
    shape = (len(timesteps), 6, 9, 9)
    codes = torch.randint(grid.quant_min - 3, grid.quant_max + 4, shape, generator=generator)
    offset = torch.rand(shape, generator=generator) * 0.8 - 0.4
    quantized = codes.clamp(grid.quant_min, grid.quant_max) - zeros.double()
    return (codes - zeros + offset) * scales, quantized * scales.double()


def exact(frozen, x, timesteps):
    """The network in float64 behind its quantizers, layer by layer."""
    line = x.flatten(2)
    inputs = [x] * 4 + [line] + [line.transpose(1, 2)] * 2
    with torch.no_grad():
        return [
            exact_layer(layer)(value).flatten(1) * (1 + timesteps.reshape(-1, 1).double() / 1000)
            for layer, value in zip(frozen.layers.children(), inputs, strict=True)
        ]


CASES = [torch.tensor([float(t)]) for t in STEPS]
CASES += [torch.tensor([250.0, 250]), torch.tensor([999.0, 0]), torch.tensor(STEPS).float()]


@needs_vnni
@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (8, True), (4, True), (3, False)])
def test_every_layer_equals_float64_and_runs_on_integers(bits, symmetric):
    frozen, model = converted(bits, symmetric)
    table = frozen.scale_bank.table
    assert len(table.names) == 3
    assert (table.zero_points.unique().tolist() == [0.0]) == symmetric
    for timesteps in CASES:
        x, quantized = away_from_ties(frozen, timesteps)
        expected = exact(frozen, quantized, timesteps)
        pieces = model(x, timesteps).split([piece.shape[1] for piece in expected], dim=1)
        for name, ours, piece in zip(LAYERS, pieces, expected, strict=True):
            assert relative_error(ours, piece) < 1e-6, name
        wrong = model(x, torch.where(timesteps == 600, 0, 600))
        assert relative_error(wrong, torch.cat(expected, dim=1)) > 0.01
    assert model.report.integer_layers == sorted(f"layers.{i}" for i in range(len(LAYERS)))
    assert model.report.lost_layers == []
    assert sorted(model.report.moved) == sorted(table.names)


def test_one_timestep_serves_the_whole_batch():
    frozen, model = converted(8, False)
    x, _ = away_from_ties(frozen, torch.full((5,), 250.0))
    together = model(x, 250)
    for same in (torch.tensor(250), torch.tensor([250]), torch.full((5,), 250)):
        assert torch.equal(model(x, same), together)
    alone = torch.cat([model(x[i : i + 1], 250) for i in range(5)])
    assert relative_error(together, alone) < 1e-6
