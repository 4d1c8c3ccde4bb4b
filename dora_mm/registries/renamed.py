"""Config keys, options and registry kinds that have another name now.

Messages name the present one, and configs that runs have saved under the former names are read. The keys of headers,
metrics, checkpoints and tables have kept their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS: Mapping[str, Mapping[str, str]] = {  # by pipeline: dotted keys, sections ahead of the keys in them
    "sample": {"sheet": "contact_sheet"},
    "eval_diffusion": {"judge": "classifier", "draw": "sampling"},
    "eval_style": {"plain_prompts": "prompts_without_style"},
    "eval_server": {"server.at_once": "server.concurrency"},
    "compare": {
        "pictures": "images",
        "questions": "vl",
        "images.judge": "images.classifier",
        "images.draw": "images.sampling",
    },
    "tune": {"judge": "selection_metric"},
}
OPTIONS: Mapping[str, str] = {"--judge": "--selection-metric"}
KINDS: Mapping[str, str] = {"targets": "export_formats"}  # the beginnings of entry points


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that a run has saved, under the present names of its keys."""
    found = dict(values)
    for old, new in KEYS.get(str(values.get("pipeline")), {}).items():
        *sections, last = old.split(".")
        node: Any = found
        for section in sections:
            if not isinstance(node.get(section), Mapping):
                break
            node[section] = node = dict(node[section])
        else:
            if last in node:
                node[new.split(".")[-1]] = node.pop(last)
    return found


def migrated_memory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of memory that an image has saved: its layers are streamed now, to the same numbers."""
    is_streamed = values.get("offload") == "layers"
    return {**values, "offload": "none", "stream": "all", "stream_text": "all"} if is_streamed else dict(values)


def under_first_names(values: Mapping[str, Any], pipeline: str, section: str = "") -> dict[str, Any]:
    """The values of a section under the first names of its keys, for digests: a rename changes none.

    Args:
        values: The values by key.
        pipeline: The pipeline of the config.
        section: The dotted key of the section; "" for the config itself.
    """
    first = {new: old.split(".")[-1] for old, new in KEYS[pipeline].items()}
    return {first.get(f"{section}.{key}".removeprefix("."), key): value for key, value in values.items()}
