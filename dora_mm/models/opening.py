"""Opens image models of diffusers: which there is at a path, and its parts, each loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn

from dora_mm.config.loader import resolve_model
from dora_mm.config.models import ModelConfig
from dora_mm.formats.files.json_text import read_json
from dora_mm.models import hub

INDEX = "model_index.json"


class Parts:
    """The parts of a model, named as in diffusers; networks are frozen, and in eval mode.

    Args:
        load: Loads parts by their names; it may return more than it is asked for.
        phases: The names of all parts, in the groups in which they are loaded: a group is loaded when one of it is
            first asked for.
    """

    def __init__(self, load: Callable[[Sequence[str]], Mapping[str, Any]], phases: Sequence[Sequence[str]]):
        self._load, self._phases = load, phases
        self._loaded: dict[str, Any] = {}
        self._released: set[str] = set()
        self.device = torch.device("cpu")

    @classmethod
    def of(cls, **parts: Any) -> Parts:
        """Parts that are in memory already, as they are."""
        found = cls(lambda names: parts, [tuple(parts)])
        found._loaded = parts
        return found

    @property
    def names(self) -> list[str]:
        """The names of all parts, loaded or not."""
        return [name for phase in self._phases for name in phase]

    def __getitem__(self, name: str) -> Any:
        """A part, or None if it was released."""
        if name not in self._loaded and name not in self._released:
            group = next(phase for phase in self._phases if name in phase)
            found = self._load([each for each in group if each not in self._loaded and each not in self._released])
            for each, part in found.items():
                if each not in self._loaded and each not in self._released:
                    self._loaded[each] = self._ready(part)
        return self._loaded.get(name)

    def __setitem__(self, name: str, part: Any) -> None:
        self._loaded[name] = part

    def release(self, names: Iterable[str]) -> None:
        """Frees parts, for good."""
        for name in names:
            self._released.add(name)
            self._loaded.pop(name, None)

    def is_released(self, name: str) -> bool:
        return name in self._released

    def to(self, device: torch.device | str) -> None:
        """Moves all networks to a device, also those that are loaded later."""
        self.device = torch.device(device)
        for part in self._loaded.values():
            if isinstance(part, nn.Module):
                part.to(self.device)

    def _ready(self, part: Any) -> Any:
        return part.requires_grad_(False).eval().to(self.device) if isinstance(part, nn.Module) else part


def check_revision(config: ModelConfig) -> str:
    """The local path or hub name of the model that a `model` section names.

    Raises:
        ValueError: There is no such path, or a local model has a revision; the message names the key.
    """
    path = resolve_model(config.path)
    if config.revision and Path(path).exists():
        raise ValueError(f"model.revision: {path} is not a model of the hub, so it has no revisions: leave it out.")
    return path


def pipeline_class_of(path: str, revision: str | None) -> str:
    """The class of diffusers that the index of a pipeline names.

    Args:
        path: A folder, or a hub name.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: There is no index, it is damaged, or the hub cannot be reached.
    """
    index = Path(path) / INDEX
    if not Path(path).exists():
        if not is_hub_name(path):
            raise ValueError(f"There is no model at {path}: name a folder, a .safetensors file or a hub repository.")
        try:
            index = Path(hf_hub_download(path, INDEX, revision=revision))
        except (OSError, ValueError) as error:
            raise ValueError(_why_not(named(path, revision), error)) from error
    elif not index.is_file():
        parts = sorted(folder.name for folder in Path(path).iterdir() if (folder / "config.json").is_file())
        inside = f"has {', '.join(parts)}, but no {INDEX}" if parts else f"has no {INDEX}"
        raise ValueError(f"{path} is not an image model of diffusers: it {inside}.")
    return str(read_json(index).get("_class_name"))


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a single checkpoint.

    Raises:
        ValueError: It is not a file of safetensors.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"The model {file} does not end in .safetensors: convert it first.")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(_why_not(str(file), error)) from error


def check_complete(folder: Path, parts: Iterable[str]) -> None:
    """Checks that a folder has all parts of a pipeline.

    Raises:
        ValueError: It lacks some.
    """
    missing = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        raise ValueError(f"The model {folder} is incomplete: it lacks {', '.join(missing)}.")


def load_parts(
    pipeline: Any, path: str, names: Sequence[str], every: Iterable[str], dtype: torch.dtype, revision: str | None
) -> dict[str, Any]:
    """Loads parts of a pipeline of diffusers; a single checkpoint is loaded as a whole.

    Args:
        pipeline: The class of diffusers.
        path: A folder, a single `.safetensors` checkpoint or a hub name. A single checkpoint holds no configs and no
            tokenizers: diffusers downloads them from the hub once.
        names: The parts.
        every: All parts of the pipeline.
        dtype: The dtype of all networks.
        revision: A commit, branch or tag of a hub model; None is its main branch.

    Raises:
        ValueError: A part is missing or cannot be loaded.
    """
    if Path(path).is_file():
        loaded = attempt(path, lambda: pipeline.from_single_file(path, dtype=dtype))
        return {name: getattr(loaded, name) for name in every}
    others: dict[str, Any] = {name: None for name in every if name not in names}

    def load() -> Any:
        return pipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True, **others)

    loaded = attempt(named(path, revision), load)
    return {name: getattr(loaded, name) for name in names}


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a VAE from a folder or a hub name, frozen and in eval mode.

    Raises:
        ValueError: There is no VAE, or it cannot be loaded.
    """
    from diffusers import AutoModel

    vae = attempt(str(path), lambda: AutoModel.from_pretrained(str(path), dtype=dtype, use_safetensors=True), "VAE")
    return vae.requires_grad_(False).eval()


def attempt(name: str, load: Callable[[], Any], what: str = "model") -> Any:
    """What a function of diffusers loads.

    Args:
        name: What is loaded, for the message.
        load: Loads it.
        what: What kind of thing it is, for the message.

    Raises:
        ValueError: Files are missing, damaged or of another kind of model, or the hub cannot be reached.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        return load()
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        raise ValueError(_why_not(name, error, what)) from error


def named(path: str, revision: str | None) -> str:
    """A model in a message."""
    return f"{path} (revision {revision})" if revision else path


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit of a hub model as it was loaded, from the hub's cache on this machine.

    Args:
        path: What was loaded.
        revision: The revision that was loaded.

    Returns:
        The commit's hash; None for a local folder or file, and for a model that is not in the cache.
    """
    return hub.commit_of(path, INDEX, revision) if is_hub_name(path) else None


def is_hub_name(path: str) -> bool:
    """Whether a path has the form of a hub repository, `owner/name`."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(".safetensors")


def _why_not(name: str, error: BaseException, what: str = "model") -> str:
    reason = " ".join(str(error).split())
    return hub.unreachable(name, error) or f"The {what} {name} cannot be loaded: {reason}"
