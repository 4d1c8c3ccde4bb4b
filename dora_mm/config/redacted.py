"""A config as it may be published: values that somebody has written are replaced, those of this package stay."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

from dora_mm.config.descriptions import sections_of
from dora_mm.config.paths import PACKAGE, packaged_configs, path_kind
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.loss_weightings import LOSS_WEIGHTINGS
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.registries.readers import READERS
from dora_mm.registries.scorers import SCORERS
from dora_mm.registries.submissions import SUBMISSIONS
from dora_mm.registries.target_maps import TARGET_MAPS
from dora_mm.registries.vl_families import VL_FAMILIES
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils import yaml12

REGISTRIES = (IMAGE_FAMILIES, LOSS_WEIGHTINGS, OPTIMIZERS, READERS, SCORERS, SUBMISSIONS, VL_FAMILIES, TASKS)
PATH, TEXT, KEY = "<path>", "<text>", "<key>"
SEPARATORS = re.compile(r"[/\\~]")


def redacted(value: Any, key: str = "") -> Any:
    """A config's values, in which only numbers and the texts of this package are as they were.

    A text that is no choice, default or packaged example is `<path>`, where it is one, or `<text>`; a key that no
    config has is `<key>`. So names of people, hosts, folders and private models, captions and tokens are gone.

    Args:
        value: What a YAML file holds.
        key: The name of the key that it belongs to.
    """
    if isinstance(value, Mapping):
        return dict(_entries(value))
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value in public_texts():
        return value
    is_path = key in path_keys() or SEPARATORS.search(value) or PurePath(value).suffix
    return PATH if is_path else TEXT


def _entries(section: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for key, value in section.items():
        if key in known_keys():
            yield key, redacted(value, key)
        else:
            number += 1
            yield f"{KEY} {number}", redacted(value)


@cache
def known_keys() -> frozenset[str]:
    """The names of the keys of all configs, and of what their sections list by a name of this package."""
    names = {name for section in _sections() for name in section.model_fields}
    return frozenset(names | public_texts())


@cache
def path_keys() -> frozenset[str]:
    """The names of the keys that hold paths or names of models."""
    fields = ((name, field) for section in _sections() for name, field in section.model_fields.items())
    return frozenset(name for name, field in fields if path_kind(field))


@cache
def public_texts() -> frozenset[str]:
    """The texts that say nothing about a person: choices, defaults, names of registries, packaged configs."""
    examples = (yaml12.read(file.read_text(encoding="utf-8")).value for file in packaged_configs().values())
    names = {name for registry in REGISTRIES for name in registry.built_in}
    parts = {name for record in TARGET_MAPS.built_in.values() for name in (*record.names, *record.parts)}
    schema = json.loads((PACKAGE / "config" / "schema.json").read_text(encoding="utf-8"))
    choices = _texts(_values_of(schema, ("enum", "const", "default")))
    return frozenset({*_texts(examples), *choices, *names, *parts})


def _sections() -> Iterator[Any]:
    return (section for schema in SCHEMAS.values() for section in sections_of(schema))


def _values_of(node: Any, keys: Iterable[str]) -> Iterator[Any]:
    """What certain keys hold, at any depth."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield from (node[key] for key in keys if key in node)
    for child in children:
        yield from _values_of(child, keys)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """All texts in values, keys left out."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
        elif isinstance(value, list):
            yield from _texts(value)
