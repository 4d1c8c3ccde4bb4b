"""How each tool spells the names of modules in adapter files.

An underscored name does not say which of its underscores were dots (`to_out_0`, `conv_in`). It is looked up among the
names of the base model, where they are given, or else among those of the known architectures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

from dora_mm.formats.naming.known import reading
from dora_mm.formats.naming.layouts import LAYOUTS
from dora_mm.formats.naming.names import (
    NETWORKS,
    TEXT_PREFIX,
    ModuleGroup,
    Name,
    UnknownModuleError,
    architecture_of,
    canonical,
    layouts_of,
    own_table,
    owners,
    resolve,
    underscored,
)

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
_CLIP = re.compile(r"encoder_layers_|embeddings_|final_layer_norm$")  # LyCORIS with transformers 5 has no text_model_
_OWN_FIRST = ("model.diffusion_model.", "diffusion_model.")  # after these a path is the own one, if it can be both


class Style(NamedTuple):
    """How the names of a component begin, and whether the network's own path follows instead of diffusers'."""

    prefix: str
    own: bool = False


class Spelling(NamedTuple):
    """How a form of file spells the names of modules: its name, and the style of each component that it holds."""

    name: str
    styles: Mapping[str, Style]
    table: str = ""  # the tool (see known.py) that decides between several own names of a module


_TEXT = ("text_encoder", "text_encoder_2")
_KOHYA_TEXT = {"text_encoder": Style("lora_te1_"), "text_encoder_2": Style("lora_te2_")}
DIFFUSERS = Spelling("diffusers", {component: Style(f"{component}.") for component in (*NETWORKS, *_TEXT)})
PEFT = Spelling("peft", dict.fromkeys(("model", *NETWORKS, *_TEXT), Style("base_model.model.")))
KOHYA = Spelling("kohya", {**dict.fromkeys(NETWORKS, Style("lora_unet_", own=True)), **_KOHYA_TEXT})
COMFY = Spelling("kohya", KOHYA.styles, "comfyui")
ONETRAINER = Spelling(
    "onetrainer", {"unet": Style("lora_unet_"), "transformer": Style("lora_transformer_"), **_KOHYA_TEXT}
)
AI_TOOLKIT = Spelling("ai-toolkit", {"unet": Style("lora_unet_"), "transformer": Style("transformer."), **_KOHYA_TEXT})


_PROCESSOR = re.compile(r"(.*)\.processor\.(\w+)_lora")
_TEXT_LAYER = re.compile(r"(.*\.self_attn)\.to_(q|k|v|out)_lora")


def without_processor(key: str) -> str:
    """The name of a module that diffusers of 2023 calls `attn.processor.to_q_lora`, or `self_attn.to_q_lora`."""
    if found := _TEXT_LAYER.fullmatch(key):
        return f"{found[1]}.{found[2]}_proj"
    found = _PROCESSOR.fullmatch(key)
    if found is None or found[2] in ("qkv", "proj"):  # those of XLabs are in a table
        return key
    return f"{found[1]}.{found[2]}" + (".0" if found[2] == "to_out" else "")


class Namer(Protocol):
    """Says what the names of modules in a file stand for, as `Names` does."""

    def read(self, key: str) -> ModuleGroup:
        """The modules that a module name of a file stands for."""
        ...


class Names:
    """Translates the module names of one adapter file.

    Args:
        known: The names of the modules of the base model. They decide where an underscored name has several readings,
            and a name that is not among them is refused. Without them, tables of the known architectures decide, and
            own names that Flux.1 and Flux.2 share are Flux.1's.
    """

    def __init__(self, known: Iterable[Name] = ()):
        self._known = dict.fromkeys(known)
        self._architecture = architecture_of(self._known)
        self._spelled: dict[str, dict[str, list[str]]] = {}  # component -> underscored path -> paths
        for component, path in self._known:
            self._spelled.setdefault(component, {}).setdefault(underscored(path), []).append(path)

    def read(self, key: str) -> ModuleGroup:
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
            found = self._read_dotted(without_processor(key).removeprefix(prefix), prefix)
        if found is None:
            components = _UNDERSCORED.get(prefix) or _DOTTED.get(prefix, NETWORKS)
            raise self._unknown(key, key.removeprefix(prefix), components)
        if not self._known:
            return found
        return ModuleGroup(tuple(resolve(name, self._known, key) for name in found.names), found.modulation)

    def _read_underscored(self, key: str, rest: str, components: Iterable[str]) -> ModuleGroup | None:
        for component in components:
            if component.startswith("text_encoder") and _CLIP.match(rest):
                rest = underscored(TEXT_PREFIX) + rest
            paths = self._spelled.get(component, {}).get(rest, [])
            if len(paths) > 1:
                raise ValueError(f"the key {key} may stand for {' or '.join(paths)}, which are spelled the same")
            if paths:
                return ModuleGroup((Name(component, paths[0]),))
            for layout in self._layouts(component):
                if group := _underscored_table(layout).get(rest):
                    return group
        return None

    def _read_dotted(self, rest: str, prefix: str) -> ModuleGroup | None:
        components = _DOTTED.get(prefix, (*NETWORKS, "model"))
        for component in components:
            name, layouts = canonical(component, rest), self._layouts(component)
            itself = name in self._known or any(name in owners(layout) for layout in layouts)
            own = next((table[rest] for layout in layouts if rest in (table := own_table(layout))), None)
            if itself and (own is None or prefix not in _OWN_FIRST):
                return ModuleGroup((name,))
            if own:
                return own
        as_it_is = len(components) == 1 if prefix else self._known  # checked against the known names, if there are any
        return ModuleGroup((canonical(components[-1], rest),)) if as_it_is else None

    def _layouts(self, component: str) -> Sequence[str]:
        """The architectures whose tables may hold the names of a component, the likeliest first."""
        if component in NETWORKS and self._known:
            mine = self._architecture  # None: a base model without a table, of which only its own names are read
            return [mine] if mine and LAYOUTS[mine].component == component else []
        return layouts_of(component)

    def _unknown(self, key: str, rest: str, components: Iterable[str]) -> ValueError:
        if self._known:
            names: Iterable[Name] = self._known
        else:
            layouts = [name for component in components for name in self._layouts(component)]
            names = (name for layout in layouts for group in own_table(layout).values() for name in group.names)
        return UnknownModuleError(key, rest, names)

    def write(self, names: Collection[Name], spelling: Spelling) -> dict[str, ModuleGroup]:
        """The module names of a file.

        Args:
            names: The modules to write.
            spelling: How their names are spelled.

        Returns:
            By the name in the file: the modules that it holds. A fused one lists all modules that it consists of, in
            the order of its rows, also those that are not in `names`: see `fused.untouched`.

        Raises:
            ValueError: The spelling has no name for a module, or one name for two.
        """
        found: dict[str, ModuleGroup] = {}
        layout = self._architecture or architecture_of(names)
        for name in names:
            style = spelling.styles.get(name.component)
            if style is None:
                styles = ", ".join(spelling.styles)
                raise ValueError(f"{spelling.name} files have no name for {name}: they hold {styles}")
            path, group = _own(name, layout) if style.own else (name.path, ModuleGroup((name,)))
            if style.own and layout and spelling.table:
                path = _known(path, group, layout, style, spelling.table)
            key = _key(style, path)
            if found.setdefault(key, group) != group:
                raise ValueError(f"{name} and {found[key].names[0]} have the same name in {spelling.name} files: {key}")
        return found


def _own(name: Name, layout: str | None) -> tuple[str, ModuleGroup]:
    """The own path that holds a module, and all that it holds."""
    if layout is None or LAYOUTS[layout].component != name.component:
        raise ValueError(f"the own name of {name} is unknown, or differs between architectures: name the base model")
    path = owners(layout).get(name)
    if path is None:
        raise UnknownModuleError(str(name), name.path, owners(layout))
    return path, own_table(layout)[path]


def _key(style: Style, path: str) -> str:
    return style.prefix + (underscored(path) if style.prefix.endswith("_") else path)


def _known(path: str, group: ModuleGroup, layout: str, style: Style, tool: str) -> str:
    """The first own path of the same modules that a tool reads; the one that is given where it reads none."""
    if reading(tool, layout, {_key(style, path): ()}).lost:
        return path
    others = (other for other, same in own_table(layout).items() if same == group)
    return next((other for other in others if reading(tool, layout, {_key(style, other): ()}).lost), path)


@cache
def _underscored_table(layout: str) -> dict[str, ModuleGroup]:
    """The module group of each underscored path: own paths, and those of diffusers and transformers."""
    own = {underscored(path): group for path, group in own_table(layout).items()}
    names = {underscored(name.path): ModuleGroup((name,)) for name in owners(layout)}
    return {**names, **own}


def architecture_of_keys(keys: Iterable[str]) -> str | None:
    """The architecture whose own names all modules of a network in a file have; None where there is not just one."""
    rests: list[tuple[bool, str]] = []
    for key in keys:
        flat = next((prefix for prefix in _UNDERSCORED if key.startswith(prefix)), "")
        prefix = flat or next((prefix for prefix in _DOTTED if key.startswith(prefix)), "")
        if "transformer" in (_UNDERSCORED | _DOTTED).get(prefix, NETWORKS) or prefix == "base_model.model.":
            rests.append((bool(flat), key.removeprefix(prefix)))
    layouts = layouts_of("transformer") if rests else []
    fits = [layout for layout in layouts if all(rest in _own_names(layout, flat) for flat, rest in rests)]
    fits = [layout for layout in fits if LAYOUTS[layout].like not in fits]
    return fits[0] if len(fits) == 1 else None


@cache
def _own_names(layout: str, flat: bool) -> frozenset[str]:
    return frozenset(underscored(path) if flat else path for path in own_table(layout))
