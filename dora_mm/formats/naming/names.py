"""Neutral names of modules, and the tables of the architectures' own names that stand for them: see layouts.py."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from dora_mm.formats.naming.layouts import LAYOUTS

NETWORKS = ("unet", "transformer")
TEXT_PREFIX = "text_model."
_MAX_BLOCKS = 100  # numbers that `#` stands for in a layout
_CLIP = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)(\.|$)")  # where `text_model.` may be missing
_WRAPPERS = ("model", "language_model", "text_model", "transformer")  # parts of a path that only wrap a network


class Name(NamedTuple):
    """A module by its neutral name.

    Attributes:
        component: `unet`, `transformer`, `text_encoder`, `text_encoder_2`, or `model` where there is only one.
        path: The path that diffusers or transformers gives it. In text encoders of CLIP it begins with `text_model.`,
            whether or not the installed transformers has that prefix; `text_projection` does not.
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class ModuleGroup:
    """The modules that one name in a file stands for.

    Attributes:
        names: One module; or several whose rows the file stacks in this order (a fused projection).
        modulation: Whether the module computes shifts and scales, whose two halves of rows are swapped between the
            layouts where it has 2 I rows.
    """

    names: tuple[Name, ...]
    modulation: bool = False

    @property
    def is_stored_so(self) -> bool:
        """Whether it is one module, whose rows are in the file as they are in the module."""
        return len(self.names) == 1 and not self.modulation

    def rows(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The number of rows of each module, in the order of `names`.

        Args:
            out_features: The rows of the fused weight.
            in_features: The columns of the weight.

        Raises:
            ValueError: The rows cannot be divided like this.
        """
        if len(self.names) == 4:  # q, k, v and the first layer of an MLP, of Flux.1
            if out_features != 7 * in_features:
                raise ValueError(
                    f"{self.names[0]} and {len(self.names) - 1} others are stacked in {out_features} rows of "
                    f"{in_features}, which is not how Flux.1 does it (7 rows per column): name the base model"
                )
            return (in_features,) * 3 + (4 * in_features,)
        size, rest = divmod(out_features, len(self.names))
        if rest:
            raise ValueError(f"{self.names[0]} and {len(self.names) - 1} others cannot share {out_features} rows")
        return (size,) * len(self.names)

    def pieces(self, out_features: int, in_features: int) -> list[list[tuple[int, int]]]:
        """For each module the ranges of rows (start, stop) of the file that make up its weight, in its order."""
        if self.modulation and out_features == 2 * in_features:
            return [[(in_features, out_features), (0, in_features)]]
        found, start = [], 0
        for size in self.rows(out_features, in_features):
            found.append([(start, start + size)])
            start += size
        return found


def canonical(component: str, path: str) -> Name:
    """The neutral name of a module that diffusers or transformers calls `path`, with or without `text_model.`."""
    missing = component.startswith("text_encoder") and _CLIP.match(path)
    return Name(component, TEXT_PREFIX + path if missing else path)


def resolve(name: Name, known: Mapping[Name, object], key: str = "") -> Name:
    """The name under which a model has a module.

    The component `model` stands for any. What wraps a network, as in `model.language_model.layers`, may be missing on
    either side or be in another order, since checkpoints of transformers do not name all modules as the models do; so
    may the first part of the path. Only one module may fit.

    Args:
        name: The name to find.
        known: The names of the model.
        key: What the message calls the module; `name` where it is empty.

    Raises:
        ValueError: There is no such module, or there are several; the message has the nearest names.
    """
    if name in known:
        return name
    components = {n.component for n in known} if name.component == "model" else {name.component}
    fits = [exact for component in components if (exact := canonical(component, name.path)) in known]
    if not fits and name.path:
        bare, shorter = _without_wrappers(name.path), name.path.partition(".")[2]
        paths = {n: n.path for n in known if n.component in components}
        fits = [n for n, path in paths.items() if _without_wrappers(path) == bare]
        fits = fits or [n for n, path in paths.items() if shorter == path or path.partition(".")[2] == name.path]
    if len(fits) > 1:
        raise ValueError(f"{key or name} may stand for {' or '.join(map(str, fits))}")
    if not fits:
        raise UnknownModuleError(key or str(name), name.path, known)
    return fits[0]


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


class UnknownModuleError(ValueError):
    """The error for a key that stands for no module. Only its message takes the time to find the nearest names.

    Args:
        key: The key.
        path: What of it is compared with the names, dotted or underscored.
        names: The names that there are.
    """

    def __init__(self, key: str, path: str, names: Iterable[Name]):
        self._key, self._path, self._names = key, path, names

    @cached_property
    def _message(self) -> str:
        spelled = {underscored(name.path): name for name in self._names}
        close = difflib.get_close_matches(underscored(self._path)[:200], spelled, n=3)
        nearest = f"; nearest: {', '.join(str(spelled[match]) for match in close)}" if close else ""
        return f"{self._key[:200]} is not the name of a module{nearest}"

    def __str__(self) -> str:
        return self._message


def architecture_of(names: Iterable[Name]) -> str | None:
    """The architecture of the network that has these modules, of a whole model or of an adapter.

    Returns:
        A key of `LAYOUTS`; None where there is no network among the names, or none that has a table, or where the few
        names of an adapter fit several.
    """
    names = set(names)
    for component in NETWORKS:
        if own := {name for name in names if name.component == component}:
            layouts = layouts_of(component)
            fits = [layout for layout in layouts if _required(layout) <= own]  # a whole model
            fits = fits or [layout for layout in layouts if _may_have(layout, own)]
            fits = [layout for layout in fits if LAYOUTS[layout].like not in fits]
            return fits[0] if len(fits) == 1 or (fits and component == "unet") else None
    return None


def _may_have(layout: str, names: Set[Name]) -> bool:
    return names <= owners(layout).keys() and not any(re.match(LAYOUTS[layout].beyond, name.path) for name in names)


@cache
def layouts_of(component: str) -> tuple[str, ...]:
    """The architectures that have tables for a component."""
    return tuple(name for name, layout in LAYOUTS.items() if layout.component == component)


@cache
def _required(layout: str) -> frozenset[Name]:
    """Modules that every model of an architecture has."""
    component, rules, optional = LAYOUTS[layout].component, LAYOUTS[layout].names, LAYOUTS[layout].optional
    paths = [path.replace("#", "0") for meaning in rules.values() for path in expanded(meaning)]
    return frozenset(Name(component, path) for path in paths if not re.match(optional, path))


def underscored(path: str) -> str:
    """The path as an underscored name has it."""
    return path.replace(".", "_")


@cache
def own_table(layout: str) -> dict[str, ModuleGroup]:
    """The module group of each own path; that of a fused projection also with the number of a part (OneTrainer)."""
    component, rules, *_ = LAYOUTS[layout]
    found: dict[str, ModuleGroup] = {}
    for rule, meaning in rules.items():
        for block in range(_MAX_BLOCKS) if "#" in rule else (0,):
            own = rule.replace("#", str(block))
            names = tuple(Name(component, path.replace("#", str(block))) for path in expanded(meaning))
            is_modulation = (
                own.endswith("adaLN_modulation.1") and "refiner" not in own
            )  # HunyuanVideo's as in diffusers
            found[own] = ModuleGroup(names, modulation=is_modulation)
            if len(names) > 1:
                found |= {f"{own}.{number}": ModuleGroup((name,)) for number, name in enumerate(names)}
    return found


def expanded(path: str) -> list[str]:
    """Writes out the braces: `a.{b,c}` is `a.b` and `a.c`."""
    before, brace, rest = path.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{part}{after}" for part in inside.split(",")] if brace else [path]


@cache
def owners(layout: str) -> dict[Name, str]:
    """The own path that holds each module, the first of several."""
    found: dict[Name, str] = {}
    for own, group in own_table(layout).items():
        for name in group.names:
            found.setdefault(name, own)
    return found
