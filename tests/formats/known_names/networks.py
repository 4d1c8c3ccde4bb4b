"""Tiny networks of the architectures, of diffusers' classes, with random weights; each builds in some milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

from dora_mm.formats.naming.names import Name


class Tiny(NamedTuple):
    """A pipeline, the class of its network, its sizes, and the text encoders of the pipeline that have names."""

    pipeline: str
    network: str
    sizes: dict[str, Any]
    text: tuple[str, ...] = ()


_HEADS = {"attention_head_dim": 4, "num_attention_heads": 2}
_IN_OUT = {"in_channels": 4, "out_channels": 4}
_UNET = {"sample_size": 8, "norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 8}
_SDXL = {
    **_UNET,
    "block_out_channels": (4, 4, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 28,
    "use_linear_projection": True,
}
_FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, **_HEADS, "joint_attention_dim": 8}
_WIDE = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}  # of Flux.1 and Chroma
TINY = {
    "sd1": Tiny(
        "StableDiffusionPipeline", "UNet2DConditionModel", {**_UNET, "block_out_channels": (4, 4, 4, 4)}, ("clip-l",)
    ),
    "sdxl": Tiny("StableDiffusionXLPipeline", "UNet2DConditionModel", _SDXL, ("clip-l", "clip-g")),
    "sd3": Tiny(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            **_IN_OUT,
            **_HEADS,
            "sample_size": 8,
            "num_layers": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        ("clip-l", "clip-g"),
    ),
    "flux": Tiny(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (2, 1, 1)},
        ("clip-l",),
    ),
    "chroma": Tiny(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "axes_dims_rope": (2, 1, 1),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
    ),
    "flux2": Tiny(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**_FLUX, "timestep_guidance_channels": 8, "axes_dims_rope": (1, 1, 1, 1)},
    ),
    "z-image": Tiny(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 8,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [2, 1, 1],
            "axes_lens": [8, 8, 8],
        },
    ),
    "qwen-image": Tiny(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            **_IN_OUT,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_layers": 1,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        },
    ),
    "krea2": Tiny(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 12,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 1, 1),
        },
    ),
    "wan": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        {
            **_IN_OUT,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 8,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "image_dim": 8,
            "added_kv_proj_dim": 24,
        },
    ),
    "hunyuan-video": Tiny(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {
            **_IN_OUT,
            **_HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 8,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 1, 1),
        },
    ),
}


def component_of(architecture: str) -> str:
    """The component of its network."""
    return "unet" if "UNet" in TINY[architecture].network else "transformer"


def build(architecture: str) -> nn.Module:
    """The network, the same each time."""
    torch.manual_seed(0)
    tiny = TINY[architecture]
    return getattr(diffusers, tiny.network)(**tiny.sizes).requires_grad_(False)


def build_text() -> nn.Module:
    """A text encoder, of one layer and with the projection that some have."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=8, bos_token_id=0, eos_token_id=1, max_position_embeddings=8, projection_dim=8, **sizes
    )
    return transformers.CLIPTextModelWithProjection(config).requires_grad_(False)


@cache
def network_of(architecture: str) -> nn.Module:
    """The network, to be read."""
    return build(architecture)


@cache
def wide(architecture: str) -> nn.Module:
    """The same of the width that a model of it has, without values: some converters know no other one."""
    sizes = {**TINY[architecture].sizes, **_WIDE}
    with torch.device("meta"):
        return getattr(diffusers, TINY[architecture].network)(**sizes)


@cache
def text_encoder() -> nn.Module:
    """The text encoder, to be read."""
    return build_text()


def pipeline_of(architecture: str) -> Any:
    """The class of its pipeline."""
    return getattr(diffusers, TINY[architecture].pipeline)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Its linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def weights_of(architecture: str, model: nn.Module) -> dict[Name, torch.Tensor]:
    """W0 by name."""
    component = component_of(architecture)
    return {Name(component, path): layer.weight.data for path, layer in layers_of(model).items()}  # type: ignore
