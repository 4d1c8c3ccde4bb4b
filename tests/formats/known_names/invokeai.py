"""What InvokeAI reads: the layers that its own loader makes of a file, and finds in its model."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from dora_mm.formats.naming.names import Name, owners
from tests.formats.known_names import stubs
from tests.formats.known_names.cases import Case, file_of, paths_of, put
from tests.formats.known_names.networks import network_of, text_encoder

_BASES = {
    "sd1": "StableDiffusion1",
    "sdxl": "StableDiffusionXL",
    "flux": "Flux",
    "flux2": "Flux2",
    "z-image": "ZImage",
    "qwen-image": "QwenImage",
    "krea2": "Krea2",
    "wan": "Wan",
}


class InvokeAI:
    """Its loader.

    Args:
        checkout: A checkout of InvokeAI.
    """

    forms = ("down alpha", "A", "A alpha")
    raises = True

    def __init__(self, checkout: Path):
        backend = "invokeai.backend"
        load = f"{backend}.model_manager.load"
        read = (f"{backend}.patches", f"{backend}.raw_model", f"{backend}.model_manager.taxonomy")
        stubs.use(checkout, stubbed=("invokeai", "onnxruntime"), read=read)
        import_module(f"{load}.load_default").ModelLoader = object
        registry = SimpleNamespace(register=lambda **named: lambda kind: kind)
        import_module(f"{load}.model_loader_registry").ModelLoaderRegistry = registry
        self.taxonomy = import_module(f"{backend}.model_manager.taxonomy")
        self.lora = stubs.module_at(checkout / "invokeai/backend/model_manager/load/model_loaders/lora.py")
        self.patcher = import_module(f"{backend}.patches.layer_patcher").LayerPatcher

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        architecture = case.architecture
        if architecture not in _BASES:
            return set()
        tensors, _ = file_of(case, form, paths)
        loader = self.lora.LoRALoader.__new__(self.lora.LoRALoader)
        loader._model_base = getattr(self.taxonomy.BaseModelType, _BASES[architecture])
        loader._torch_dtype = None
        self.lora.load_file = lambda *args, **named: dict(tensors)
        config = SimpleNamespace(
            path="a.safetensors", format=self.taxonomy.ModelFormat.LyCORIS, base=loader._model_base
        )
        layers: Collection[str] = ()
        with suppress(ValueError, AssertionError, KeyError, NotImplementedError, IndexError):
            layers = loader._load_model(config).layers
        found = {name for key in layers for name in [self._module(case, key)] if name}
        groups = paths_of(case)
        return {path for path in paths if found >= {self._path(case, name) for name in groups[path].names}}

    def _module(self, case: Case, key: str) -> str:
        """The path of the module that a layer is for; empty where there is none."""
        model = text_encoder() if case.names == "clip" else self._network(case.architecture)
        flat = "." not in key and "-" not in key
        start = next(
            (each for each in ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_") if key.startswith(each)), ""
        )
        if flat and (start.startswith("lora_te") != (case.names == "clip") or not start):
            return ""
        rest = key.removeprefix(start) if flat else key.partition("-")[2]
        with suppress(AttributeError, IndexError):
            return self.patcher._get_submodule(model, rest, layer_key_is_flattened=flat)[0]
        return ""

    def _network(self, architecture: str) -> nn.Module:
        """Its network: that of diffusers, but for Flux.1, which is the authors'."""
        network = network_of(architecture)
        if architecture != "flux":
            return network
        found = nn.Module()
        for path, group in paths_of(Case(architecture, "", "own")).items():
            put(found, path, network.get_submodule(group.names[0].path))
        return found

    def _path(self, case: Case, name: Name) -> str:
        if case.names == "clip":
            return name.path if name.path in dict(text_encoder().named_modules()) else name.path.partition(".")[2]
        return owners(case.architecture)[name] if case.architecture == "flux" else name.path
