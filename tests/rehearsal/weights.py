"""Files of safetensors with random weights, drawn and written tensor by tensor, in 1 GB of memory at any size."""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats.files.header import TensorEntry, write_header

Specs = Mapping[str, TensorEntry]
POOL = 1 << 24  # numbers that all weights are pieces of
SHARD = 5_000_000_000  # bytes, as the hub has them


def specs_of(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, TensorEntry]:
    """Tensors of a network as they are in a file of this dtype; of tied ones the first."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = TensorEntry(dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape), 0)
    return found


def write_weights(folder: Path, stem: str, specs: Specs, most: int = SHARD) -> None:
    """Writes `stem`.safetensors, or shards with an index where there are more than `most` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, TensorEntry]] = [{}]
    for name, entry in specs.items():
        if shards[-1] and sum(each.num_bytes for each in shards[-1].values()) + entry.num_bytes > most:
            shards.append({})
        shards[-1][name] = entry
    if len(shards) == 1:
        return write_file(folder / f"{stem}.safetensors", specs)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    total = sum(entry.num_bytes for entry in specs.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / f"{stem}.safetensors.index.json").write_text(text)


def write_file(path: Path, specs: Specs, make: Callable[[str, TensorEntry], Tensor] | None = None) -> None:
    """Writes one file of tensors, each made when its turn has come."""
    with path.open("wb") as file:
        file.write(write_header(specs, {"format": "pt"}))
        for name, entry in specs.items():
            file.write((make or drawn)(name, entry).contiguous().view(-1).view(torch.uint8).numpy().data)


def drawn(name: str, entry: TensorEntry) -> Tensor:
    """Weights with which activations keep their size: of spread 1 / sqrt(inputs); norms of 1, biases of 0."""
    if not entry.dtype.is_floating_point:
        return torch.arange(math.prod(entry.shape), dtype=entry.dtype).view(entry.shape)
    if len(entry.shape) < 2:
        is_scale = name.endswith("weight")
        return torch.full(entry.shape, float(is_scale), dtype=entry.dtype)
    spread = 0.02 if "embed_tokens" in name or "token_embedding" in name else (entry.shape[0] / _size(entry)) ** 0.5
    flat, place, at = torch.empty(_size(entry), dtype=entry.dtype), zlib.crc32(name.encode()) % POOL, 0
    while at < len(flat):
        piece = _pool()[place : place + len(flat) - at]
        torch.mul(piece, spread, out=(scaled := torch.empty_like(piece)))
        flat[at : at + len(piece)] = scaled
        at, place = at + len(piece), (place + len(piece) + 7919) % POOL
    return flat.view(entry.shape)


def _size(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


@cache
def _pool() -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0))
