"""What ComfyUI and Forge read: the key maps that their own functions make of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.formats.known_names import stubs
from tests.formats.known_names.cases import TEXT_PREFIXES, Case, paths_of
from tests.formats.known_names.networks import TINY

_UNET = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 1}
CONFIGS: Mapping[str, dict[str, Any]] = {  # of the networks of networks.py
    "sd1": {
        **_UNET,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {**_UNET, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_output": [0, 0, 0, *[1] * 6]},
    "sd3": {"depth": 2, "num_blocks": 2},
    "flux": {"depth": 1, "depth_single_blocks": 1, "hidden_size": 8},
    "z-image": {"n_layers": 1, "n_refiner_layers": 1, "dim": 8},
    "qwen-image": {"num_layers": 1},
    "krea2": {"layers": 1},
    "wan": {},
    "hunyuan-video": {"depth": 1, "depth_single_blocks": 1, "hidden_size": 8},
}
CONFIGS = {**CONFIGS, "chroma": CONFIGS["flux"], "flux2": CONFIGS["flux"]}
_MODELS = {
    "sd1": "BaseModel",
    "sdxl": "SDXL",
    "sd3": "SD3",
    "flux": "Flux",
    "chroma": "Chroma",
    "flux2": "Flux2",
    "z-image": "Lumina2",
    "qwen-image": "QwenImage",
    "krea2": "Krea2",
    "wan": "WAN21",
    "hunyuan-video": "HunyuanVideo",
}
_FORGE = {  # what it calls the repositories of the models that it knows
    "sd1": "runwayml/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
    "chroma": "Chroma",
}


def _own(architecture: str) -> list[str]:
    """The weights of a checkpoint in the authors' names."""
    return [f"{path}.weight" for path in paths_of(Case(architecture, "", "own"))]


def _text(architecture: str) -> list[str]:
    """The weights of its text encoders."""
    layouts = TINY[architecture].text
    cases = {layout: Case(architecture, TEXT_PREFIXES[layout][0], "clip") for layout in layouts}
    prefixes = {"clip-l": "clip_l.transformer.", "clip-g": "clip_g.transformer."}
    return [f"{prefixes[layout]}{path}.weight" for layout, case in cases.items() for path in paths_of(case)]


def _known(case: Case, paths: Collection[str], key_map: Mapping[str, Any], weights: Collection[str]) -> set[str]:
    """The paths whose key stands for a weight of the model."""
    found = set()
    for path in paths:
        target = key_map.get(case.key(path).removesuffix("_lora"))
        if (target if isinstance(target, str) or target is None else target[0]) in weights:
            found.add(path)
    return found


class ComfyUI:
    """Its loader.

    Args:
        checkout: A checkout of ComfyUI.
    """

    def __init__(self, checkout: Path):
        read = ("comfy.lora", "comfy.utils", "comfy.supported_models", "comfy.supported_models_base")
        stubs.use(checkout, stubbed=("comfy", "comfy_aimdo", "comfy_api", "comfy_kitchen"), read=read)
        import comfy.lora  # type: ignore
        import comfy.model_base  # type: ignore

        self.lora = comfy.lora
        self.classes = stubs.classes_of(checkout / "comfy" / "model_base.py")
        vars(comfy.model_base).update(self.classes)

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        architecture = case.architecture
        model = self.classes[_MODELS[architecture]]()
        weights = [f"diffusion_model.{key}" for key in self._weights(architecture)]
        model.state_dict = lambda: dict.fromkeys(weights, SimpleNamespace(shape=(16, 8)))  # type: ignore
        model.model_config = SimpleNamespace(unet_config=CONFIGS[architecture])  # type: ignore
        clip = _text(architecture)
        text = SimpleNamespace(state_dict=lambda: dict.fromkeys(clip))
        key_map = {**self.lora.model_lora_keys_unet(model, {}), **self.lora.model_lora_keys_clip(text, {})}
        return _known(case, paths, key_map, {*weights, *clip})

    def _weights(self, architecture: str) -> list[str]:
        """The weights of its own network, from those of a checkpoint, which it renames in part."""
        found = _own(architecture)
        if architecture != "hunyuan-video":
            return found
        from comfy.supported_models import HunyuanVideo  # type: ignore

        return list(HunyuanVideo.process_unet_state_dict(None, dict.fromkeys(found)))  # type: ignore


class Forge:
    """Its loader.

    Args:
        checkout: A checkout of Forge.
    """

    def __init__(self, checkout: Path):
        packages = ("backend", "modules", "packages_3rdparty")
        stubs.use(checkout, stubbed=packages, read=("backend.patcher.lora", "packages_3rdparty"))
        import backend.patcher.lora  # type: ignore

        self.lora = backend.patcher.lora

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        architecture = case.architecture
        if architecture not in _FORGE:
            return set()
        weights = [f"diffusion_model.{key}" for key in _own(architecture)]
        model = SimpleNamespace(
            state_dict=lambda: dict.fromkeys(weights),
            diffusion_model=SimpleNamespace(config=CONFIGS[architecture]),
            config=SimpleNamespace(huggingface_repo=_FORGE[architecture]),
        )
        clip = _text(architecture)
        text = SimpleNamespace(state_dict=lambda: dict.fromkeys(clip))
        key_map = {**self.lora.model_lora_keys_unet(model, {}), **self.lora.model_lora_keys_clip(text, {})}
        return _known(case, paths, key_map, {*weights, *clip})
