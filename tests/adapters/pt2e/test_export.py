"""Exported graphs serve every batch size and every form of the timestep, and learn where it is."""

import copy
from typing import NamedTuple

import pytest
import torch
from contract.networks import TinyDenoiser, example_inputs
from diffusers_models import one_level_unet
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, TDQWeightFakeQuantize, export
from tdq_plugin.errors import TimestepError, TraceError


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_unet_of_diffusers_at_every_batch_size(unet, exported_unet, batch):
    """64 is where diffusers' upsampling branches."""
    x, steps = torch.randn(batch, 1, 8, 8), torch.arange(batch) * 7
    with torch.no_grad():
        torch.testing.assert_close(exported_unet(x, steps), unet(x, steps).sample)
        torch.testing.assert_close(exported_unet(sample=x, timestep=5), unet(x, 5).sample)


def test_an_export_of_ones_own(unet_inputs):
    """Without batches of one, whose export is another graph, but with numbers as timesteps."""
    model = TinyDenoiser().eval()
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(model, example_inputs(), dynamic_shapes=shapes)
    prepared = prepare_qat_pt2e(program.module(), TDQQuantizer(8, 8, first_last_bits=None))
    tdq.attach(prepared)
    for module in prepared.modules():
        if isinstance(module, TDQWeightFakeQuantize):
            module.disable_fake_quant()
    with tdq.calibration(prepared), torch.no_grad():
        x, _ = unet_inputs
        torch.testing.assert_close(prepared(x, 500), model(x, 500))
        steps = torch.tensor([3, 400, 999])
        x = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(prepared(x, steps), model(x, steps))


def test_further_inputs_keep_their_names():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, sigma, label=None, scale=None):
            return self.layer(sample + label) * sigma[:, None] * scale

    model = Conditional()
    example = {
        "sample": torch.ones(2, 4),
        "sigma": torch.tensor([1.0, 2.0]),
        "label": torch.ones(2, 4),
        "scale": torch.tensor(3.0),
    }
    graph = export(model, example, timestep_argument="sigma")
    arguments = {
        "sample": torch.randn(5, 4),
        "label": torch.randn(5, 4),
        "scale": torch.tensor(2.0),
    }
    expected = model(sigma=torch.tensor([7.0]), **arguments)
    torch.testing.assert_close(graph(sigma=7, **arguments), expected)


class Containers(nn.Module):
    """A condition in a container, and two results."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(4, 4), read

    def forward(self, sample, timestep, y):
        first, second = self.read(y)
        hidden = self.layer(sample + first) * timestep[:, None]
        return hidden, {"mean": hidden + second}


@pytest.mark.parametrize(
    ("contain", "read"),
    [
        (lambda a, b: {"embedding": a}, lambda y: (y["embedding"], 0)),
        (lambda a, b: [a], lambda y: (y[0], 0)),
        (lambda a, b: (a, b), lambda y: y),
        (
            lambda a, b: {"number": 3, "text": [a, {"mask": b}], "nothing": None},
            lambda y: (y["text"][0], y["text"][1]["mask"]),
        ),
    ],
    ids=["dictionary", "list", "tuple", "nested"],
)
def test_containers_of_tensors(contain, read):
    torch.manual_seed(0)
    model = Containers(read).eval()
    example = contain(torch.randn(2, 4), torch.randn(2, 4))
    graph = export(model, (torch.randn(2, 4), torch.tensor([1, 2]), example))
    call = torch.randn(3, 4), torch.tensor([5, 6, 7]), contain(*torch.randn(2, 3, 4))
    by_name = dict(zip(("sample", "timestep", "y"), call, strict=True))
    with torch.no_grad():
        expected = model(*call)
        torch.testing.assert_close(graph(*call), expected)
        torch.testing.assert_close(graph(**by_name), expected)
        prepared = tdq.attach(prepare_qat_pt2e(graph, TDQQuantizer(8, 8, first_last_bits=None)))
        tdq.calibrate(prepared, [by_name])
        quantized = prepared(*call)
    assert 0 < (quantized[0] - expected[0]).norm() < 0.03 * expected[0].norm()
    assert quantized[1].keys() == {"mean"}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_a_container_that_a_graph_cannot_take():
    example = torch.randn(2, 4), torch.tensor([1, 2]), Pair(torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(TraceError, match=r"'y' holds a tensor at \.first, .* dictionaries and seq"):
        export(Containers(lambda y: (y.first, y.second)).eval(), example)


def test_the_timesteps_of_other_samples(exported_unet):
    with pytest.raises(TimestepError, match="2 timesteps were given for 3 samples"):
        exported_unet(torch.zeros(3, 1, 8, 8), torch.tensor([1, 2]))


def test_a_single_example(unet):
    with pytest.raises(TraceError, match=r"one sample, .* Give two"):
        export(unet, (torch.zeros(1, 1, 8, 8), torch.tensor([1])))


def test_what_torch_cannot_export():
    class Sampling(nn.Module):
        def forward(self, sample, timestep):
            return sample * torch.nonzero(sample).shape[0] + self.batch(sample)

        def batch(self, sample):
            return torch.zeros(2, 4)

    with pytest.raises(
        TraceError, match=r"(?s)torch\.export cannot take Sampling: .*torch_ao adapter"
    ):
        export(Sampling(), (torch.ones(2, 4), torch.tensor([1, 2])))


@pytest.mark.parametrize("timestep", [torch.tensor(5), 5])
def test_an_export_with_one_timestep_for_all(timestep):
    program = torch.export.export(TinyDenoiser().eval(), (torch.zeros(2, 1, 8, 8), timestep))
    with pytest.raises(TraceError, match=r"one timestep per sample, shape \(B,\)"):
        prepare_qat_pt2e(program.module(), TDQQuantizer())


def test_a_graph_without_a_timestep():
    program = torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),))
    with pytest.raises(TimestepError, match=r"no argument 'timestep' or .*timestep_argument="):
        prepare_qat_pt2e(program.module(), TDQQuantizer())


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_training_mode_reaches_operators_and_modules(unet_inputs, copies):
    """Also in copies, as an average of the weights is one."""
    exported = export(one_level_unet(dropout=0.3).eval(), unet_inputs)
    model = tdq.attach(prepare_qat_pt2e(exported, TDQQuantizer(8, 8)))
    tdq.calibrate(model, [unet_inputs], samples=16)
    model.train()
    for _ in range(copies):
        model = copy.deepcopy(model)
    assert all(quantizer.training for _, quantizer in tdq.named_quantizers(model))
    assert not torch.equal(model(*unet_inputs), model(*unet_inputs)), "dropout is active"
    model.eval()
    assert not any(quantizer.training for _, quantizer in tdq.named_quantizers(model))
    assert torch.equal(model(*unet_inputs), model(*unet_inputs))
    model.train()
    assert not torch.equal(model(*unet_inputs), model(*unet_inputs))
