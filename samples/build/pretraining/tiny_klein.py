"""A small FLUX.2 klein: its own classes with a chat tokenizer and a text encoder of Qwen3, sized for a laptop's CPU."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from dora_mm.config.models import Flux2KleinConfig
from dora_mm.models.images.components import Components
from dora_mm.models.images.flux2_klein import Flux2Klein
from dora_mm.models.images.image_model import Prompt
from samples.build.pretraining import tiny_flow

READ_LAYERS = (9, 18, 27)  # whose outputs the pipeline reads, and so the least number of layers
TEXT_HEAD = 16
THINKING = ("<think>", "</think>")
# Of times, rows, columns and places in the prompt: shares of a head in fifths, and a base that tells 8 rows apart
ROTARY_FIFTHS = (1, 1.5, 1.5, 1)
ROTARY_BASE = 32
VAE_WEIGHTS = "diffusion_pytorch_model"


def build_tiny_klein(
    vae: AutoencoderKLFlux2,
    texts: Iterable[str],
    *,
    seed: int = 0,
    num_merges: int = 600,
    max_tokens: int = 32,
    text_width: int = 48,
    width: int = 80,
    layers: int = 1,
    single_layers: int = 4,
    heads: int = 4,
    mlp_ratio: float = 2.0,
) -> Flux2Klein:
    """Builds the complete model around a VAE, with random weights.

    Args:
        vae: The VAE, with the statistics of its latents.
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
    tokenizer = tiny_flow.train_tokenizer([*texts, "\n\n"], num_merges, THINKING)
    head = width // heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(len(tokenizer), text_width)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * vae.config.latent_channels,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=len(READ_LAYERS) * text_width,
            timestep_guidance_channels=64,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=tuple(int(head / 5 * share) for share in ROTARY_FIFTHS),
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


def as_klein_vae(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """The same VAE in klein's class, whose statistics are those of no latents yet."""
    known = AutoencoderKLFlux2._get_init_keys(AutoencoderKLFlux2)
    found = AutoencoderKLFlux2(**{key: value for key, value in vae.config.items() if key in known and key[0] != "_"})
    found.load_state_dict({**found.state_dict(), **vae.state_dict()})
    return found.requires_grad_(False).eval()


@torch.no_grad()
def count_latents(model: Flux2Klein, latents: Tensor) -> None:
    """Sets the statistics of the VAE to those of latents (N, C, h, w), as the VAE gives them."""
    patches = model.pipeline_class()._patchify_latents(latents)
    model.vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    model.vae.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))


def save(model: Flux2Klein, folder: Path) -> None:
    """Saves a folder of diffusers with fp16 weights that is loaded in float32.

    The VAE has two files of weights: its statistics, and what the VAE that it was made of has.
    """
    tiny_flow.save(model, folder)
    weights = model.vae.state_dict()
    parts = [{}, {}]
    for name, tensor in weights.items():
        parts[not name.startswith("bn.")][name] = tensor.contiguous()
    parts[1] = {name: tensor.half() for name, tensor in parts[1].items()}
    files = [f"{VAE_WEIGHTS}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        save_file(part, folder / "vae" / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for part in parts for tensor in part.values())},
        "weight_map": {name: file for part, file in zip(parts, files, strict=True) for name in part},
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / "vae" / f"{VAE_WEIGHTS}.safetensors.index.json").write_text(text, encoding="utf-8")
