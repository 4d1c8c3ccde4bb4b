"""A small SDXL with random weights: every part and special case of the architecture, sized for a laptop's CPU."""

# pyright: reportArgumentType=false
# diffusers annotates tuples of any length as tuples of one, transformers tuples as strings.

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dora_mm.models.images.components import Components
from dora_mm.models.images.sdxl.checkpoint import tokenizers
from dora_mm.models.images.sdxl.family import SDXL

MAX_TOKENS = 40  # captions have at most 34; SDXL's 77 would make every training step a tenth slower
TIME_ID_WIDTH = 16  # of each of the six micro-conditioning numbers
# CLIP's legacy ids, as SDXL's own configs carry them: pooling then takes the highest id, which is END, the last one.
LEGACY_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def build_text_encoders(
    vocab_size: int, widths: tuple[int, int], depths: tuple[int, int], heads: tuple[int, int]
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Builds both text encoders, which differ as SDXL's do: in width, depth, activation and projection.

    Args:
        vocab_size: Tokens of the vocabulary.
        widths: Hidden size of each encoder.
        depths: Number of layers of each encoder.
        heads: Attention heads of each encoder.
    """
    configs = [
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            projection_dim=width,
            max_position_embeddings=MAX_TOKENS,
            hidden_act=activation,
            **LEGACY_IDS,
        )
        for width, depth, num_heads, activation in zip(widths, depths, heads, ("quick_gelu", "gelu"), strict=True)
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def build_vae(resolution: int, channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """Builds the VAE.

    Args:
        resolution: Side of the images in pixels.
        channels: Channels of each level; each level after the first halves the side.
        latent_channels: Channels of the latents.
    """
    levels = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=resolution,
        shift_factor=0.0,  # which Z-Image reads, too
        force_upcast=True,
    )


def build_unet(
    latent_size: int,
    latent_channels: int,
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    text_widths: tuple[int, int],
    layers_per_block: int = 2,
) -> UNet2DConditionModel:
    """Builds the UNet as SDXL's: three levels, attention on the lower two, transformers of depth 1 and 2.

    Args:
        latent_size: Side of the latents.
        latent_channels: Channels of the latents.
        channels: Channels of each level.
        heads: Attention heads of each level.
        text_widths: Hidden size of each text encoder.
        layers_per_block: The number of residual blocks of each level on the way down; SDXL's is 2.
    """
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=layers_per_block,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=heads,  # diffusers' name; these are numbers of heads
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(text_widths),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + text_widths[1],
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """Builds the scheduler: SDXL's betas, rescaled to zero terminal SNR, with v-prediction.

    SDXL's last step leaves a signal 1/214 as strong as the noise (in variance; Lin et al. 2023, arXiv 2305.08891). With
    16 x 16 latents its mean is still visible: the model took colours and composition of an image from the noise, not
    from the text. At zero SNR epsilon says nothing about the image, so the UNet predicts v.
    """
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_tiny_sdxl(
    *,
    seed: int = 0,
    resolution: int = 128,
    num_merges: int = 2000,
    vae_channels: tuple[int, ...] = (16, 32, 64, 64),
    latent_channels: int = 8,
    unet_channels: tuple[int, int, int] = (48, 96, 128),
    unet_heads: tuple[int, int, int] = (1, 2, 4),
    unet_layers: int = 2,
    text_widths: tuple[int, int] = (64, 96),
    text_depths: tuple[int, int] = (3, 4),
    text_heads: tuple[int, int] = (2, 4),
) -> SDXL:
    """Builds the complete model, with random weights drawn from `seed`; sizes as for the functions above."""
    both = tokenizers(num_merges, MAX_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, text_encoder_2 = build_text_encoders(len(both["tokenizer"]), text_widths, text_depths, text_heads)
        vae = build_vae(resolution, vae_channels, latent_channels)
        latent_size = resolution // 2 ** (len(vae_channels) - 1)
        unet = build_unet(latent_size, latent_channels, unet_channels, unet_heads, text_widths, unet_layers)
    components = Components.of(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        **both,
        scheduler=build_scheduler(),
    )
    return SDXL(components)


def build_example() -> SDXL:
    """Builds the model of `dora-mm example`: images of 128 x 128 pixels, 6 MB."""
    return build_tiny_sdxl(
        num_merges=300,
        vae_channels=(8, 8, 16, 16),
        latent_channels=4,  # as in SDXL
        unet_channels=(16, 32, 64),
        unet_layers=1,
        text_widths=(16, 32),
    )
