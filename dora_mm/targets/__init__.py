"""The target maps by name, and the models that each is for: one file per architecture, one line here."""

import difflib
from collections.abc import Mapping
from typing import Any

from dora_mm.core.targets import TargetMap
from dora_mm.targets import (
    bart,
    blip,
    clip,
    decoders,
    fastvlm,
    florence2,
    flux,
    git,
    idefics3,
    llava,
    mllama,
    open_clip,
    qwen_image,
    qwen_vl,
    sd3,
    sdxl,
    t5,
    timm_vit,
    z_image,
)

MAPS: dict[str, TargetMap] = {
    "sdxl-unet": sdxl.UNET,
    "clip-text": clip.TEXT,
    "bart": bart.BART,
    "open-clip-visual": open_clip.VISUAL,
    "timm-vit": timm_vit.VIT,
    "llava": llava.LLAVA,
    "paligemma": llava.PALIGEMMA,
    "gemma3": llava.GEMMA3,
    "internvl": llava.INTERNVL,
    "fastvlm": fastvlm.FASTVLM,
    "qwen2-vl": qwen_vl.QWEN2_VL,
    "qwen3-vl": qwen_vl.QWEN3_VL,
    "idefics3": idefics3.IDEFICS3,
    "mllama": mllama.MLLAMA,
    "florence2": florence2.FLORENCE2,
    "blip": blip.BLIP,
    "blip-2": blip.BLIP2,
    "git": git.GIT,
    "llm": decoders.DECODER,
    "llm-moe": decoders.MIXTURE,
    "t5": t5.T5,
    "flux": flux.FLUX,
    "flux2": flux.FLUX2,
    "sd3": sd3.SD3,
    "qwen-image": qwen_image.QWEN_IMAGE,
    "z-image": z_image.Z_IMAGE,
}

MODELS: dict[str, str] = {  # the map of a model type of transformers, or of a class of diffusers
    "bart": "bart",
    "vl_bart": "bart",
    "clip_text_model": "clip-text",
    "llava": "llava",
    "llava_next": "llava",
    "llava_onevision": "llava",
    "vipllava": "llava",
    "paligemma": "paligemma",
    "gemma3": "gemma3",
    "internvl": "internvl",
    "fast_vlm": "fastvlm",
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2-vl",
    "qwen3_vl": "qwen3-vl",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "mllama": "mllama",
    "florence2": "florence2",
    "blip": "blip",
    "blip-2": "blip-2",
    "instructblip": "blip-2",
    "git": "git",
    **dict.fromkeys(decoders.MODEL_TYPES, "llm"),
    **dict.fromkeys(decoders.MIXTURES, "llm-moe"),
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "UNet2DConditionModel": "sdxl-unet",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen-image",
    "ZImageTransformer2DModel": "z-image",
}

SHORT_NAMES = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # for strengths of the UNets of diffusers


def find(name: str) -> TargetMap:
    """Returns the target map of this name, with all its parts.

    Raises:
        ValueError: There is none.
    """
    if name not in MAPS:
        raise ValueError(f"there is no target map {name!r}; there are {', '.join(MAPS)}")
    return MAPS[name]


def map_of(model: Any) -> TargetMap:
    """Returns the target map for a model of transformers or diffusers.

    Args:
        model: The model, its config, or what `config.json` contains. `model_type` decides for transformers, the name of
            the class for diffusers.

    Raises:
        ValueError: There is no map for it; the message has the nearest names.
    """
    config = getattr(model, "config", model)
    keys = ("model_type", "_class_name")
    told = [config.get(key) if isinstance(config, Mapping) else getattr(config, key, None) for key in keys]
    names = [str(name) for name in (*told, type(model).__name__) if name]
    found = next((MODELS[name] for name in names if name in MODELS), None)
    if found is None:
        close = difflib.get_close_matches(names[0], MODELS, n=3, cutoff=0.0)
        raise ValueError(f"there is no target map for {names[0]}; nearest: {', '.join(close)}")
    return MAPS[found]
