"""The real icons that the judge is fitted on, and pixels to pictures and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_mm.eval.images.concepts import Concept
from dora_mm.models.sdxl.loading import SDXL
from samples.build.pretraining.icons import to_signed


def read_icon_concepts(folder: Path) -> list[Concept]:
    """The concepts of a folder that `python -m samples.build icons` made, with split and role.

    Raises:
        ValueError: the folder holds no icons.
    """
    listing = folder / "concepts.json"
    if not listing.is_file():
        raise ValueError(f"icons: {folder} holds no concepts.json; python -m samples.build icons draws the icons")
    return [Concept(**row) for row in json.loads(listing.read_text(encoding="utf-8"))]


def icon_paths(folder: Path, style: str, concepts: Sequence[Concept]) -> list[Path]:
    """One file per concept. Raises ValueError naming the first that is missing."""
    paths = [folder / style / f"{concept.code}.webp" for concept in concepts]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"icons: {len(missing)} pictures are missing, the first is {missing[0]}; run python -m samples.build icons"
        )
    return paths


def decode(model: SDXL, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents as the VAE itself gives them (not normalised for the UNet)."""
    vae: Any = model.vae
    dtype, upcast = vae.dtype, vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.float()
    pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample.float()
    if upcast:
        vae.to(dtype)
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


def signed(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return to_signed(torch.from_numpy(np.array([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2))
