"""A Z-Image with random weights: every part of the published one, small, with a vocabulary of some 450 tokens."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from samples.build.pretraining.tiny_flow import TEMPLATE
from tests.shared.vl.vocabularies import qwen


def build(folder: Path, *, is_distilled: bool = False) -> Path:
    """Saves the model as a folder of diffusers. Its VAE has 8 pixels per latent, as the published one."""
    tokenizer = qwen(pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=12,
                max_position_embeddings=1024,
            )
        )
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 4, 8],
            axes_lens=[600, 64, 64],
        )
        for parameter in transformer.parameters():  # where a fresh one has zeros, a trained one has none
            if not parameter.any():
                parameter.data.normal_(std=0.05)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if is_distilled else 6.0)
    ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder
