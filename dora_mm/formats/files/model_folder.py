"""The folder of a model as its JSON files describe it: one network, or a pipeline of diffusers with its components."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_mm.config.paths import CONFIG, INDEX
from dora_mm.utils.json_text import read_json


class ModelFolder:
    """A folder of a model of diffusers or transformers; no weights are read.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def index(self) -> Mapping[str, Any] | None:
        """The index of a pipeline: its class, facts of the model, its components; None where there is no pipeline.

        Raises:
            ValueError: It is damaged.
        """
        file = self.path / INDEX
        return read_json(file) if file.is_file() else None

    @property
    def components(self) -> list[str]:
        """The components of a pipeline for which its index names a library and a class."""
        return [name for name, value in (self.index or {}).items() if _is_component(name, value)]

    def has_config(self, component: str = "") -> bool:
        """Whether a component, or the only network, has a config."""
        return self._config(component).is_file()

    def config(self, component: str = "") -> Mapping[str, Any]:
        """The config of a component, or of the only network.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        return read_json(self._config(component))

    def _config(self, component: str) -> Path:
        return self.path / component / ("scheduler_config.json" if component == "scheduler" else CONFIG)


def _is_component(name: str, value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return pair and name.isidentifier()
