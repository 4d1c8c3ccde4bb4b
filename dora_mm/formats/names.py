"""Names of modules: how each tool spells them in adapter files, and the neutral name that all of them stand for.

An underscored name does not say which of its underscores were dots (`to_out_0`, `conv_in`). It is looked up among the
names of the base model, where they are given, or else among those of the known architectures: see layouts.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from dora_mm.formats.layouts import LAYOUTS

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
class Target:
    """What a module name in a file stands for.

    Attributes:
        names: One module; or several whose rows the file stacks in this order (a fused projection).
        modulation: Whether the module computes shifts and scales, whose two halves of rows change places between the
            layouts where it has 2 I rows.
    """

    names: tuple[Name, ...]
    modulation: bool = False

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


_UNDERSCORED = {  # the components that a prefix may stand for
    "lora_unet_": NETWORKS,
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # T5 of SD3 and of Flux.1, which only a base model names
    "lycoris_": (*NETWORKS, "model"),
}
_DOTTED = {  # the first that fits
    "base_model.model.": ("model",),
    "model.diffusion_model.": NETWORKS,
    "diffusion_model.": NETWORKS,
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "clip_l.": ("text_encoder",),
    "clip_g.": ("text_encoder_2",),
    **{f"{component}.": (component,) for component in (*NETWORKS, "text_encoder", "text_encoder_2")},
}
_OWN_FIRST = ("model.diffusion_model.", "diffusion_model.")  # after these a path is the own one, if it can be both
_OPTIONAL = re.compile(r"guidance_embedder|\.attn2\.|^context_refiner.*adaLN|^(down|up)_blocks|^mid_block")


class _Style(NamedTuple):
    prefix: str
    own: bool = False  # the network's own path instead of diffusers'


_KOHYA_TEXT = {"text_encoder": _Style("lora_te1_"), "text_encoder_2": _Style("lora_te2_")}
_STYLES: dict[str, dict[str, _Style]] = {
    "diffusers": {component: _Style(f"{component}.") for component in (*NETWORKS, "text_encoder", "text_encoder_2")},
    "peft": {c: _Style("base_model.model.") for c in ("model", *NETWORKS, "text_encoder", "text_encoder_2")},
    "kohya": {**dict.fromkeys(NETWORKS, _Style("lora_unet_", own=True)), **_KOHYA_TEXT},
    "kohya-diffusers": {"unet": _Style("lora_unet_"), **_KOHYA_TEXT},
    "onetrainer": {"unet": _Style("lora_unet_"), "transformer": _Style("lora_transformer_"), **_KOHYA_TEXT},
    "ai-toolkit": {"unet": _Style("lora_unet_"), "transformer": _Style("transformer."), **_KOHYA_TEXT},
    "lycoris": dict.fromkeys((*NETWORKS, "model"), _Style("lycoris_")),
    "comfy": {
        **dict.fromkeys(NETWORKS, _Style("diffusion_model.", own=True)),
        "text_encoder": _Style("text_encoders.clip_l.transformer."),
        "text_encoder_2": _Style("text_encoders.clip_g.transformer."),
    },
}
SPELLINGS: tuple[str, ...] = tuple(_STYLES)


class Names:
    """Translates the module names of one adapter file.

    Args:
        known: The names of the modules of the base model. They decide where an underscored name has several readings,
            and a name that is not among them is refused. Without them, tables of the known architectures decide.
        architecture: `sdxl`, `sd1`, `flux`, `flux2`, `sd3`, `z-image` or `qwen-image`: whose own names are read and
            written where `known` does not tell. Without both, own names that Flux.1 and Flux.2 share are Flux.1's.

    Raises:
        ValueError: There is no such architecture.
    """

    def __init__(self, known: Iterable[Name] = (), architecture: str | None = None):
        if architecture is not None and architecture not in LAYOUTS:
            raise ValueError(f"there is no architecture {architecture!r}; there are {', '.join(LAYOUTS)}")
        self._known = dict.fromkeys(known)
        self._architecture = architecture or architecture_of(self._known)
        self._spelled: dict[str, dict[str, list[str]]] = {}  # component -> underscored path -> paths
        for component, path in self._known:
            self._spelled.setdefault(component, {}).setdefault(_underscored(path), []).append(path)

    def read(self, key: str) -> Target:
        """The modules that a module name of a file stands for.

        Args:
            key: The key in the file without the name of the tensor: `lora_unet_input_blocks_4_1_proj_in` of
                `lora_unet_input_blocks_4_1_proj_in.lora_down.weight`. Any spelling is accepted.

        Raises:
            ValueError: There is no such module; the message has the nearest known names.
        """
        if prefix := next((p for p in _UNDERSCORED if key.startswith(p)), None):
            found = self._read_underscored(key, key.removeprefix(prefix), _UNDERSCORED[prefix])
        else:
            prefix = next((p for p in _DOTTED if key.startswith(p)), "")
            found = self._read_dotted(key, prefix)
        if found is None:
            components = _UNDERSCORED.get(prefix) or _DOTTED.get(prefix, ())
            raise self._unknown(key, key.removeprefix(prefix), components)
        if not self._known:
            return found
        return Target(tuple(resolve(name, self._known, key) for name in found.names), found.modulation)

    def _read_underscored(self, key: str, rest: str, components: Iterable[str]) -> Target | None:
        for component in components:
            paths = self._spelled.get(component, {}).get(rest, [])
            if len(paths) > 1:
                raise ValueError(f"the key {key} may stand for {' or '.join(paths)}, which are spelled the same")
            if paths:
                return Target((Name(component, paths[0]),))
            for layout in self._layouts(component):
                if target := _underscored_table(layout).get(rest):
                    return target
        return None

    def _read_dotted(self, key: str, prefix: str) -> Target | None:
        rest = key.removeprefix(prefix)
        components = _DOTTED.get(prefix, ("model",))
        for component in components:
            name, layouts = canonical(component, rest), self._layouts(component)
            itself = name in self._known or any(name in _owners(layout) for layout in layouts)
            own = next((table[rest] for layout in layouts if rest in (table := _own_table(layout))), None)
            if itself and (own is None or prefix not in _OWN_FIRST):
                return Target((name,))
            if own:
                return own
        as_it_is = len(components) == 1 and (prefix or self._known)  # checked against the known names, if there are any
        return Target((canonical(components[0], rest),)) if as_it_is else None

    def _layouts(self, component: str) -> list[str]:
        """The architectures whose tables may hold the names of a component, the likeliest first."""
        if component in NETWORKS and (self._known or self._architecture):
            mine = self._architecture  # None: a base model without a table, of which only its own names are read
            return [mine] if mine and LAYOUTS[mine][0] == component else []
        return _layouts_of(component)

    def _unknown(self, key: str, rest: str, components: Iterable[str]) -> ValueError:
        if self._known:
            names: Iterable[Name] = self._known
        else:
            layouts = [name for component in components for name in self._layouts(component)]
            names = (name for layout in layouts for target in _own_table(layout).values() for name in target.names)
        return unknown(key, rest, names)

    def write(self, names: Collection[Name], spelling: str) -> dict[str, Target]:
        """The module names of a file.

        Args:
            names: The modules to write.
            spelling: One of `SPELLINGS`.

        Returns:
            By the name in the file: the modules that it holds. A fused one lists all modules that it consists of, in
            the order of its rows, also those that are not in `names`: see `fused.untouched`.

        Raises:
            ValueError: The spelling has no name for a module, or one name for two.
        """
        if spelling not in _STYLES:
            raise ValueError(f"there is no spelling {spelling!r} of names; there are {', '.join(SPELLINGS)}")
        found: dict[str, Target] = {}
        layout = self._architecture or architecture_of(names)
        for name in names:
            style = _STYLES[spelling].get(name.component)
            if style is None:
                raise ValueError(f"{spelling} files have no name for {name}: they hold {', '.join(_STYLES[spelling])}")
            path, target = _own(name, layout) if style.own else (name.path, Target((name,)))
            key = style.prefix + (_underscored(path) if style.prefix.endswith("_") else path)
            if found.setdefault(key, target) != target:
                raise ValueError(f"{name} and {found[key].names[0]} have the same name in {spelling} files: {key}")
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
        raise unknown(key or str(name), name.path, known)
    return fits[0]


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def unknown(key: str, path: str, names: Iterable[Name]) -> ValueError:
    """The error for a key that stands for no module.

    Args:
        key: The key.
        path: What of it is compared with the names, dotted or underscored.
        names: The names that there are.
    """
    spelled = {_underscored(name.path): name for name in names}
    close = difflib.get_close_matches(_underscored(path)[:200], spelled, n=3)
    nearest = f"; nearest: {', '.join(str(spelled[match]) for match in close)}" if close else ""
    return ValueError(f"{key[:200]} is not the name of a module{nearest}")


def architecture_of(names: Iterable[Name]) -> str | None:
    """The architecture of the network that has these modules, of a whole model or of an adapter.

    Returns:
        A key of `LAYOUTS`; None where there is no network among the names, or none that has a table, or where the few
        names of an adapter fit several.
    """
    names = set(names)
    for component in NETWORKS:
        if own := {name for name in names if name.component == component}:
            layouts = _layouts_of(component)
            fits = [layout for layout in layouts if _required(layout) <= own]  # a whole model
            fits = fits or [layout for layout in layouts if own <= _owners(layout).keys()]
            return fits[0] if len(fits) == 1 or (fits and component == "unet") else None
    return None


def _layouts_of(component: str) -> list[str]:
    return [layout for layout, (owner, _) in LAYOUTS.items() if owner == component]


@cache
def _required(layout: str) -> frozenset[Name]:
    """Modules that every model of an architecture has."""
    component, rules = LAYOUTS[layout]
    paths = [path.replace("#", "0") for meaning in rules.values() for path in _expanded(meaning)]
    return frozenset(Name(component, path) for path in paths if not _OPTIONAL.search(path))


def own_target(layout: str, path: str) -> Target | None:
    """What an own path of a layout stands for; None if it is unknown."""
    return _own_table(layout).get(path)


def _own(name: Name, layout: str | None) -> tuple[str, Target]:
    """The own path that holds a module, and all that it holds."""
    if layout is None or LAYOUTS[layout][0] != name.component:
        raise ValueError(f"the own name of {name} is unknown, or differs between architectures: name the base model")
    path = _owners(layout).get(name)
    if path is None:
        raise unknown(str(name), name.path, _owners(layout))
    return path, _own_table(layout)[path]


def _underscored(path: str) -> str:
    return path.replace(".", "_")


@cache
def _own_table(layout: str) -> dict[str, Target]:
    """What each own path stands for; that of a fused projection also with the number of a part (OneTrainer)."""
    component, rules = LAYOUTS[layout]
    found: dict[str, Target] = {}
    for rule, meaning in rules.items():
        for block in range(_MAX_BLOCKS) if "#" in rule else (0,):
            own = rule.replace("#", str(block))
            names = tuple(Name(component, path.replace("#", str(block))) for path in _expanded(meaning))
            found[own] = Target(names, modulation=own.endswith("adaLN_modulation.1"))
            if len(names) > 1:
                found |= {f"{own}.{number}": Target((name,)) for number, name in enumerate(names)}
    return found


def _expanded(path: str) -> list[str]:
    """Writes out the braces: `a.{b,c}` is `a.b` and `a.c`."""
    before, brace, rest = path.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{part}{after}" for part in inside.split(",")] if brace else [path]


@cache
def _owners(layout: str) -> dict[Name, str]:
    """The own path that holds each module, the first of several."""
    found: dict[Name, str] = {}
    for own, target in _own_table(layout).items():
        for name in target.names:
            found.setdefault(name, own)
    return found


@cache
def _underscored_table(layout: str) -> dict[str, Target]:
    """What each underscored path stands for: own paths, and those of diffusers and transformers."""
    own = {_underscored(path): target for path, target in _own_table(layout).items()}
    names = {_underscored(name.path): Target((name,)) for name in _owners(layout)}
    return {**names, **own}
