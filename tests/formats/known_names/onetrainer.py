"""What OneTrainer reads: the modules of its models that its own loader finds for the keys of a file."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.formats.known_names import stubs
from tests.formats.known_names.cases import Case, file_of, layout_of, paths_of
from tests.formats.known_names.networks import component_of, layers_of, network_of, text_encoder

_MODELS = {  # the class of the model, the module of its loader, and the type
    "sd1": ("StableDiffusionModel", "stableDiffusion.StableDiffusionLoRALoader", "STABLE_DIFFUSION_15"),
    "sdxl": ("StableDiffusionXLModel", "stableDiffusionXL.StableDiffusionXLLoRALoader", "STABLE_DIFFUSION_XL_10_BASE"),
    "sd3": ("StableDiffusion3Model", "stableDiffusion3.StableDiffusion3LoRALoader", "STABLE_DIFFUSION_3"),
    "flux": ("FluxModel", "flux.FluxLoRALoader", "FLUX_DEV_1"),
    "flux2": ("Flux2Model", "Flux2ModelLoader", "FLUX_2"),
    "chroma": ("ChromaModel", "chroma.ChromaLoRALoader", "CHROMA_1"),
    "z-image": ("ZImageModel", "ZImageModelLoader", "Z_IMAGE"),
    "qwen-image": ("QwenModel", "qwen.QwenLoRALoader", "QWEN"),
    "krea2": ("Krea2Model", "krea2.Krea2LoRALoader", "KREA_2"),
    "hunyuan-video": ("HunyuanVideoModel", "hunyuanVideo.HunyuanVideoLoRALoader", "HUNYUAN_VIDEO"),
}


class OneTrainer:
    """Its loader.

    Args:
        checkout: A checkout of OneTrainer.
    """

    layers_alone = True
    forms = ("down alpha", "A")
    raises = True

    def __init__(self, checkout: Path):
        read = ("modules.model", "modules.modelLoader", "modules.util")
        stubs.use(checkout, stubbed=("modules", "mgds"), read=read)
        self.types = import_module("modules.util.enum.ModelType").ModelType
        self.loading = import_module("modules.util.load_lora_util")

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        if case.architecture not in _MODELS:
            return set()
        name, module, kind = _MODELS[case.architecture]
        model = self._model(name, case.architecture, getattr(self.types, kind))
        loaders = vars(import_module(f"modules.modelLoader.{module}"))
        mixin = import_module("modules.modelLoader.mixin.LoRALoaderMixin").LoRALoaderMixin
        loader = next(each for each in loaders.values() if isinstance(each, type) and mixin in each.__mro__[1:])
        tensors, _ = file_of(case, form, paths)
        found: Collection[str] = ()
        with suppress(Exception):  # whatever it raises, it loads nothing
            found = loader._to_canonical(object.__new__(loader), model, dict(tensors))
        layers = set(layers_of(network_of(case.architecture)))
        fused = self.loading.collapse_fusion_groups(layers, model.fusion_groups()) - layers
        groups = paths_of(case)
        return {path for path in paths if self._takes(case, [each.path for each in groups[path].names], found, fused)}

    def _takes(self, case: Case, names: list[str], found: Collection[str], fused: Collection[str]) -> bool:
        """Whether modules have a key, or the module that it fuses them to."""
        texts = {"clip-l": "text_encoder", "clip-g": "text_encoder_2"}
        prefix = texts[layout_of(case)] if case.names == "clip" else component_of(case.architecture)
        if len(names) > 1:  # of one block; of its two attentions, one is of the text
            block = ".".join(names[0].split(".")[:2])
            same = [name for name in fused if name.startswith(f"{block}.") and ("add" in name) == ("add" in names[0])]
            return any(key.startswith(f"{prefix}.{name}.") for key in found for name in same)
        shorter = names[0].removeprefix("text_model.") if case.names == "clip" else names[0]
        return any(key.startswith((f"{prefix}.{names[0]}.", f"{prefix}.{shorter}.")) for key in found)

    def _model(self, name: str, architecture: str, kind: object) -> Any:
        """Its model, with the tiny network."""
        cls = getattr(import_module(f"modules.model.{name}"), name)
        model = object.__new__(cls)
        encoders = dict.fromkeys(("text_encoder", "text_encoder_1", "text_encoder_2", "text_encoder_3"), text_encoder())
        vars(model).update({component_of(architecture): network_of(architecture), "model_type": kind, **encoders})
        return model
