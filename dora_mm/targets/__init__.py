"""The target maps by name, and the models that each is for: one file per architecture, one line here.

Other models of transformers, those of vision and language above all, get a map from their structure (derived.py).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from dora_mm.core.targets import TargetMap
from dora_mm.targets import (
    bart,
    clip,
    decoders,
    derived,
    flux,
    krea2,
    open_clip,
    qwen_image,
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
    "llm": decoders.DECODER,
    "llm-moe": decoders.MIXTURE,
    "t5": t5.T5,
    "flux": flux.FLUX,
    "flux2": flux.FLUX2,
    "sd3": sd3.SD3,
    "qwen-image": qwen_image.QWEN_IMAGE,
    "krea2": krea2.KREA2,
    "z-image": z_image.Z_IMAGE,
}

MODELS: dict[str, str] = {  # the map of a model type of transformers, or of a class of diffusers
    "bart": "bart",
    "vl_bart": "bart",
    "clip_text_model": "clip-text",
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
    "Krea2Transformer2DModel": "krea2",
    "ZImageTransformer2DModel": "z-image",
}

DERIVED = (  # names that stand for the map which a model's structure gives
    *(derived.NAME, "llava", "paligemma", "gemma3", "internvl", "fastvlm", "qwen2-vl", "qwen3-vl", "idefics3"),
    *("mllama", "florence2", "blip", "blip-2", "git"),
)

SHORT_NAMES = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # for strengths of the UNets of diffusers


def find(name: str, model: nn.Module | None = None) -> TargetMap:
    """Returns the target map of this name, with all its parts.

    Args:
        name: The name.
        model: The model that it is for, without which names of DERIVED have no map.

    Raises:
        ValueError: There is none, or none can be derived for the model.
    """
    if name in DERIVED:
        if model is None:
            raise ValueError(f"the map {name} is derived from a model, and there is none")
        return derived.derive(model)
    if name not in MAPS:
        raise ValueError(f"there is no target map {name!r}; there are {', '.join((*MAPS, *DERIVED))}")
    return MAPS[name]


def map_of(model: Any) -> TargetMap:
    """Returns the target map for a model of transformers or diffusers, derived if its class has none of its own.

    Args:
        model: The model, which may be on the meta device; or its config, or what `config.json` contains, which is
            enough for classes with a map. `model_type` decides for transformers, the name of the class for diffusers.

    Raises:
        ValueError: There is no map for it, and none can be derived; the message has the nearest names.
    """
    config = getattr(model, "config", model)
    keys = ("model_type", "_class_name")
    names_in_config = [config.get(key) if isinstance(config, Mapping) else getattr(config, key, None) for key in keys]
    names = [str(name) for name in (*names_in_config, type(model).__name__) if name]
    found = next((MODELS[name] for name in names if name in MODELS), None)
    if found is not None:
        return MAPS[found]
    if isinstance(model, nn.Module) and names_in_config[0]:
        return derived.derive(model)
    close = difflib.get_close_matches(names[0], MODELS, n=3, cutoff=0.0)
    raise ValueError(f"there is no target map for {names[0]}; nearest: {', '.join(close)}")
