"""What AUTOMATIC1111 and SD.Next read: the modules for which their own loaders find a key in a file."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from dora_mm.formats.naming.names import Name, owners, underscored
from tests.formats.known_names import stubs
from tests.formats.known_names.cases import Case, file_of, layout_of, paths_of, put
from tests.formats.known_names.networks import TINY, component_of, network_of, text_encoder, wide

_SDNEXT = {  # what it calls the models that it loads adapters of by its own code; those of others it hands to diffusers
    "sd1": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "f1",
    "flux2": "f2",
    "chroma": "chroma",
    "z-image": "zimage",
    "krea2": "krea2",
}
_OWN_NAMES = ("krea2",)  # of which its network has the authors' names


def _in_own_names(architecture: str) -> nn.Module:
    """A network of layers under the authors' names."""
    found, tiny = nn.Module(), network_of(architecture)
    for path, group in paths_of(Case(architecture, "", "own")).items():
        put(found, path, tiny.get_submodule(group.names[0].path))
    return found


class Automatic1111:
    """Its loader.

    Args:
        checkout: A checkout of the web UI.
    """

    def __init__(self, checkout: Path):
        stubs.use(checkout, "extensions-builtin/Lora", "", stubbed=("modules", "gradio", "lora_patches"), read=())
        import networks  # type: ignore
        from modules import devices, sd_models, shared  # type: ignore
        from modules.models.sd3 import mmdit  # type: ignore

        devices.cpu, devices.dtype = torch.device("cpu"), torch.float32

        mmdit.QkvLinear = type("QkvLinear", (nn.Linear,), {})  # none of the layers is one

        self.networks, self.shared, self.sd_models = networks, shared, sd_models

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        architecture = case.architecture
        if architecture not in ("sd1", "sdxl", "sd3"):
            return set()
        self.shared.sd_model = self._model(architecture)
        self.networks.assign_network_names_to_compvis_modules(self.shared.sd_model)
        return {path for path in paths if self._reads(case, path, form)}

    def _reads(self, case: Case, path: str, form: str) -> bool:
        tensors, _ = file_of(case, form, [path])
        self.sd_models.read_state_dict = lambda name: tensors
        with suppress(AssertionError):  # it has the name of a module that can have no adapter
            return bool(self.networks.load_network("a", SimpleNamespace(filename=__file__)).modules)
        return False

    def _model(self, architecture: str) -> SimpleNamespace:
        """Its model, of layers under the authors' names."""
        network = nn.Module()
        network.diffusion_model = _in_own_names(architecture)
        encoders = [nn.Module(), nn.Module()]
        put(encoders[0], "transformer", text_encoder())
        for path in ("attn", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"):
            layer = nn.MultiheadAttention(8, 2) if path == "attn" else nn.Linear(8, 8)
            put(encoders[1], f"model.transformer.resblocks.0.{path}", layer)
        found = SimpleNamespace(model=network, is_sdxl=architecture == "sdxl")
        if found.is_sdxl:
            found.conditioner = SimpleNamespace(embedders=[SimpleNamespace(wrapped=encoder) for encoder in encoders])
        else:
            found.cond_stage_model = SimpleNamespace(wrapped=encoders[0], named_modules=encoders[0].named_modules)
        return found


class SDNext:
    """Its loader.

    Args:
        checkout: A checkout of SD.Next.
    """

    forms = ("down alpha", "A")
    raises = True

    def __init__(self, checkout: Path):
        own = ("pipelines.z_image.zimage_lora", "pipelines.flux.flux2_lora", "pipelines.chroma.chroma_lora")
        own += ("pipelines.krea2.krea2_lora",)
        stubs.use(checkout, stubbed=("modules", "pipelines"), read=("modules.lora", *own))
        from modules import devices, sd_models, shared  # type: ignore

        devices.cpu, devices.dtype = torch.device("cpu"), torch.float32
        from modules.lora import lora_load, native_adapter  # type: ignore

        self.load, self.shared, self.sd_models, self.adapter = lora_load, shared, sd_models, native_adapter

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        architecture = case.architecture
        if architecture not in _SDNEXT:
            return set()
        network = (wide if architecture in ("flux", "chroma") else network_of)(architecture)
        tensors, _ = file_of(case, form, paths, None if case.names == "clip" else network)
        network = _in_own_names(architecture) if architecture in _OWN_NAMES else network
        parts = {component_of(architecture): network}
        texts = zip(("text_encoder", "text_encoder_2"), TINY[architecture].text, strict=False)
        self.shared.sd_model = SimpleNamespace(**parts, **{name: text_encoder() for name, _ in texts})
        self.shared.sd_model_type = _SDNEXT[architecture]
        self.shared.sd_loaded = True
        self.sd_models.read_state_dict = self.adapter.read_state_dict = lambda *args, **named: dict(tensors)
        self.load.lora_cache.clear()
        found = None
        with suppress(ValueError, AssertionError, KeyError, RuntimeError, IndexError):
            found = self.load.load_safetensors("a", SimpleNamespace(filename=__file__))
        keys = set(found.modules) if found else set()
        groups = paths_of(case)
        return {path for path in paths if keys >= {self._key(case, name) for name in groups[path].names}}

    def _key(self, case: Case, name: Name) -> str:
        """What it calls a module."""
        path = owners(case.architecture)[name] if case.architecture in _OWN_NAMES else name.path
        if case.names != "clip":
            return f"lora_{component_of(case.architecture)}_{underscored(path)}"
        first = "lora_te1_" if len(TINY[case.architecture].text) > 1 else "lora_te_"
        prefix = first if layout_of(case) == "clip-l" else "lora_te2_"
        flat = underscored(path)
        names = dict(text_encoder().named_modules())
        return prefix + (flat if path in names else flat.removeprefix("text_model_"))
