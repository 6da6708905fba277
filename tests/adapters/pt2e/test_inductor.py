"""Inductor takes folded scales for static quantization: its own kernels, at every timestep."""

import pytest
import torch
from contract.networks import STEPS
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, convert, export


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Linear(32, 4)

    def forward(self, sample, timestep):
        hidden = self.second(nn.functional.silu(self.first(sample)))
        return self.last(nn.functional.silu(hidden).flatten(2).transpose(1, 2))


@pytest.mark.slow
@torch.no_grad()
def test_folded_convolutions_and_linear_layers_are_int8():
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    exported = export(Convolutions(), (x, torch.arange(4)))
    model = tdq.attach(prepare_qat_pt2e(exported, TDQQuantizer(8, 8))).eval()
    tdq.calibrate(model, [(x * (1 + t / 500), t) for t in STEPS])
    folded = convert(tdq.freeze(model, STEPS), fold_scales=True)
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(folded)
        for step in STEPS:
            t = torch.tensor([step])
            torch.testing.assert_close(compiled(x, t), model(x, t), rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["qconv_weight_prepack_matcher_count"] == 2
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 1
