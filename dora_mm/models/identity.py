"""The identity of a model: digests of everything that loading reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_mm.models.opening import is_weights
from dora_mm.utils.digest import known_digest
from dora_mm.utils.run_directory import MODEL, WEIGHTS_OF

TEMPLATES = "additional_chat_templates"  # transformers' subfolder; runs and logs may lie in others of a model's folder
# Files for people and other programs, which no loading reads; code of a repository is never run
UNREAD = re.compile(
    r"\.|README|LICEN[CS]E|NOTICE|USE_POLICY|.*\.(md|py|pdf|png|jpe?g|gif|webp|xml|onnx_data|mlmodel|log)$"
)


@dataclass(frozen=True)
class ModelIdentity:
    """The content of everything that a model is loaded from; empty for a hub model that was not downloaded yet.

    Attributes:
        weights: Digests of the tensors, in whatever files and dtype they are loaded, by a key of an adapter's header or
            by the network, as `weights_of` names it.
        files: Digests of all other files that are read (configs, index, tokenizers, processors, chat templates,
            generation config, scheduler), by the path in the model's folder.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """The entries of a run's inputs."""
        return {**self.weights, MODEL: dict(self.files)} if self.weights else {}


def weights_of(network: str) -> str:
    """The name of the weights of a network of an image model."""
    return f"{WEIGHTS_OF}{network}"


def digests_of(folder: Path, prefix: str = "", names: Iterable[str] = ()) -> dict[str, str]:
    """Digests of the files of a folder that loading reads beside the weights, by prefix and path in the folder.

    Args:
        folder: The folder of a model, or of a component.
        prefix: A text in front of the paths, such as "unet/".
        names: The only files; none: all.
    """
    found = [folder / name for name in names]
    if not names:
        entries = (*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*"))  # of further chat templates
        found = [entry for entry in entries if not is_weights(entry) and not UNREAD.match(entry.name)]
    files = sorted(file for file in found if file.is_file())  # parts of a hub model may not be here yet
    return {f"{prefix}{file.relative_to(folder).as_posix()}": known_digest(file) for file in files}
