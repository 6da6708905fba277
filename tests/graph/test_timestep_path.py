"""Which values of a graph depend on the sample, on conditions and on the timestep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdq_plugin.graph import trace
from tdq_plugin.graph.timestep_path import Source, sees_samples, sources


class Conditioned(nn.Module):
    """What every variant below does with its three inputs, whatever their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project, self.mix = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def predict(self, image: Tensor, label: Tensor, timestep: Tensor) -> Tensor:
        embedded = self.embed(timestep.float().reshape(-1, 1))
        moved = image + embedded
        return self.mix(moved) + self.project(embedded + label)


class SampleFirst(Conditioned):
    def forward(self, image: Tensor, label: Tensor, timestep: Tensor) -> Tensor:
        return self.predict(image, label, timestep)


class LabelFirst(Conditioned):
    def forward(self, label: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return self.predict(x, label, timestep)


class TimestepFirst(Conditioned):
    def forward(self, timestep: Tensor, label: Tensor, latents: Tensor) -> Tensor:
        return self.predict(latents, label, timestep)


def depends(model: nn.Module, *inputs: Any) -> Callable[[str], Source]:
    graph = trace(model, inputs).graph
    found = sources(graph)
    (output,) = graph.find_nodes(op="output")
    assert found[output] == Source.SAMPLE | Source.CONDITION | Source.TIMESTEP
    return lambda layer: next(found[n] for n in graph.nodes if n.target == layer)


@pytest.mark.parametrize("kind", [SampleFirst, LabelFirst, TimestepFirst])
def test_the_sample_is_found_by_its_name_or_is_the_first(kind: type[Conditioned]) -> None:
    tensor, t = torch.randn(2, 4), torch.tensor([1, 2])
    inputs = (t, tensor, tensor) if kind is TimestepFirst else (tensor, tensor, t)
    of = depends(kind(), *inputs)
    assert of("embed") == Source.TIMESTEP
    assert of("project") == Source.TIMESTEP | Source.CONDITION
    assert of("mix") == Source.TIMESTEP | Source.SAMPLE
    quantized = [layer for layer in ("embed", "project", "mix") if sees_samples(of(layer))]
    assert quantized == ["mix"]
