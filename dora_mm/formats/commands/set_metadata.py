"""Edits the metadata of an adapter file, for people, web UIs and sites; the tensors stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.files.tensor_file import TensorFile, write_with_metadata
from dora_mm.formats.metadata import LEGACY_HASH, MODEL_HASH, hashes
from dora_mm.utils.messages import nearest

SPEC, VERSION = "modelspec.", "1.0.1"  # the fields of https://github.com/Stability-AI/ModelSpec
_FIELDS = "title author description license trigger_phrase tags usage_hint date thumbnail architecture implementation"
SHORT = {name: SPEC + name for name in _FIELDS.split()} | {"trigger_words": f"{SPEC}trigger_phrase"}
_OTHERS = ("base_model", "instance_prompt", "config")
_FREE = re.compile(r"(modelspec\.|ss_)\w+")


@dataclass(frozen=True)
class Edited:
    """The result of `set_metadata`.

    Attributes:
        file: The file that was written.
        changes: By key the text before and now; None: no entry.
    """

    file: Path
    changes: Mapping[str, tuple[str | None, str | None]]


def set_metadata(source: str | Path, entries: Mapping[str, str], target: Path | None = None) -> Edited:
    """Writes an adapter file with other entries in its header, and with the hashes of web UIs and sites.

    The tensors stay as they are, byte for byte; the file is complete with the old entries or with the new ones.

    Args:
        source: The adapter file of any tool, its folder or run directory.
        entries: By key the new text; an empty one takes the entry out. Keys are those of ModelSpec (`title`, or
            `modelspec.title`), of kohya's scripts (`ss_...`), `base_model`, `instance_prompt` and `config`.
        target: A new file; None: the file itself.

    Raises:
        ValueError: The file is no adapter, a key is one by which it is read or is unknown, or the target exists.
        OSError: The file cannot be written.
    """
    file = TensorFile(AdapterFile(source).path)
    if target is not None and target.exists():
        raise ValueError(f"{target} exists already: name a new file, or leave it out to change {file.path} itself")
    if target is not None and target.suffix != ".safetensors":
        raise ValueError(f"{target} is not a .safetensors file")
    before = file.metadata
    after = {**before, **{_key(key): text for key, text in entries.items()}}
    after = {key: text for key, text in after.items() if text or key not in map(_key, entries)}
    if any(key.startswith(SPEC) for key in after):
        after.setdefault(f"{SPEC}sai_model_spec", VERSION)
    after |= hashes(file, after)
    keys = [key for key in {**after, **before} if after.get(key) != before.get(key)]
    write_with_metadata(file, target or file.path, after)
    return Edited(target or file.path, {key: (before.get(key), after.get(key)) for key in keys})


def parse_entries(texts: Sequence[str]) -> dict[str, str]:
    """The entries of a command, KEY=VALUE each. Raises ValueError where one has no equals sign, or a key is twice."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set-metadata takes KEY=VALUE, and {text!r} has no equals sign")
        if key in found:
            raise ValueError(f"--set-metadata has {key} twice")
        found[key] = value
    return found


def _key(key: str) -> str:
    """The key in the header. Raises ValueError where it is none that a person may set."""
    if key in (MODEL_HASH, LEGACY_HASH):
        raise ValueError(f"{key} is computed: leave it out")
    if key in _OTHERS or _FREE.fullmatch(key):
        return key
    if key not in SHORT:
        known = (*SHORT, *_OTHERS)
        raise ValueError(
            f"no entry of a header {key!r:.100} can be set: use {', '.join(known)}, or a key that begins with "
            f"modelspec. or ss_{nearest(key, known)}"
        )
    return SHORT[key]
