"""A Qwen-Image-Edit with random weights: every part of the published ones, small."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tests.shared.vl.qwen_models import ids
from tests.shared.vl.vocabularies import qwen

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# The beginning of the published template, which its pipeline drops as 64 tokens
SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then"
    " explain how the user's text instruction should alter or modify the image. Generate a new image that meets the"
    " user's requirements while maintaining consistency with the original input where appropriate."
)
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # of the published processor


def processor() -> Qwen2VLProcessor:
    """The published processor over a small vocabulary, in which words of the template are one token each."""
    tokenizer = qwen(f"{SYSTEM} user assistant Picture", pad_token="<|endoftext|>", extra_special_tokens=VISION)
    images = Qwen2VLImageProcessor(size=PIXELS)
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(size=PIXELS))


def build(folder: Path, *, zero_cond_t: bool = False) -> Path:
    """Saves the model as a folder of diffusers. Its VAE has 8 pixels per latent, as the published one.

    Args:
        folder: The folder.
        zero_cond_t: Whether it modulates references as 2511 does, not as 2509.
    """
    reader = processor()
    text = {"vocab_size": len(reader.tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    text |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}  # so that positions count
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    vision |= {"fullatt_block_indexes": [1], "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids(reader.tokenizer))
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 8),
            zero_cond_t=zero_cond_t,
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        # Without the fast waves of time, in which the rounding of 1000 t is seen
        time = transformer.time_text_embed.timestep_embedder.linear_1
        torch.nn.init.zeros_(time.weight.data.view(-1, 2, 128)[:, :, :64])
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 1.5, 0.5, 1.0],
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    QwenImageEditPlusPipeline(scheduler, vae, text_encoder, reader.tokenizer, reader, transformer).save_pretrained(
        folder
    )
    file = folder / "vae" / "config.json"  # the size of its images, which the published one leaves to the pipeline
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 64}))
    return folder
