"""Whether a config names parts of another family of image models than its model's. Imports nothing large."""

from __future__ import annotations

from pathlib import Path

from dora_mm.config.adapter import ImageAdapterConfig
from dora_mm.config.models import ModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.hub import local_copy
from dora_mm.registries.image_families import IMAGE_FAMILIES, ImageFamily
from dora_mm.registries.target_maps import TARGET_MAPS
from dora_mm.utils.json_text import MAX_BYTES, parse_json


def check_parts(adapter: ImageAdapterConfig, model: ModelConfig, source: str) -> None:
    """Checks that no part is one that only the denoisers of other families have.

    What cannot be known without loading the model passes.

    Args:
        adapter: The `adapter` section.
        model: The `model` section.
        source: The file of the config. Packaged ones are in folders with the names of the families.

    Raises:
        ValueError: Parts are of another family.
    """
    own = _family_on_disk(model)
    known = _parts(own) if own else ()
    unknown = [part for part in adapter.parts if part not in known]
    if own is None or not known or not unknown:
        return
    parts = {name: _parts(family) for name, family in IMAGE_FAMILIES.items()}
    foreign = [part for part in unknown if any(part in each for each in parts.values())]
    others = [name for name, each in parts.items() if set(foreign) <= set(each)]
    if not foreign or not others:
        return
    folder = Path(source).parent.name
    titles = [IMAGE_FAMILIES[name].title for name in ([folder] if folder in others else others)]
    configs = dict.fromkeys(str(Path(config).parent) for config in own.starts.values())
    advice = f": start from a config in {', '.join(configs)}" if configs else ""
    raise ValueError(
        f"adapter.parts: the config has parts of {' or '.join(titles)} ({', '.join(foreign)}), and model.path "
        f"{model.path} is {own.title} ({own.pipeline}), whose denoiser has {', '.join(known)}{advice}"
    )


def _parts(family: ImageFamily) -> tuple[str, ...]:
    """The names that configs have for the parts of a family's denoiser."""
    return TARGET_MAPS[family.target_map].names if family.target_map else ()


def _family_on_disk(model: ModelConfig) -> ImageFamily | None:
    """The family of a model by what is on this machine; None: it is not known, or has no record."""
    try:
        copy = local_copy(resolve_model(model.path), model.revision)
        if copy is None:
            return None
        if copy.is_dir():
            pipeline = (ModelFolder(copy).index or {}).get("_class_name")
            found = IMAGE_FAMILIES.first(lambda family: family.pipeline == pipeline)
        else:
            tensors = _tensor_names(copy)
            found = IMAGE_FAMILIES.first(lambda family: family.is_checkpoint(tensors))
    except ValueError:  # it does not exist or is damaged, which is said where it is loaded
        return None
    return IMAGE_FAMILIES[found] if found else None


def _tensor_names(file: Path) -> list[str]:
    """The keys in the header of a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return list(parse_json(opened.read(min(length, MAX_BYTES)), str(file)))
