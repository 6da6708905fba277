"""Small diffusion models for the contract tests."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BATCHES", "STEPS", "TinyDenoiser", "TokensFirst", "ValueFirst", "example_inputs"]

STEPS = (0, 100, 250, 600, 999)


class TinyDenoiser(nn.Module):
    """Convolutions, linear layers, a time embedding and, if wanted, attention."""

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        self.attention = attention
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.time_embedding = nn.Linear(4, 8)
        self.conv_down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.to_query = nn.Linear(8, 8)
        self.to_token = nn.Linear(8, 8)
        self.conv_1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep])
        angle = timestep.reshape(-1, 1) / torch.tensor([1000.0, 200.0])
        embedding = self.time_embedding(torch.cat([angle.sin(), angle.cos()], dim=1))
        hidden = self.conv_in(sample).tanh() * (1 + embedding.square())[:, :, None, None]
        hidden = self.conv_down(functional.silu(hidden))
        tokens = functional.silu(hidden).flatten(2).transpose(1, 2)
        if self.attention:
            query = self.to_query(tokens)
            keys, values = _heads(tokens), _heads(self.to_token(tokens).tanh())
            weights = torch.matmul(_heads(query), keys.transpose(1, 2)).softmax(-1)
            tokens = _merge_heads(weights @ values)
        else:
            tokens = self.to_token(self.to_query(tokens).tanh()).tanh()
        hidden = self.conv_1d(tokens.transpose(1, 2)).reshape(hidden.shape)
        return functional.pixel_shuffle(self.conv_out(functional.silu(hidden)), 2)


class TokensFirst(nn.Module):
    """A layer in the middle sees `(length, batch, features)`, the others the samples first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.first(sample[:, 0]) * (1 + timestep.reshape(-1, 1, 1) / 1000)
        return self.last(self.middle(hidden.transpose(0, 1).tanh()).transpose(0, 1))[:, None]


class ValueFirst(nn.Module):
    """Attention whose value is computed before query and key, and read after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.value, self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep])
        hidden = self.first(sample[:, 0]) * (1 + timestep / 1000).reshape(-1, 1, 1)
        value = self.value(hidden) * 5
        query, key = self.query(hidden), self.key(hidden)
        weights = torch.matmul(query, key.transpose(1, 2)).softmax(-1)
        return self.last(weights.matmul(value))[:, None]


def _heads(tokens: Tensor) -> Tensor:
    """From (B, N, C) to (B * 2, N, C / 2), the samples' heads side by side."""
    return tokens.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


def _merge_heads(tokens: Tensor) -> Tensor:
    return tokens.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


def example_inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 1, 8, 8), torch.tensor([10, 20])


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator) * (1 + step / 500), torch.full((8,), step))
        for step in STEPS
    ]


BATCHES = _batches()
