"""Rows of new tokens in files: inside an adapter file, and as embeddings that other programs load by themselves.

    bundle_emb.<word>.<table>     (N, D), inside: OneTrainer, kohya's forms, A1111, Forge, SD.Next; and the native form
    <word>.safetensors: <table>   (N, D), a file of its own: diffusers, A1111, ComfyUI

The tables of SDXL are `clip_l` and `clip_g`. diffusers refuses a file of adapters with the first kind of keys, so its
form comes with files of the second kind; a key of the header lists them, with the digests of their rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.tensor_writer import save_tensors

TokenRows = Mapping[str, Mapping[str, Tensor]]  # the rows (N, D) by word, and then by table
EMBEDDINGS = re.compile(r"bundle_emb\.|emb_params$|clip_[lg]$|.*string_to_param")  # of tokens that were trained
BUNDLE = "bundle_emb."
EXTRA_FILE_KEY = "dora_mm_tokens"  # of a header: the words whose rows are in files beside it, with their digests
_BUNDLED = re.compile(rf"{re.escape(BUNDLE)}(?P<word>.+)\.(?P<table>\w+)")
_FILE_NAME = re.compile(r"[^/\\:*?\"<>|\x00-\x1f.][^/\\:*?\"<>|\x00-\x1f]*")


def bundled(tokens: TokenRows) -> dict[str, Tensor]:
    """The rows by their keys inside of an adapter file."""
    return {f"{BUNDLE}{word}.{table}": rows for word, found in tokens.items() for table, rows in found.items()}


def keys_by_word(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of an adapter file that are rows of new tokens, by word and then by table."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        if match := _BUNDLED.fullmatch(key):
            found.setdefault(match["word"], {})[match["table"]] = key
    return found


def digest_of_rows(rows: Mapping[str, Tensor]) -> str:
    """SHA-256 of the rows of a word, in any order of its tables."""
    digest = hashlib.sha256()
    for table in sorted(rows):
        tensor = rows[table].detach().cpu().contiguous()
        digest.update(f"{table} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- files beside an adapter file ------------------------------------------------------------------------------------


def token_file(folder: Path, word: str) -> Path:
    """The file of a word's rows.

    Raises:
        ValueError: The word cannot be the name of a file.
    """
    if not _FILE_NAME.fullmatch(word):
        raise ValueError(f"the new token {word!r:.100} cannot be the name of a file")
    return folder / f"{word}.safetensors"


def write_token_file(folder: Path, tokens: TokenRows) -> dict[str, str]:
    """Writes a file for each word.

    Returns:
        The entry of the adapter file's header that belongs to them; nothing without words.
    """
    for word, rows in tokens.items():
        save_tensors(token_file(folder, word), rows, {"format": "pt"})
    return {EXTRA_FILE_KEY: json.dumps({word: digest_of_rows(rows) for word, rows in tokens.items()})} if tokens else {}


def read_token_file(file: Path, header: Mapping[str, str]) -> dict[str, tuple[TensorFile, str]]:
    """Finds the rows in separate files that a header lists: the file and the key of each, by the keys of bundled rows.

    Raises:
        ValueError: A file is missing or damaged, or does not hold the rows that were saved with the adapter.
    """
    found: dict[str, tuple[TensorFile, str]] = {}
    for word, digest in parse_json(header.get(EXTRA_FILE_KEY, "{}"), f"its header key {EXTRA_FILE_KEY}").items():
        path = token_file(file.parent, word)
        if not path.is_file():
            raise ValueError(f"{file} was trained with the new token {word}, and {path.name} is not beside it")
        rows = TensorFile(path)
        if digest_of_rows({table: rows.read(table) for table in rows.entries}) != digest:
            raise ValueError(f"{path} does not hold the rows that {file} was trained with")
        found |= {f"{BUNDLE}{word}.{table}": (rows, table) for table in rows.entries}
    return found
