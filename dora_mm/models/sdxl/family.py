"""SDXL: its parts, and loading them from a folder, a single file or the hub. No other file loads them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dora_mm.config.loader import resolve_model
from dora_mm.config.models import ModelConfig
from dora_mm.models import hub
from dora_mm.models.hub import unreachable

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# What diffusers raises for files that are missing, damaged or belong to another kind of model.
LOADING_ERRORS = (OSError, KeyError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError)


@dataclass
class SDXL:
    """The parts of one SDXL model, named as in diffusers."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    scheduler: EulerDiscreteScheduler

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The UNet, the VAE and both text encoders, by name."""
        return {name: getattr(self, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The networks that can be adapted: all but the VAE."""
        return {name: network for name, network in self.networks.items() if name != "vae"}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def resolution(self) -> int:
        """Side, in pixels, of the images that the UNet was trained on."""
        return config_of(self.unet).sample_size * self.downscale

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(config_of(self.vae).block_out_channels) - 1)

    def to(self, device: torch.device | str) -> "SDXL":
        """Moves all networks to `device`; returns self."""
        for network in self.networks.values():
            network.to(device)
        return self

    def freeze(self) -> "SDXL":
        """Turns gradients off and eval mode on in all networks; returns self."""
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        return self

    def pipeline(self) -> StableDiffusionXLPipeline:
        """A diffusers pipeline that shares these parts (no copies)."""
        pipe = StableDiffusionXLPipeline(
            **{name: getattr(self, name) for name in PARTS},
            force_zeros_for_empty_prompt=True,  # as SDXL base sets it
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def config_of(network: nn.Module) -> Any:
    """The config of a diffusers network, typed as Any: it is annotated as a dict but read by attribute."""
    return network.config


def load_configured(config: ModelConfig) -> SDXL:
    """Loads the model that a config's `model` section names: frozen, in the configured dtype, on the CPU.

    Raises:
        ValueError: The model or its VAE does not exist or is incomplete, or a local model has a revision; the message
            names the key.
    """
    path = resolve_model(config.path)
    if config.revision and Path(path).exists():
        raise ValueError(f"model.revision: {path} is not a model of the hub, so it has no revisions: leave it out.")
    vae = resolve_model(config.vae, "model.vae") if config.vae else None
    return load_sdxl(path, dtype=getattr(torch, config.dtype), vae=vae, revision=config.revision).freeze()


def load_sdxl(
    path: str, *, dtype: torch.dtype = torch.float32, vae: str | None = None, revision: str | None = None
) -> SDXL:
    """Loads SDXL from a diffusers folder, a single `.safetensors` checkpoint, or a hub name.

    Args:
        path: An existing folder or file; anything else of the form `owner/name` is a hub name. A single checkpoint
            holds no configs and no tokenizers: diffusers downloads them from the hub once.
        dtype: The dtype of all networks.
        vae: Another VAE (folder or hub name) that replaces the model's own, such as the fp16-fix one.
        revision: A commit, branch or tag of a hub model; None is its main branch.

    Returns:
        The model on the CPU, not frozen.

    Raises:
        ValueError: There is no model at `path`, or a part of it is missing or cannot be loaded.
    """
    local = Path(path)
    if local.is_dir():
        _check_parts(local)
    elif local.is_file() and local.suffix != ".safetensors":
        raise ValueError(f"The model {path} does not end in .safetensors: convert it first.")
    elif not local.is_file() and not _is_hub_name(path):
        raise ValueError(f"There is no model at {path}: name a folder, a .safetensors file or a hub repository.")
    try:
        if local.is_file():
            pipe = StableDiffusionXLPipeline.from_single_file(str(local), dtype=dtype, add_watermarker=False)
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                path, revision=revision, dtype=dtype, add_watermarker=False, use_safetensors=True
            )
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        name = f"{path} (revision {revision})" if revision else path
        raise ValueError(unreachable(name, error) or f"The model {name} cannot be loaded: {reason}") from error
    if vae is not None:
        pipe.vae = load_vae(vae, dtype)
    return SDXL(**{field.name: getattr(pipe, field.name) for field in fields(SDXL)})


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit of a hub model as it was loaded, from the hub's cache on this machine.

    Args:
        path: What `load_sdxl` loaded.
        revision: The revision that it loaded.

    Returns:
        The commit's hash; None for a local folder or file, and for a model that is not in the cache.
    """
    return hub.commit_of(path, "model_index.json", revision) if _is_hub_name(path) else None


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Loads a VAE from a folder or a hub name, frozen and in eval mode.

    Raises:
        ValueError: There is no VAE, or it cannot be loaded.
    """
    try:
        vae = AutoencoderKL.from_pretrained(str(path), dtype=dtype, use_safetensors=True)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(unreachable(str(path), error) or f"The VAE {path} cannot be loaded: {reason}") from error
    return vae.requires_grad_(False).eval()


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")


def _check_parts(folder: Path) -> None:
    missing = [part for part in PARTS if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing == list(PARTS):
        raise ValueError(f"{folder} is not an SDXL model: it contains none of the folders {', '.join(PARTS)}.")
    if not (folder / "model_index.json").is_file():
        missing.append("model_index.json")
    if missing:
        raise ValueError(f"The model {folder} is incomplete: it lacks {', '.join(missing)}.")
