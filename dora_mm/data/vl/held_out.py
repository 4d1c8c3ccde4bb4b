"""Rows of a training split that are held out for validation, by whole images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dora_mm.config.paths import resolve_path
from dora_mm.config.vl_data import HeldOutConfig
from dora_mm.data.vl.tables import STORED_IMAGES, ExampleTable


def split_held_out(
    table: ExampleTable, config: HeldOutConfig, images: str | None = None
) -> tuple[ExampleTable, ExampleTable]:
    """Splits the rows of a training split in two, so that no image is in both.

    Rows that share an image stay together, also where a third row joins them; rows without images stay together where
    they are equal. These groups come in an order that the names of their images decide, or their texts, and each that
    still fits into the share and the limit is held out: the choice depends neither on the order of the rows nor on a
    seed. If none fits, the first of the smallest is held out, and cut at the limit.

    Args:
        table: The rows, with the paths of their images.
        config: How many of them to hold out.
        images: The folder of their images, None if they have absolute paths.

    Returns:
        The rows to train on, which keep the places of skipped rows, and those to validate on; both in the order of the
        table.

    Raises:
        ValueError: All rows are of one group.
    """
    groups, keys = row_groups(_keys(table, images))
    if len(keys) < 2:
        raise ValueError(
            f"{table.file}: no rows can be held out (data.valid.share). Rows that share an image, or are equal, stay "
            f"together, and here all {len(table):,} do: name another file in data.valid, or set data.valid=null"
        )
    order = sorted(range(len(keys)), key=lambda group: _digest(keys[group]))
    wanted = min(max(1, round(config.share * len(table))), config.limit or len(table), len(table) - 1)
    chosen = np.array(order)[fitting(np.bincount(groups)[order], wanted)]
    is_held_out = np.isin(groups, chosen)
    held_out = table.select(np.flatnonzero(is_held_out)[: config.limit])
    return table.select(np.flatnonzero(~is_held_out)), replace(held_out, skipped={})


def row_groups(keys: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """Groups rows that are joined by keys.

    Args:
        keys: The keys of each row (N), at least one.

    Returns:
        The group of each row (N,), and the first key in the alphabet of each group.
    """
    parents: dict[str, str] = {}  # a key leads to one that is before it in the alphabet; the first leads to itself

    def first(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]  # halves the way
        return key

    for row in keys:
        start = first(row[0])
        for key in row[1:]:
            low, high = sorted((start, first(key)))
            parents[high] = start = low
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(first(row[0]), len(numbers)) for row in keys]
    return np.array(groups, np.int64), list(numbers)


def fitting(sizes: np.ndarray, total: int) -> list[int]:
    """The indices of the sizes that fit into a total, one after the other; if none does, that of the first smallest."""
    found, left = [], total
    for index, size in enumerate(sizes.tolist()):
        if size <= left:
            found.append(index)
            left -= size
        if not left:
            break
    return found or [int(np.argmin(sizes))]


def _keys(table: ExampleTable, images: str | None) -> list[list[str]]:
    """The names of each row's images, equal for equal files wherever their folder is; else a digest of its content."""
    roots = [resolve_path(images, "images").absolute()] if images is not None else []
    prefixes = [f"{root}{os.sep}" for root in (*roots, (table.path.parent / STORED_IMAGES).absolute())]
    keys = [[_without(prefixes, name) for name in names] for names in table.image_lists()]
    without_images = [row for row, names in enumerate(keys) if not names]
    for row, content in zip(without_images, table.select(without_images).contents(), strict=True):
        keys[row] = [_digest(repr(content))]
    return keys


def _without(prefixes: Sequence[str], name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
