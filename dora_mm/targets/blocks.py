"""Building blocks of the target maps of language models and diffusion transformers: blocks below a path.

Paths are those of `named_modules()`; the keys of a saved model may differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dora_mm.core.targets import Counts, TargetMap

TEXT = ("text.attn", "text.mlp")  # the parts that are adapted by default: the language model alone


@dataclass(frozen=True)
class Block:
    """The adapted layers of one kind of block.

    Attributes:
        path: A regular expression for the path of the block.
        parts: For each part, a regular expression for the layers below that path, and how many there are in a block.
    """

    path: str
    parts: Mapping[str, tuple[str, Counts]]


def compose(
    name: str, *blocks: Block, layers: Mapping[str, str] = MappingProxyType({}), default: tuple[str, ...] = TEXT
) -> TargetMap:
    """A target map of blocks, whose counts it checks, and of single layers.

    Args:
        name: The name of the map.
        blocks: The blocks. A part may be in several of them.
        layers: For a part, a regular expression for the full path of layers outside of blocks.
        default: The parts that are adapted unless others are named.
    """
    patterns: dict[str, list[str]] = {}
    for block in blocks:
        for part, (below, _) in block.parts.items():
            patterns.setdefault(part, []).append(rf"re:{block.path}\.({below})")
    for part, path in layers.items():
        patterns.setdefault(part, []).append(f"re:{path}")
    expect = {f"re:{block.path}": {part: count for part, (_, count) in block.parts.items()} for block in blocks}
    return TargetMap(name, {part: tuple(found) for part, found in patterns.items()}, expect, default)


def either(*kinds: Block) -> Block:
    """A block that is of one kind in one model, and of another kind in another."""
    parts: dict[str, tuple[str, Counts]] = {}
    for part in dict.fromkeys(part for kind in kinds for part in kind.parts):
        found = [kind.parts.get(part, ("", 0)) for kind in kinds]
        numbers = {number for _, counts in found for number in ((counts,) if isinstance(counts, int) else counts)}
        parts[part] = _any(below for below, _ in found if below), tuple(sorted(numbers))
    return Block(f"({_any(kind.path for kind in kinds)})", parts)


def _any(expressions: Iterable[str]) -> str:
    return "|".join(dict.fromkeys(expressions))
