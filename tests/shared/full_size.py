"""The UNet of SDXL at its full size with random weights, to test and measure on."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dora_mm.models.images.sdxl.checkpoint import CONFIGS
from dora_mm.utils.json_text import read_json

FULL_SIZE = {k: v for k, v in read_json(CONFIGS / "unet/config.json").items() if k != "_class_name"}
# The same architecture with four attention blocks, where only the code matters and not the numbers.
SMALL_SIZE = FULL_SIZE | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def random_unet(
    device: torch.device, dtype: torch.dtype, *, side: int, checkpointing: bool, size: dict = FULL_SIZE
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Builds a frozen UNet with random weights and one batch for it.

    Args:
        device: Where it is built.
        dtype: The dtype of its weights and of the batch.
        side: The side of the image in pixels.
        checkpointing: Whether the backward pass computes activations again.
        size: FULL_SIZE or SMALL_SIZE.

    Returns:
        The UNet, and a function that computes a loss of one image.
    """
    from diffusers import UNet2DConditionModel

    pooled = size["projection_class_embeddings_input_dim"] - 6 * size["addition_time_embed_dim"]
    with torch.device(device):
        unet = UNet2DConditionModel(**size).requires_grad_(False)
        nn.Module.to(unet, dtype)  # diffusers' own `to` warns of modules to keep in fp32, of which there are none
        conditions = {
            "encoder_hidden_states": torch.randn(1, 77, size["cross_attention_dim"], dtype=dtype),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(1, pooled, dtype=dtype),
                "time_ids": torch.tensor([[side, side, 0, 0, side, side]], dtype=dtype),
            },
        }
        latents = torch.randn(1, 4, side // 8, side // 8, dtype=dtype)
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    return unet, lambda: unet(latents, 500, **conditions).sample.float().square().mean()


def full_size_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL_SIZE)
