"""The sizes of images of a `model` section in the files of a model's folder, where other programs read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_mm.config.models import VLMModelConfig
from dora_mm.models.folders import read_config
from dora_mm.models.vl.vlm.image_limits import limited_grid, limits_in
from dora_mm.models.vl.vlm.loading import load_processor

PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
)  # the latter has it in a section since transformers 5
OLD_KEYS = ("min_pixels", "max_pixels")  # which outrank `size` where a file of an earlier transformers has them


def write_limits(folder: Path, config: VLMModelConfig) -> dict[str, int]:
    """Writes the sizes of images of a training into the files of its model's folder, and reads them back.

    Only what the limits change is written, since transformers writes processors that its earlier versions cannot read.

    Args:
        folder: The folder of a model, which is changed.
        config: The `model` section of the training.

    Returns:
        The keys of the section that were written; none where it has none.

    Raises:
        ValueError: The processor does not take a key.
        RuntimeError: The processor of the folder does not have the limits afterwards.
    """
    given = limits_in(config)
    if not given:
        return {}
    here = config.model_copy(update={"path": str(folder), "revision": None})
    without = here.model_copy(update=dict.fromkeys(given))
    model_config = read_config(str(folder))
    usual, wanted = (_settings(load_processor(each, model_config)) for each in (without, here))
    changed = {key: value for key, value in wanted.items() if usual.get(key) != value}
    for name in PROCESSORS:
        _edit(folder / name, lambda values: _with_limits(values, changed, given))
    if grid := limited_grid(model_config, config.max_tiles):
        _edit(folder / "config.json", lambda values: values | {"image_grid_pinpoints": grid})
    found = _settings(load_processor(without, model_config))
    if any(found.get(key) != value for key, value in changed.items()):
        raise RuntimeError(f"the processor of {folder} does not read {', '.join(given)} from its files")
    return given


def _settings(processor: Any) -> dict[str, Any]:
    """The settings of an image processor as JSON types."""
    return json.loads(processor.image_processor.to_json_string())


def _with_limits(values: dict[str, Any], changed: dict[str, Any], given: dict[str, int]) -> dict[str, Any]:
    """The settings of an image processor in a file, or in a section of it, with those that changed."""
    if "image_processor" in values:
        return values | {"image_processor": _with_limits(values["image_processor"], changed, given)}
    if "image_processor_type" not in values and "image_mean" not in values:  # a file of the processor's own settings
        return values
    return values | changed | {key: given[key] for key in OLD_KEYS if key in given and key in values}


def _edit(file: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        if (new := edit(old)) != old:
            file.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
