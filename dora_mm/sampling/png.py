"""PNG metadata of an image: a JSON text, from which it can be generated again, and A1111's `parameters` text.

Nothing in it depends on when the image was saved, so that the same job gives the same files on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import PIL
from PIL import Image, PngImagePlugin
from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from dora_mm.sampling.strengths import HashableStrength, strength_text
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.circumstances import Record
from dora_mm.utils.json_text import check_no_device, parse_json
from dora_mm.utils.run_directory import changed_names

JSON_CHUNK, A1111_CHUNK = "dora_mm", "parameters"
VERSION = 2  # of the JSON


@dataclass(frozen=True)
class BaseModel:
    """The base model of an image.

    Attributes:
        path: A folder, a file or a hub name, as it was given.
        revision: The revision on the hub.
        vae: A VAE that replaces the model's own.
        dtype: The dtype of its weights.
        digest: SHA-256 of its weights and of the settings of its scheduler, in hex.
        file_digest: SHA-256 of a single file, by which A1111 and Civitai find it; None for a folder or hub name.
        settings: Those of its family that are not the defaults, by the key of their section.
        files: Digests of its other files, see `ModelIdentity.files`; None: the image has none.
    """

    path: str
    revision: str | None
    vae: str | None
    dtype: str
    digest: str
    file_digest: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] | None = None

    def changes(self, before: BaseModel) -> list[str]:
        """The names of the files that differ from those of an earlier image, and "the weights" where these do.

        Images that do not name the files of their model are compared by the weights and the scheduler.
        """
        files = changed_names(before.files, self.files) if before.files and self.files else []
        explained = any(file.startswith("scheduler/") for file in files)  # whose settings are in the digest, too
        return files + (["the weights"] if self.digest != before.digest and not explained else [])


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter of an image.

    Attributes:
        path: Its file or folder, as it was given.
        strength: Its strength, or those of its parts.
        digest: That of its tensors and settings: see `formats.adapter_digest`.
        hash: The hash by which Civitai finds it (AutoV3): the first digits of SHA-256 of the file without its header.
    """

    path: str
    strength: HashableStrength
    digest: str
    hash: str


@dataclass(frozen=True)
class GenerationMetadata:
    """The metadata of a generated image: model, adapters, settings and environment.

    Attributes:
        model: The base model.
        adapters: The adapters.
        settings: Steps, guidance, width, height and scheduler.
        batch: Prompt, negative prompt and seed of all images of its batch: rounding depends on them.
        position: The index of the image in its batch, from 0.
        environment: How the products were computed: backend, and the settings that save memory.
        circumstances: See `utils.circumstances`; earlier files have some of them, as `software`.
    """

    model: BaseModel
    adapters: tuple[UsedAdapter, ...]
    settings: Mapping[str, Any]
    batch: tuple[tuple[str, str | None, int], ...]
    position: int
    environment: Mapping[str, Any]
    circumstances: Annotated[Record, Field(validation_alias=AliasChoices("circumstances", "software"))]

    def is_same_image_as(self, other: GenerationMetadata) -> bool:
        """Whether the images are the same, up to rounding by the others of their batches.

        The circumstances and the paths of the weights do not count.
        """
        return self._own() == other._own() and not self.model.changes(other.model)

    def _own(self) -> GenerationMetadata:
        """The image alone. Weights and references count by their digests: files may move."""
        model = replace(self.model, path="", revision=None, vae=None, digest="", file_digest=None, files=None)
        adapters = tuple(replace(adapter, path="", hash="") for adapter in self.adapters)
        batch = self.batch[self.position : self.position + 1]
        settings = {name: value for name, value in self.settings.items() if name != "images"}
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        found = {"model": model, "adapters": adapters, "settings": settings, "batch": batch}
        return replace(self, **found, position=0, circumstances={})


METADATA = TypeAdapter(GenerationMetadata)


def save_image(path: Path, image: Image.Image, metadata: GenerationMetadata, scheduler: str) -> None:
    """Saves a PNG file atomically, with what it was generated with.

    Args:
        path: The file; it is replaced where it exists.
        image: The image.
        metadata: What it was generated with.
        scheduler: The scheduler's name in A1111, such as "DPM++ 2M Karras".
    """
    info = PngImagePlugin.PngInfo()
    info.add_text(A1111_CHUNK, parameters_text(metadata, scheduler))
    info.add_itxt(JSON_CHUNK, json.dumps({"version": VERSION, **asdict(metadata)}, ensure_ascii=False))
    write_atomically(path, lambda partial: image.save(partial, "PNG", pnginfo=info))


def read_metadata(path: Path) -> GenerationMetadata:
    """Reads what an image was generated with. The whole file is checked.

    Raises:
        ValueError: It is not a PNG file, is damaged, or was not saved by `save_image`.
    """
    check_no_device(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            text = getattr(image, "text", {}).get(JSON_CHUNK)
    except (OSError, SyntaxError, ValueError, PIL.UnidentifiedImageError) as error:
        raise ValueError(f"{path} is not a PNG image, or is damaged ({error})") from None
    if text is None:
        raise ValueError(f"{path} was not generated by dora-mm sample: it has no text chunk {JSON_CHUNK}")
    try:
        if parse_json(text, "it").get("version") != VERSION:
            raise ValueError("another version")
        metadata = METADATA.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        problem = ": ".join([".".join(map(str, found["loc"])), found["msg"]])
        raise ValueError(f"the text chunk {JSON_CHUNK} of {path} cannot be read ({problem})") from None
    except ValueError as error:
        raise ValueError(f"the text chunk {JSON_CHUNK} of {path} cannot be read ({error})") from None
    if not 0 <= metadata.position < len(metadata.batch):
        raise ValueError(f"the text chunk {JSON_CHUNK} of {path} cannot be read (its batch has no such position)")
    return metadata


# --- as A1111 and Civitai read it ------------------------------------------------------------------------------------


def parameters_text(metadata: GenerationMetadata, scheduler: str) -> str:
    """The text that A1111 writes as `parameters`, and that Civitai and others read.

    Args:
        metadata: What the image was generated with.
        scheduler: The scheduler's name in A1111.
    """
    prompt, negative_prompt, seed = metadata.batch[metadata.position]
    settings, model = metadata.settings, metadata.model
    entries: dict[str, Any] = {
        "Steps": settings["steps"],
        "Sampler": scheduler.removesuffix(" Karras"),  # the spacing of the noise levels is apart since version 1.9
        **({"Schedule type": "Karras"} if scheduler.endswith(" Karras") else {}),
        "CFG scale": f"{settings['guidance']:g}",
        **({"CFG Rescale": f"{settings['guidance_rescale']:g}"} if "guidance_rescale" in settings else {}),
        "Seed": seed,
        "Size": f"{settings['width']}x{settings['height']}",
        **({"Model hash": model.file_digest[:10]} if model.file_digest else {}),
        "Model": _stem(Path(model.path).name),
    }
    if metadata.adapters:
        named = [(_name(adapter.path), adapter) for adapter in metadata.adapters]
        entries["Lora hashes"] = ", ".join(f"{name}: {adapter.hash}" for name, adapter in named)
        entries["Lora strengths"] = ", ".join(f"{name}: {strength_text(adapter.strength)}" for name, adapter in named)
    entries["Version"] = f"dora_mm {metadata.circumstances.get('dora_mm')}"
    lines = [prompt, f"Negative prompt: {negative_prompt}"] if negative_prompt else [prompt]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in entries.items())])


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def _stem(name: str) -> str:
    """The name without the suffix of a weights file; the .0 of stable-diffusion-xl-base-1.0 is none."""
    return name.removesuffix(".safetensors")


def _name(path: str) -> str:
    """A short name of an adapter: that of its file, or the run directory around `adapter/`."""
    parts = [_stem(part) for part in Path(path).parts]
    parts = [part for part in parts if part not in ("adapter", "pytorch_lora_weights", "/", "..")]
    return "-".join(parts[-2:]) or "adapter"
