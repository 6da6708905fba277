"""CompVis' LDM-8 of LSUN churches as diffusers networks, with random weights.

Source: `models/ldm/lsun_churches256/config.yaml` of github.com/CompVis/latent-diffusion. Load
trained weights into these networks and save the pipeline for the recipes; or save it as it is to
see what a run needs.
"""

from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

from tdq_plugin.recipes.float_model import set_attention_heads

__all__ = ["ATTENTION_HEADS", "churches_pipeline"]

ATTENTION_HEADS = 8


def churches_pipeline() -> LDMPipeline:
    """The pipeline: images 256x256, latents 4x32x32."""
    return LDMPipeline(_autoencoder(), _unet(), _scheduler())


def _unet() -> UNet2DModel:
    """Attention down to 4x4, residual blocks that resize, the time embedding scales and shifts."""
    attention = ("AttnDownBlock2D", "AttnUpBlock2D")
    unet = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(192, 384, 384, 768, 768),
        down_block_types=(*4 * attention[:1], "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", *4 * attention[1:]),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=192 // ATTENTION_HEADS,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
    )
    set_attention_heads(unet, ATTENTION_HEADS)
    return unet


def _autoencoder() -> AutoencoderKL:
    """KL-regularized, one eighth of the size; its scaling factor comes with its weights."""
    return AutoencoderKL(
        sample_size=256,
        latent_channels=4,
        layers_per_block=2,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
    )


def _scheduler() -> DDIMScheduler:
    """CompVis' `linear` schedule is linear in the square root; its samplers start one step late."""
    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0155,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
