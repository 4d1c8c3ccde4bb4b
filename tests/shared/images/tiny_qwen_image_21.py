"""A Qwen-Image-2.1 with random weights: every part of the published one, small."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.shared.vl.qwen_models import IMAGE, ids
from tests.shared.vl.templates import chatml
from tests.shared.vl.vocabularies import qwen

TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def processor_of_images(least: int = 32 * 32) -> Qwen3VLProcessor:
    """The processor of Qwen3-VL over a small vocabulary; images have at least so many pixels."""
    pixels = {"size": {"shortest_edge": least, "longest_edge": 4096 * 4096}, "patch_size": 16}
    images = Qwen2VLImageProcessor(**pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tokenizer = qwen(pad_token="<|endoftext|>", extra_special_tokens=TOKENS)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**pixels), chat_template=chatml(IMAGE))


def build(folder: Path, *, causal_condition: bool = True, sample_sigmas: list[float] | None = None) -> Path:
    """Saves the model as a folder of diffusers. Its VAE has 16 pixels per latent and RGBA, as the published one."""
    processor = processor_of_images()
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 2048}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids(processor.tokenizer))
        text_encoder = Qwen3VLForConditionalGeneration(config)
        torch.nn.init.uniform_(text_encoder.model.language_model.norm.weight, 0.2, 3.0)
        transformer = QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=24,
            mlp_ratio=2,
            axes_dims_rope=(4, 6, 6),
            causal_condition=causal_condition,
        )
        for parameter in transformer.parameters():  # so that text and positions count
            torch.nn.init.normal_(parameter, std=0.2)
        # Without the fast waves of time, in which the rounding of 1000 t is seen
        time = transformer.time_text_embed.timestep_embedder.linear_1
        torch.nn.init.zeros_(time.weight.data.view(-1, 2, 128)[:, :, :64])
        vae = AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1 * (channel % 5 - 2) for channel in range(16)],
            latents_std=[0.5 + 0.25 * (channel % 4) for channel in range(16)],
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=6400
    )
    QwenImage21Pipeline(scheduler, vae, text_encoder, processor, transformer, sample_sigmas).save_pretrained(folder)
    file = folder / "vae" / "config.json"  # the size of its images, which the published one leaves to the pipeline
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 64}))
    return folder
