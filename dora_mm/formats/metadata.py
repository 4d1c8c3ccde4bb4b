"""Metadata in headers of adapter files: hashes for web UIs and sites, and no local paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from dora_mm.config.paths import find_path
from dora_mm.formats.files.header import write_header
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.tensor_writer import in_order

MODELS = ("base_model", "base_vae", "extracted_from", "ss_sd_model_name", "ss_vae_name")  # keys of models
PEFT_CONFIG, PEFT_BASE = "adapter_config.json", "base_model_name_or_path"
MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_LOCAL = re.compile(  # a path from its root, home, drive, server or a folder with dots on, to the end of a text or line
    r"""(?<![\w.:/\\~-])(?:~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\+|/(?=[^\s/"',\]}]+/))[^"'\n,\]}]*"""
)
_WINDOW = slice(0x100000, 0x110000)  # the bytes of a file that the legacy hash is of


def without_local_paths(header: Mapping[str, str]) -> dict[str, str]:
    """A header in which local paths are the names of their files or folders: what is written for others has no more."""
    found = {key: _name(text) if key in MODELS else _LOCAL.sub(_last, text) for key, text in header.items()}
    if PEFT_CONFIG in header:
        config = parse_json(header[PEFT_CONFIG], PEFT_CONFIG)
        base = config.get(PEFT_BASE)
        found[PEFT_CONFIG] = json.dumps({**config, PEFT_BASE: _name(base)} if isinstance(base, str) else config)
    return found


def _name(model: str) -> str:
    """The name of a model on the Hub as it is, and that of a file or folder of this machine."""
    is_local = _LOCAL.match(model) or find_path(model) is not None
    return re.split(r"[/\\]+", model.rstrip("/\\"))[-1] if is_local else model


def _last(path: re.Match[str]) -> str:
    return re.split(r"[/\\]+", path[0].rstrip("/\\ "))[-1]


# --- hashes ----------------------------------------------------------------------------------------------------------


def hashes(file: TensorFile, metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which web UIs and sites know an adapter, as sd-scripts writes them into headers.

    `sshs_model_hash` is the SHA-256 of all bytes after the header, the AutoV3 of sites. `sshs_legacy_hash` is that of
    64 KB of the file as the safetensors library would write it with the `ss_` entries alone; its first 8 digits.

    Args:
        file: The file.
        metadata: The entries of its new header.
    """
    digest = hashlib.sha256()
    for piece in file.data():
        digest.update(piece)
    own = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    window = b"".join(_window(file, own))
    return {MODEL_HASH: digest.hexdigest(), LEGACY_HASH: hashlib.sha256(window).hexdigest()[:8]}


def _window(file: TensorFile, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of `_WINDOW` of the file as the safetensors library would write it."""
    order = in_order({key: entry.dtype_name for key, entry in file.entries.items()})
    offset = len(write_header({key: file.entries[key] for key in order}, metadata))
    for key in order:
        entry = file.entries[key]
        first, last = max(offset, _WINDOW.start), min(offset + entry.num_bytes, _WINDOW.stop)
        if first < last:
            yield file.read_bytes(entry.offset + first - offset, last - first)
        offset += entry.num_bytes
