import copy

import pytest
import torch

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.errors import AdapterError
from tdq_plugin.reconstruct import ReconstructionConfig, reconstruct


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
