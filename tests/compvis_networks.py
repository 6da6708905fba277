"""Networks that compute what CompVis' latent-diffusion does, under its names of layers.

Written anew from the facts of `openaimodel.py`, `model.py` and `ema.py` in
github.com/CompVis/latent-diffusion, for the options that its LDM-8 of LSUN churches uses.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["LatentDiffusion"]


def unet_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-5)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class UNetResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, resize: str = "") -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.in_layers = nn.Sequential(unet_norm(inputs), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * outputs))
        convolution = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(unet_norm(outputs), nn.SiLU(), nn.Dropout(0.0), convolution)
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)
        self.resize = resize

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resize else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resized(x)) + h


class UNetAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = unet_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.heads = heads

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        flat = x.flatten(2)
        batch, channels, length = flat.shape
        width = channels // self.heads
        joint = self.qkv(self.norm(flat)).reshape(batch * self.heads, 3 * width, length)
        q, k, v = joint[:, :width], joint[:, width : 2 * width], joint[:, 2 * width :]
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(width), dim=-1)
        attended = (v @ weights.transpose(1, 2)).reshape(batch, channels, length)
        return x + self.proj_out(attended).reshape(x.shape)


class Stage(nn.Sequential):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, time)
        return x


class UNet(nn.Module):
    def __init__(
        self, latent: int, width: int, multiples: tuple[int, ...], attention: int, heads: int
    ) -> None:
        super().__init__()
        time, self.width = 4 * width, width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        stages, skipped, channels = [Stage(nn.Conv2d(latent, width, 3, padding=1))], [width], width
        for level, multiple in enumerate(multiples):
            for _ in range(2):
                layers = [UNetResidual(channels, multiple * width, time)]
                channels = multiple * width
                if level < attention:
                    layers.append(UNetAttention(channels, heads))
                stages.append(Stage(*layers))
                skipped.append(channels)
            if level < len(multiples) - 1:
                stages.append(Stage(UNetResidual(channels, channels, time, "down")))
                skipped.append(channels)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(
            UNetResidual(channels, channels, time),
            UNetAttention(channels, heads),
            UNetResidual(channels, channels, time),
        )
        stages = []
        for level, multiple in reversed(list(enumerate(multiples))):
            for index in range(3):
                layers = [UNetResidual(channels + skipped.pop(), multiple * width, time)]
                channels = multiple * width
                if level < attention:
                    layers.append(UNetAttention(channels, heads))
                if level and index == 2:
                    layers.append(UNetResidual(channels, channels, time, "up"))
                stages.append(Stage(*layers))
        self.output_blocks = nn.ModuleList(stages)
        last = nn.Conv2d(width, latent, 3, padding=1)
        self.out = nn.Sequential(unet_norm(channels), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x))
        skipped = []
        for stage in self.input_blocks:
            x = stage(x, time)
            skipped.append(x)
        x = self.middle_block(x, time)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skipped.pop()], dim=1), time)
        return self.out(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class Half(nn.Module):
    """The middle and the end of the encoder and of the decoder."""

    def add_middle(self, channels: int) -> None:
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (Residual(channels, channels) for _ in range(2))
        self.mid.attn_1 = Attention(channels)

    def add_end(self, inputs: int, outputs: int) -> None:
        self.norm_out, self.conv_out = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def end(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x)))


class Encoder(Half):
    def __init__(self, latent: int, widths: list[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            down = nn.Module()
            down.block = nn.ModuleList([Residual(channels, width), Residual(width, width)])
            channels = width
            if level < len(widths) - 1:
                down.downsample = nn.Module()
                down.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(down)
        self.add_middle(channels)
        self.add_end(channels, 2 * latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                x = block(x)
            if hasattr(down, "downsample"):
                x = down.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.end(self.middle(x))


class Decoder(Half):
    def __init__(self, latent: int, widths: list[int]) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent, channels, 3, padding=1)
        self.add_middle(channels)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            up = nn.Module()
            up.block = nn.ModuleList(
                [Residual(channels, width), Residual(width, width), Residual(width, width)]
            )
            channels = width
            if level:
                up.upsample = nn.Module()
                up.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.insert(0, up)
        self.add_end(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for up in reversed(self.up):
            for block in up.block:
                x = block(x)
            if hasattr(up, "upsample"):
                x = up.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.end(x)


class FirstStage(nn.Module):
    def __init__(self, latent: int, widths: list[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(latent, widths), Decoder(latent, widths)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log variance."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class LatentDiffusion(nn.Module):
    """The defaults are those of the LDM-8 of LSUN churches."""

    def __init__(
        self,
        width: int = 192,
        multiples: tuple[int, ...] = (1, 2, 2, 4, 4),
        attention: int = 4,
        heads: int = 8,
        widths: tuple[int, ...] = (128, 256, 512, 512),
    ) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = UNet(4, width, multiples, attention, heads)
        self.first_stage_model = FirstStage(4, list(widths))
        betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        self.register_buffer("scale_factor", torch.tensor(0.25))

    def checkpoint(self, average: "LatentDiffusion | None" = None) -> dict[str, Tensor]:
        """The state dict, with the UNet of `average` as CompVis keeps moving averages."""
        state = dict(self.state_dict())
        if average is not None:
            for name, parameter in average.model.named_parameters():
                state["model_ema." + name.replace(".", "")] = parameter.detach()
            state["model_ema.decay"] = torch.tensor(0.9999)
            state["model_ema.num_updates"] = torch.tensor(7)
        return state
