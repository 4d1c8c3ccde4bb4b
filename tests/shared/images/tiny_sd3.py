"""A Stable Diffusion 3.5 with random weights: every part of the published medium one, small."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from dora_mm.models.images.sdxl.checkpoint import tokenizers
from dora_mm.models.images.sdxl.random_weights import LEGACY_IDS
from tests.shared.vl.vocabularies import SENTENCES

NUM_MERGES, WIDTHS = 200, (12, 20)  # of the CLIPs
SHIFTING = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4, "max_image_seq_len": 64}


def t5_tokenizer() -> T5TokenizerFast:
    """T5's own class, with the words and letters of a few sentences."""
    text = " ".join(SENTENCES)
    words = dict.fromkeys(f"▁{word}" for word in text.split())
    pieces = ["<pad>", "</s>", "<unk>", "▁", *sorted(set(text) - {" "}), *words]
    return T5TokenizerFast(vocab=[(piece, -float(index > 3)) for index, piece in enumerate(pieces)], extra_ids=0)


def text_encoders(clip_words: int, t5_words: int) -> list[torch.nn.Module]:
    """Both CLIPs and T5."""
    clips = [
        CLIPTextConfig(
            vocab_size=clip_words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            hidden_act=activation,
            **LEGACY_IDS,
        )
        for width, activation in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    t5 = T5Config(vocab_size=t5_words, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=2, is_decoder=False)
    return [*map(CLIPTextModelWithProjection, clips), T5EncoderModel(t5)]


def transformer() -> SD3Transformer2DModel:
    """With a second attention in the first block, as 3.5-medium has it in its first ones."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def vae() -> AutoencoderKL:
    """8 pixels per latent, as the published one."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build(folder: Path, *, uses_dynamic_shifting: bool = False) -> Path:
    """Saves the model as a folder of diffusers."""
    clips, t5 = tokenizers(NUM_MERGES), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second, third = text_encoders(len(clips["tokenizer"]), len(t5))
        denoiser, autoencoder = transformer(), vae()
    shifting = {"use_dynamic_shifting": True, **SHIFTING} if uses_dynamic_shifting else {"shift": 3.0}
    StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=autoencoder,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=third,
        tokenizer_3=t5,
        **clips,
    ).save_pretrained(folder)
    return folder
