"""TargetMap: which modules of one architecture are adapted, as data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.kinds import adapted_class, not_adaptable
from dora_mm.core.wrappers.separation import with_projections

Counts = int | tuple[int, ...]  # how many modules a block holds; a tuple lists the allowed numbers


@dataclass(frozen=True)
class TargetMap:
    """Which modules of an architecture are adapted, by part.

    Attributes:
        name: The name of the map, for error messages; empty for patterns that are in no map.
        parts: The patterns of each part. A plain pattern is a dotted suffix of the module's path (`to_out.0`); `re:`
            marks a regular expression that matches the full path.
        expect: How many modules of each part a block holds, by block, then by part. A block is named by its class, or
            by `re:` and a regular expression that matches its full path. It is checked in every block of a model,
            whatever the model's size; without any part it only says what a block is. A map with a single part may give
            the number directly.
        default: The parts that are selected when none are named; all parts if empty.

    Raises:
        ValueError: `default` or `expect` names a part that does not exist, or `expect` does not name the part of a
            count in a map of several parts.
    """

    name: str
    parts: Mapping[str, Sequence[str]]
    expect: Mapping[str, Counts | Mapping[str, Counts]] = field(default_factory=dict)
    default: Sequence[str] = ()

    def __post_init__(self):
        for part in (*self.default, *(p for c in self.expect.values() if isinstance(c, Mapping) for p in c)):
            self._require(part)
        if len(self.parts) != 1 and any(not isinstance(c, Mapping) for c in self.expect.values()):
            raise ValueError(f"target map {self.name} has several parts: expect must name the part of each count")

    def select(self, parts: Sequence[str] | None = None) -> TargetMap:
        """Returns the map with only some of its parts.

        Args:
            parts: The names of the parts; None selects the default ones.

        Raises:
            ValueError: There is no such part, or none was selected.
        """
        chosen = tuple(parts if parts is not None else self.default or self.parts)
        if not chosen:
            raise ValueError(f"no part of target map {self.name} is selected; it has {', '.join(self.parts)}")
        for part in chosen:
            self._require(part)
        expect = {block: {p: n for p, n in self.counts(block).items() if p in chosen} for block in self.expect}
        return TargetMap(self.name, {part: self.parts[part] for part in chosen}, expect)

    def counts(self, block: str) -> Mapping[str, Counts]:
        """The expected number of modules of each part in a block, a key of `expect`."""
        counts = self.expect[block]
        return counts if isinstance(counts, Mapping) else {next(iter(self.parts)): counts}

    def _require(self, part: str) -> None:
        if part not in self.parts:
            raise ValueError(f"target map {self.name} has no part {part!r}; it has {', '.join(self.parts)}")


def match_modules(model: nn.Module, targets: TargetMap) -> dict[str, str]:
    """Finds the modules that a target map selects.

    Args:
        model: The model, which is not changed.
        targets: The map; all its parts are matched.

    Returns:
        The part of each selected module by its path, in the order of the model.

    Raises:
        ValueError: A pattern is not a valid regular expression, matches nothing or matches a module that cannot be
            adapted; two parts select the same module; or a block holds a different number of modules than the map
            expects.
    """
    modules = with_projections(dict(model.named_modules()))
    taken: dict[str, str] = {}
    where = f"target map {targets.name}" if targets.name else ""
    for part, patterns in targets.parts.items():
        for pattern in patterns:
            for path in matching(pattern, modules, where):
                if taken.setdefault(path, part) != part:
                    raise ValueError(f"{path} is in two parts of target map {targets.name}: {taken[path]} and {part}")
    _check_counts(modules, taken, targets)
    return {path: taken[path] for path in modules if path in taken}


def parts_in(model: nn.Module, targets: TargetMap) -> list[str]:
    """The parts of a target map of which a model has any module: a map may be for models that lack some.

    Raises:
        ValueError: A pattern is not a valid regular expression.
    """
    paths = with_projections(dict(model.named_modules()))
    return [
        part
        for part, patterns in targets.parts.items()
        if any(matches(pattern, path, f"target map {targets.name}") for pattern in patterns for path in paths)
    ]


def blocks_of(model: nn.Module, targets: TargetMap) -> list[str]:
    """The paths of the blocks of a model that a target map names, in the order of the model."""
    modules = dict(model.named_modules())
    found = {path for block in targets.expect for path in _blocks(block, modules, targets.name)}
    return [path for path in modules if path in found]


def matching(pattern: str, modules: Mapping[str, nn.Module], where: str) -> list[str]:
    """The paths that a pattern matches, all of modules that can be adapted; `where` it is from, for errors.

    Raises:
        ValueError: It is not a valid regular expression, matches nothing, or a module that cannot be adapted.
    """
    found = [path for path in modules if matches(pattern, path, where)]
    wrong = next((path for path in found if not adaptable(modules[path])), None)
    if wrong is not None:
        raise ValueError(
            f"{pattern_text(pattern, where)} matches {wrong or 'the model itself'}, {not_adaptable(modules[wrong])}"
        )
    if not found:
        raise ValueError(f"{pattern_text(pattern, where)} matches no module; nearest: {_nearest(pattern, modules)}")
    return found


def pattern_text(pattern: str, where: str) -> str:
    """A pattern for a message, cut if it is long; `where` says where it is from, if that is not plain."""
    shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
    return f"pattern {shown!r} of {where}" if where else f"pattern {shown!r}"


def matches(pattern: str, path: str, where: str) -> bool:
    """Whether a path matches a pattern: a dotted suffix, or `re:` and a regular expression; `where` is for errors."""
    if not pattern.startswith("re:"):
        return path == pattern or path.endswith("." + pattern)
    try:
        return re.fullmatch(pattern[3:], path) is not None
    except re.error as error:
        raise ValueError(f"{pattern_text(pattern, where)} is not a valid regular expression: {error}") from error


def adaptable(module: nn.Module) -> bool:
    """Whether the module is adapted or can be."""
    return isinstance(module, AdaptedLayer) or adapted_class(module) is not None


def _nearest(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """The names of adaptable modules, or the ends of their paths, that are most similar to the pattern."""
    wanted = re.sub(r"\\d\+?|\.\*|[\\^$()]", "", pattern.removeprefix("re:")).strip(".")
    names: dict[str, str] = {}
    for path, module in modules.items():
        if adaptable(module):
            pieces = path.split(".")
            for length in (1, 2, 3, len(pieces)):
                names.setdefault(".".join(pieces[-length:]), path)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or _nearest_words(pattern, names)[:3]
    return ", ".join(close) or "none (there is no other module that can be adapted)"


def _nearest_words(pattern: str, names: Mapping[str, str]) -> list[str]:
    """The single names, most similar first to any word of a pattern that lists many alternatives."""
    words = set(re.findall(r"[A-Za-z]\w+", pattern)) or {pattern}

    def ratio(name: str) -> float:
        return max(difflib.SequenceMatcher(None, name, word).ratio() for word in words)

    return sorted((name for name in names if "." not in name), key=ratio, reverse=True)


def _check_counts(modules: Mapping[str, nn.Module], taken: Mapping[str, str], targets: TargetMap) -> None:
    for block in targets.expect:
        paths = _blocks(block, modules, targets.name)
        if not paths and targets.counts(block):
            raise ValueError(
                f"target map {targets.name} expects blocks {block}, and the model has none; nearest: "
                f"{_nearest_blocks(block, modules)}"
            )
        for path in paths:
            _check_block(path, block, modules, taken, targets)


def _check_block(
    path: str, block: str, modules: Mapping[str, nn.Module], taken: Mapping[str, str], targets: TargetMap
) -> None:
    start = f"{path}." if path else ""
    inside = {p: module for p, module in modules.items() if p.startswith(start)}
    for part, expected in targets.counts(block).items():
        allowed = (expected,) if isinstance(expected, int) else tuple(expected)
        found = [p for p in inside if taken.get(p) == part]
        if len(found) not in allowed:
            others = {p: module for p, module in inside.items() if p not in taken}
            raise ValueError(
                f"target map {targets.name} expects {' or '.join(map(str, allowed))} modules of part {part} in each "
                f"{'block' if block.startswith('re:') else block}, and {path or 'the model'} has {len(found)}: "
                f"{', '.join(found) or 'none'}; nearest of the others: {_nearest(targets.parts[part][0], others)}"
            )


def _blocks(block: str, modules: Mapping[str, nn.Module], map_name: str) -> list[str]:
    """The paths of the blocks that a key of `expect` names."""
    if block.startswith("re:"):
        return [path for path in modules if matches(block, path, f"target map {map_name}")]
    return [path for path, module in modules.items() if type(module).__name__ == block]


def _nearest_blocks(block: str, modules: Mapping[str, nn.Module]) -> str:
    names = [path if block.startswith("re:") else type(module).__name__ for path, module in modules.items()]
    distinct = list(dict.fromkeys(names))
    return ", ".join(difflib.get_close_matches(block, distinct, n=3, cutoff=0.0))
