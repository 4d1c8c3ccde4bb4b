"""A small FLUX.2 klein: its own classes with a chat tokenizer and a text encoder of Qwen3, sized for a laptop's CPU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from dora_mm.config.models import Flux2KleinConfig
from dora_mm.models.images.components import Components
from dora_mm.models.images.flux2_klein import Flux2Klein
from dora_mm.models.images.image_model import Prompt
from samples.build.pretraining.tiny_flow import train_tokenizer

READ_LAYERS = (9, 18, 27)  # whose outputs the pipeline reads, and so the least number of layers
TEXT_HEAD = 16
THINKING = ("<think>", "</think>")
ROTARY_BASE = 32  # tells 8 rows apart


def build_tiny_klein(
    vae: AutoencoderKLFlux2,
    texts: Iterable[str],
    *,
    seed: int = 0,
    num_merges: int = 600,
    max_tokens: int = 40,
    text_width: int = 32,
    width: int = 72,
    layers: int = 1,
    single_layers: int = 4,
    heads: int = 3,
    mlp_ratio: float = 2.0,
) -> Flux2Klein:
    """Builds the complete model around a VAE, with random weights.

    Args:
        vae: The VAE, with the mean and variance of its patches' channels.
        texts: What the tokenizer is trained on.
        seed: Of the weights.
        num_merges: Byte-pair merges of the tokenizer.
        max_tokens: The length that prompts are filled up to.
        text_width: Hidden size of the text encoder.
        width: Hidden size of the transformer.
        layers: Those with a stream for the picture and one for the prompt.
        single_layers: Those with one stream for both.
        heads: Attention heads of the transformer.
        mlp_ratio: Hidden size of its feed-forward layers, by its own.
    """
    tokenizer = train_tokenizer([*texts, "\n\n"], num_merges, THINKING)
    head = width // heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(len(tokenizer), text_width)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * vae.config["latent_channels"],
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=len(READ_LAYERS) * text_width,
            timestep_guidance_channels=64,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=rotary_sizes(head),
            rope_theta=ROTARY_BASE,
            guidance_embeds=False,
        )
        initialise(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    networks = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    components = Components.of(**networks, tokenizer=tokenizer, scheduler=scheduler)
    return Flux2Klein(components, Flux2KleinConfig(max_tokens=max_tokens))


def build_text_encoder(vocab_size: int, width: int) -> Qwen3ForCausalLM:
    """Builds a text encoder that is deep, since the pipeline reads three of its layers, and narrow."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=width // 2,
            num_hidden_layers=max(READ_LAYERS),
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=TEXT_HEAD,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def rotary_sizes(head: int) -> tuple[int, int, int, int]:
    """The shares of a head, a multiple of 4 from 12, for times, rows, columns and places in the prompt."""
    of_pixels = 2 * round(0.15 * head)
    others = head // 2 - of_pixels
    return others, of_pixels, of_pixels, others


@torch.no_grad()
def initialise(transformer: Any) -> None:
    """Starts where every block leaves its input nearly as it is, and nothing is predicted yet."""
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("norm_out", "proj_out")):
            parameter.mul_(0.1)


def encode(model: Flux2Klein, captions: Sequence[str]) -> list[Prompt]:
    """Encodes a batch of captions with gradients, as `encode_prompts` does one by one without."""
    found = model.pipeline_class()._get_qwen3_prompt_embeds(
        model.text_encoder, model.tokenizer, list(captions), max_sequence_length=model.settings.max_tokens
    )
    return [{"text": row} for row in found]
