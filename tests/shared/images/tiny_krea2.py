"""A Krea 2 with random weights: every part of the published one, small."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.shared.vl.vocabularies import qwen


def build(folder: Path, *, is_distilled: bool = False) -> Path:
    """Saves the model as a folder of diffusers. Its VAE has 8 pixels per latent, as the published one."""
    tokenizer = qwen(pad_token="<|endoftext|>")
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 2048}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 24}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=24,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        )
        for name, parameter in transformer.named_parameters():  # which begin as zeros
            if "norm" in name or "scale_shift_table" in name:
                torch.nn.init.normal_(parameter, std=0.3)
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
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=6400
    )
    components = (scheduler, vae, text_encoder, tokenizer, transformer)
    pipe = Krea2Pipeline(*components, text_encoder_select_layers=(1, 2, 4), is_distilled=is_distilled)
    pipe.save_pretrained(folder)
    file = folder / "vae" / "config.json"  # the size of its images, which the published one leaves to the pipeline
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 64}))
    return folder
