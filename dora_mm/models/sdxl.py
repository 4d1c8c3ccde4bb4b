"""SDXL: load it from wherever it lies, and encode what it is conditioned on. No other file does either."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# What diffusers raises for files that are missing, damaged or of another kind of model.
LOADING_ERRORS = (OSError, KeyError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError)


# stabilityai/stable-diffusion-xl-base-1.0/unet/config.json, where it differs from the class's defaults
FULL_SIZE = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class SDXL:
    """The parts of one SDXL model, under the names that diffusers gives them."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    scheduler: EulerDiscreteScheduler

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that it was trained on."""
        return config_of(self.unet).sample_size * self.downscale

    @property
    def downscale(self) -> int:
        """Pixels to a latent, per side."""
        return 2 ** (len(config_of(self.vae).block_out_channels) - 1)

    def to(self, device: torch.device | str) -> "SDXL":
        for network in self.networks.values():
            network.to(device)
        return self

    def freeze(self) -> "SDXL":
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        return self

    def pipeline(self) -> StableDiffusionXLPipeline:
        """diffusers' pipeline over these very parts."""
        pipe = StableDiffusionXLPipeline(
            **{name: getattr(self, name) for name in PARTS},
            force_zeros_for_empty_prompt=True,  # SDXL base's own setting
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def config_of(network: nn.Module) -> Any:
    """A diffusers config, which is annotated as a dictionary and read by attributes."""
    return network.config


def load_sdxl(path: str, *, dtype: torch.dtype = torch.float32, vae: str | None = None) -> SDXL:
    """Loads SDXL from a diffusers folder, a single `.safetensors` checkpoint, or a hub name.

    Args:
        path: a folder or file that exists is taken as such; anything else of the form `owner/name` is a hub name. A
            single checkpoint holds no configs and no tokenizers: diffusers fetches them from the hub, once.
        vae: another VAE (folder or hub name) in place of the model's own, such as the fp16-fix one.

    Raises:
        ValueError: nothing is there, or a part is missing.
    """
    local = Path(path)
    if local.is_dir():
        _check_parts(local)
    elif local.is_file() and local.suffix != ".safetensors":
        raise ValueError(f"The model {path} is a file that does not end in .safetensors: convert it first.")
    elif not local.is_file() and not _is_hub_name(path):
        raise ValueError(f"There is no model at {path}: give a folder, a .safetensors file or a hub name.")
    try:
        if local.is_file():
            pipe = StableDiffusionXLPipeline.from_single_file(str(local), dtype=dtype, add_watermarker=False)
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                path, dtype=dtype, add_watermarker=False, use_safetensors=True
            )
        if vae is not None:
            pipe.vae = load_vae(vae, dtype)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The model {path} cannot be loaded: {reason}") from error
    return SDXL(**{field.name: getattr(pipe, field.name) for field in fields(SDXL)})


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE in a folder or at a hub name, frozen.

    Raises:
        ValueError: there is none.
    """
    try:
        vae = AutoencoderKL.from_pretrained(str(path), dtype=dtype, use_safetensors=True)
    except LOADING_ERRORS as error:
        raise ValueError(f"The VAE {path} cannot be loaded: {' '.join(str(error).split())}") from error
    return vae.requires_grad_(False).eval()


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")


def _check_parts(folder: Path) -> None:
    missing = [part for part in PARTS if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing == list(PARTS):
        raise ValueError(f"{folder} is not an SDXL model: it has none of the folders {', '.join(PARTS)}.")
    if not (folder / "model_index.json").is_file():
        missing.append("model_index.json")
    if missing:
        raise ValueError(f"The model {folder} is incomplete: it lacks {', '.join(missing)}.")


# --- text ------------------------------------------------------------------------------------------------------------


def tokenize(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) for either encoder, each padded in its own way; L is the tokenizer's length, 77 in SDXL."""
    one, two = (
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (model.tokenizer, model.tokenizer_2)
    )
    return one, two


def over_long(model: SDXL, prompts: Sequence[str]) -> dict[str, int]:
    """The prompts that do not fit the text encoders, with their numbers of tokens; what is too much is cut off."""
    counts = {prompt: len(model.tokenizer(prompt).input_ids) for prompt in prompts}
    return {prompt: count for prompt, count in counts.items() if count > model.tokenizer.model_max_length}


def encode_tokens(model: SDXL, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (B, L, D1 + D2) and pooled embedding (B, P).

    The embeddings are both encoders' penultimate hidden states side by side; the pooled one is encoder 2's alone.
    """
    one = model.text_encoder(ids.to(model.device), output_hidden_states=True)
    two = model.text_encoder_2(ids_2.to(model.device), output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def encode_prompts(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_tokens`, from text."""
    return encode_tokens(model, *tokenize(model, prompts))


# --- sizes -----------------------------------------------------------------------------------------------------------


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> torch.Tensor:
    """Micro-conditioning (6,): (h, w) before resizing, the crop's corner in the resized picture, the target."""
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)


# --- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(model: SDXL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (B, C, h, w), float32, of the VAE's posterior for pixels (B, 3, H, W) in [-1, 1].

    SDXL's own VAE overflows in fp16 and says so in its config (`force_upcast`); it then runs in float32. Autocast would
    undo that, so it is off in here.
    """
    vae: Any = model.vae  # diffusers annotates its results as tuples
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.float()
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    if upcast:
        vae.to(dtype)
    return posterior.mean.float(), posterior.logvar.float()


def draw_latents(
    vae: AutoencoderKL, mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """A sample of the posterior in the units that the UNet works in; its mean without a generator."""
    latents = mean
    if generator is not None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    return normalize_latents(vae, latents)


def normalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) * scaling_factor / std, where the VAE's config gives mean and std per channel."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    return latents * config_of(vae).scaling_factor


def denormalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The inverse: what the VAE decodes."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    latents = latents / config_of(vae).scaling_factor
    return latents * std + mean if mean is not None and std is not None else latents


def _per_channel(vae: AutoencoderKL, name: str, like: torch.Tensor) -> torch.Tensor | None:
    values: Any = getattr(vae.config, name, None)
    return None if values is None else torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
