"""Folders with the configs of full-size models, and without weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_mm.models.images.sdxl.checkpoint import CONFIGS, tokenizers
from tests.shared.images import tiny_flux2_klein as tiny_klein
from tests.shared.images import tiny_krea2, tiny_sd3, tiny_z_image
from tests.shared.images import tiny_qwen_image as tiny_qwen
from tests.shared.images import tiny_qwen_image_21 as tiny_qwen_21
from tests.shared.images import tiny_qwen_image_edit as tiny_qwen_edit

Z_IMAGE = {  # of Tongyi-MAI/Z-Image
    "transformer": {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2},
    "text_encoder": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "norm_num_groups": 32},
}
Z_IMAGE["transformer"] |= {"cap_feat_dim": 2560, "in_channels": 16, "axes_dims": [32, 48, 48]}
Z_IMAGE["transformer"] |= {"axes_lens": [1536, 512, 512]}
Z_IMAGE["vae"] |= {"layers_per_block": 2, "sample_size": 1024}


FLUX2_KLEIN = {  # of black-forest-labs/FLUX.2-klein-base-4B
    "transformer": {
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "timestep_guidance_channels": 256,
        "axes_dims_rope": [32, 32, 32, 32],
    },
    "text_encoder": Z_IMAGE["text_encoder"],
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 32,
        "norm_num_groups": 32,
        "layers_per_block": 2,
        "sample_size": 1024,
    },
}

QWEN_IMAGE = {
    "transformer": {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": {  # Qwen2.5-VL-7B
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "tie_word_embeddings": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
    },
    "vae": {"base_dim": 96, "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4], "sample_size": 1024},
}
QWEN_IMAGE["vae"] |= {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}

KREA2 = {  # of krea/Krea-2-Raw; its VAE is Qwen-Image's
    "transformer": {
        "in_channels": 64,
        "num_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "num_key_value_heads": 12,
        "intermediate_size": 16384,
        "timestep_embed_dim": 256,
        "text_hidden_dim": 2560,
        "num_text_layers": 12,
        "text_num_attention_heads": 20,
        "text_num_key_value_heads": 20,
        "text_intermediate_size": 6912,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": [32, 48, 48],
    },
    "text_encoder": {  # Qwen3-VL-4B
        "text_config": {
            **Z_IMAGE["text_encoder"],
            "max_position_embeddings": 262_144,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "vae": QWEN_IMAGE["vae"],
}


QWEN_IMAGE_21 = {  # its transformer and VAE have the defaults of their classes
    "transformer": {
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "context_in_dim": 4096,
        "mlp_ratio": 3,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": {  # Qwen3-VL-8B
        "text_config": {
            **KREA2["text_encoder"]["text_config"],
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **KREA2["text_encoder"]["vision_config"],
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "vae": {
        "base_dim": 96,
        "decoder_base_dim": 144,
        "z_dim": 64,
        "dim_mult": [1, 2, 4, 8, 8],
        "num_res_blocks": 2,
        "latents_mean": [0.0] * 64,
        "latents_std": [1.0] * 64,
        "sample_size": 1024,
    },
}


SD3 = {  # of stabilityai/stable-diffusion-3.5-medium
    "transformer": {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
    },
    "text_encoder": {  # CLIP-L
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {  # OpenCLIP bigG
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "text_encoder_3": {  # T5-XXL
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "latent_channels": 16,
        "sample_size": 1024,
    },
}


def sdxl(folder: Path) -> Path:
    """SDXL base 1.0."""
    shutil.copytree(CONFIGS, folder)
    for name, tokenizer in tokenizers().items():
        tokenizer.save_pretrained(folder / name)
    return folder


def z_image(folder: Path) -> Path:
    """Z-Image, with the tokenizer of a small one."""
    return _of_full_size(tiny_z_image.build(folder), Z_IMAGE)


def flux2_klein(folder: Path) -> Path:
    """FLUX.2 klein base 4B, with the tokenizer of a small one."""
    return _of_full_size(tiny_klein.build(folder), FLUX2_KLEIN)


def qwen_image(folder: Path) -> Path:
    """Qwen-Image, with the tokenizer of a small one."""
    return _of_full_size(tiny_qwen.build(folder), QWEN_IMAGE)


def qwen_image_edit(folder: Path) -> Path:
    """Qwen-Image-Edit 2511, with the processor of a small one."""
    return _of_full_size(tiny_qwen_edit.build(folder, zero_cond_t=True), QWEN_IMAGE)


def qwen_image_21(folder: Path) -> Path:
    """Qwen-Image-2.1, with the processor of a small one."""
    return _of_full_size(tiny_qwen_21.build(folder), QWEN_IMAGE_21)


def krea2(folder: Path) -> Path:
    """Krea 2, with the tokenizer of a small one."""
    tiny_krea2.build(folder)
    index = folder / "model_index.json"
    layers = list(range(2, 36, 3))  # the hidden states that it reads
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder_select_layers": layers}))
    return _of_full_size(folder, KREA2)


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3.5 medium, with the tokenizers of a small one."""
    return _of_full_size(tiny_sd3.build(folder), SD3)


def _of_full_size(folder: Path, sizes: Mapping[str, Mapping[str, Any]]) -> Path:
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for name, changes in sizes.items():
        file = folder / name / "config.json"
        values = json.loads(file.read_text()) | changes
        values.pop("layer_types", None)
        file.write_text(json.dumps(values))
    return folder


MAKERS = {
    "sdxl": sdxl,
    "z_image": z_image,
    "flux2_klein": flux2_klein,
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_21": qwen_image_21,
    "krea2": krea2,
    "sd3": sd3,
}
