"""The networks of any model of transformers or diffusers as its configs describe them, without reading weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mm.config.paths import CONFIG, INDEX
from dora_mm.formats.files.model_class import THINKERS
from dora_mm.models.opening import WEIGHTS, opened_folder, opening
from dora_mm.registries.registry import load
from dora_mm.registries.target_maps import outside_class

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Network:
    """A network of a model.

    Attributes:
        path: Its local folder.
        config: What its config.json contains.
    """

    path: str
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The name of its class, or else its model type; of a model that also speaks, that it is read without that."""
        saved = self.config.get("architectures")
        named = saved if isinstance(saved, list) else []
        kind = str(self.config.get("_class_name") or next(iter(named), None) or self.config.get("model_type"))
        thinker = THINKERS.get(str(self.config.get("model_type")))
        return f"{thinker} (of {kind}, without what speaks)" if thinker else kind

    def build(self) -> nn.Module:
        """Builds the network on the meta device.

        Raises:
            ValueError: Its class is in none of the libraries, or cannot be built from the config.
        """
        if "_class_name" in self.config:
            kind = _class_of_diffusers(self)
            return _built(self, lambda: kind.from_config(dict(self.config)))
        if self.config.get("model_type") == "vl_bart":
            from dora_mm.models.vl.vl_bart.model import VLBart, VLBartConfig

            return _built(self, lambda: VLBart(VLBartConfig.from_dict(dict(self.config))))
        from dora_mm.models.folders import empty_model

        return empty_model(self.path)


def networks_of(path: str) -> dict[str, Network]:
    """Finds the networks of a model.

    Args:
        path: A folder or hub name: of a model of transformers, of a network of diffusers, or of a pipeline.

    Returns:
        The networks by component of the pipeline, or the only one by an empty name.

    Raises:
        ValueError: It is no model, a config is damaged, or the hub cannot be reached.
    """
    folder = opened_folder(path)
    if folder.index is not None:
        names = [name for name in folder.components if (folder.path / name / CONFIG).is_file()]
        return {name: Network(str(folder.path / name), folder.config(name)) for name in names}
    if not folder.has_config():
        raise ValueError(_why_no_model(path, folder.path))
    config = folder.config()
    if "_class_name" not in config and "model_type" not in config:
        raise ValueError(f"{path} is no model of transformers or diffusers: its {CONFIG} has no model_type")
    return {"": Network(str(folder.path), config)}


def _why_no_model(path: str, folder: Path) -> str:
    weights = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHTS)
    if weights:
        return f"{path} has weights ({weights[0]}) and no {CONFIG}: put the model's own beside them"
    return f"{path} is no model, and holds no adapter: it has neither {CONFIG} nor {INDEX}"


def _class_of_diffusers(network: Network) -> Any:
    import diffusers
    from torch import nn

    outside = outside_class(network.kind)
    kind = load(outside) if outside else getattr(diffusers, network.kind, None)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    raise ValueError(f"{network.path} is a {network.kind}, no network of diffusers {diffusers.__version__}")


def _built(network: Network, build: Callable[[], nn.Module]) -> nn.Module:
    import torch

    problem = f"the {network.kind} of {network.path} cannot be built from its {CONFIG}"
    with opening(network.path, problem), torch.device("meta"):
        return build()
