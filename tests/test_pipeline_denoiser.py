"""Graphs and int8 models in diffusers pipelines."""

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import one_level_unet
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping

STEPS = 4


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.fixture(scope="module")
def int8(scheduler: DDIMScheduler) -> fx.GraphModule:
    example = (torch.randn(2, 1, 8, 8), torch.tensor([50, 900]))
    graph = tdq.trace(one_level_unet(), example)
    mapping = tdq_qconfig_mapping(graph, activation_bits=8, weight_bits=8)
    prepared = prepare_qat_fx(graph.train(), mapping, example, backend_config=tdq_backend_config())
    tdq.attach(prepared)
    tdq.calibrate(prepared, [(torch.randn(4, 1, 8, 8), torch.arange(4) * 250)])
    return tdq.lower_to_int8(tdq.freeze(prepared.eval(), scheduler))


def images(unet: nn.Module, scheduler: DDIMScheduler) -> Tensor:
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(0)
    made = pipeline(
        batch_size=2, generator=start, num_inference_steps=STEPS, output_type="np"
    ).images
    return torch.from_numpy(made)


def by_hand(model: Any, scheduler: DDIMScheduler) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_an_int8_model_samples_in_a_pipeline(int8: Any, scheduler: DDIMScheduler) -> None:
    unet = one_level_unet()
    made = images(tdq.PipelineDenoiser(int8, unet.config), scheduler)
    assert torch.equal(made, by_hand(int8, scheduler))
    assert not torch.equal(made, images(unet.eval(), scheduler))


def test_a_corrected_model_does_too_in_both_orders(int8: Any, scheduler: DDIMScheduler) -> None:
    timesteps = scheduler.timesteps.sort().values.float()
    gains = torch.full((STEPS, 1), 0.5)
    correction = tdq.OutputCorrection(timesteps, gains, gains, torch.ones(STEPS, 1, 8, 8))
    config, corrected = one_level_unet().config, tdq.CorrectedDenoiser(int8, correction)
    expected = by_hand(corrected, scheduler)
    around = tdq.PipelineDenoiser(corrected, config)
    within = tdq.CorrectedDenoiser(tdq.PipelineDenoiser(int8, config), correction)
    assert torch.equal(images(around, scheduler), expected)
    assert torch.equal(images(within, scheduler), expected)


class Conditioned(nn.Module):
    """Notes the inputs by name that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.given: dict[str, Any] = {}

    def forward(self, sample: Tensor, timestep: Any, **inputs: Any) -> tuple[Tensor, None]:
        self.given = inputs
        return sample * 2, None


def test_inputs_go_by_name_and_outputs_come_in_either_form() -> None:
    model = Conditioned()
    denoiser = tdq.PipelineDenoiser(model, {"sample_size": 8, "in_channels": 4})
    x = torch.randn(2, 4, 8, 8)
    (output,) = denoiser(x, 10, return_dict=False, encoder_hidden_states=x, added_cond_kwargs=None)
    assert torch.equal(output, 2 * x)
    assert list(model.given) == ["encoder_hidden_states"]
    assert torch.equal(denoiser(x, 10).sample, 2 * x)
    assert denoiser.config.in_channels == 4
    assert (denoiser.dtype, denoiser.device.type) == (torch.bfloat16, "cpu")
