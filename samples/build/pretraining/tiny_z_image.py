"""A small Z-Image: its own classes with a chat tokenizer and a text encoder of Qwen3, sized for a laptop's CPU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from dora_mm.models.images.components import Components
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.z_image import SHIFT_OF_BASE, ZImage
from samples.build.pretraining.tiny_flow import train_tokenizer

ROTARY_LENGTHS = [1024, 64, 64]  # places of prompt and picture one after the other, rows, columns: tables, no weights


def build_tiny_z_image(
    vae: Any,
    texts: Iterable[str],
    *,
    seed: int = 0,
    num_merges: int = 600,
    text_width: int = 64,
    width: int = 112,
    layers: int = 3,
    heads: int = 4,
) -> ZImage:
    """Builds the complete model around a VAE, with random weights.

    Args:
        vae: The VAE, whose config has a shift_factor.
        texts: What the tokenizer is trained on.
        seed: Of the weights.
        num_merges: Byte-pair merges of the tokenizer.
        text_width: Hidden size of the text encoder, in heads of 16.
        width: Hidden size of the transformer.
        layers: Those that read picture and prompt; the published model has two more for either alone, this one has one.
        heads: Attention heads of the transformer, whose size is divided among one axis of places and two of pixels.
    """
    tokenizer = train_tokenizer(texts, num_merges)
    of_pixels = width // heads // 3 // 2 * 2  # an even number, as that of places is
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(len(tokenizer), text_width)
        transformer = ZImageTransformer2DModel(
            in_channels=vae.config.latent_channels,
            dim=width,
            n_layers=layers,
            n_refiner_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=text_width,
            axes_dims=[width // heads - 2 * of_pixels, of_pixels, of_pixels],
            axes_lens=ROTARY_LENGTHS,
        )
        initialise(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT_OF_BASE)
    networks = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    return ZImage(Components.of(**networks, tokenizer=tokenizer, scheduler=scheduler))


def build_text_encoder(vocab_size: int, width: int) -> Qwen3Model:
    """Builds the text encoder; Z-Image reads what goes into its last layer, which is there and is not used."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            head_dim=16,
            max_position_embeddings=1024,
        )
    )


@torch.no_grad()
def initialise(transformer: Any) -> None:
    """Starts where every block leaves its input nearly as it is, and nothing is predicted yet."""
    for name, parameter in transformer.named_parameters():
        if "adaLN_modulation" in name or "all_final_layer" in name:
            parameter.mul_(0.1)
        elif name.endswith("pad_token"):
            parameter.normal_(std=0.02)  # left as memory has it


def encode(model: ZImage, captions: Sequence[str]) -> list[Prompt]:
    """Encodes a batch of captions with gradients, as `encode_prompts` does one by one without."""
    chats = [[{"role": "user", "content": caption}] for caption in captions]
    texts: Any = model.tokenizer.apply_chat_template(chats, tokenize=False, **model.chat)
    inputs = model.tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    states = model.text_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
    return [{"text": row[mask]} for row, mask in zip(states, inputs.attention_mask.bool(), strict=True)]
