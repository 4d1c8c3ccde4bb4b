"""The cases of the table: how files of an architecture may spell its modules, as files of random values."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import cache
from typing import NamedTuple

import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from dora_mm.formats.naming.known import PATHS, kind_of
from dora_mm.formats.naming.names import TEXT_PREFIX, ModuleGroup, Name, own_table, owners, underscored
from tests.formats.known_names.networks import TINY, component_of, network_of, text_encoder

NETWORK_PREFIXES = (
    "",
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
TEXT_PREFIXES = {
    "clip-l": ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l."),
    "clip-g": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g."),
}
FORMS = {  # by the form: the ends of the keys of A and B, alpha, and the magnitude
    "A": ("lora_A.weight", "lora_B.weight", "", ""),
    "A alpha": ("lora_A.weight", "lora_B.weight", "alpha", ""),
    "A magnitude": ("lora_A.weight", "lora_B.weight", "", "lora_magnitude_vector"),
    "down": ("lora_down.weight", "lora_up.weight", "", ""),
    "down alpha": ("lora_down.weight", "lora_up.weight", "alpha", ""),
    "old": ("lora.down.weight", "lora.up.weight", "", ""),
    "lokr": ("lokr_w2", "lokr_w1", "", ""),
    "lokr alpha": ("lokr_w2", "lokr_w1", "alpha", ""),
}
RANK, ALPHA = 2, 1.0


class Case(NamedTuple):
    """A way to spell the names of an architecture: the prefix, and whose paths follow (a key of `PATHS`)."""

    architecture: str
    prefix: str
    names: str

    def key(self, path: str) -> str:
        """The name of a module in the file."""
        return self.prefix + (underscored(path) if self.prefix.endswith("_") else path)


def cases(architecture: str) -> Iterator[Case]:
    """All of an architecture."""
    for prefix in NETWORK_PREFIXES:
        for names in PATHS:
            dotted = names in ("processor", "xlabs") and prefix.endswith("_")
            old = names == "processor" and component_of(architecture) != "unet"
            if "clip" not in names and not dotted and not old:
                yield Case(architecture, prefix, names)
    for layout in TINY[architecture].text:
        yield from (Case(architecture, prefix, "clip") for prefix in TEXT_PREFIXES[layout])


def layout_of(case: Case) -> str:
    """Which text encoder a case is of."""
    return next(layout for layout in TINY[case.architecture].text if case.prefix in TEXT_PREFIXES[layout])


def paths_of(case: Case) -> dict[str, ModuleGroup]:
    """The paths of a case that the network has, each with the modules that it stands for; norms among them."""
    if case.names != "clip":
        return _paths(case.architecture, case.names)
    component = {"clip-l": "text_encoder", "clip-g": "text_encoder_2"}[layout_of(case)]
    paths = {path.replace("#", "0") for path in PATHS["clip"](case.architecture)}
    return {path: ModuleGroup((Name(component, path),)) for path in sorted(paths)}


@cache
def _paths(architecture: str, names: str) -> dict[str, ModuleGroup]:
    here = {Name(component_of(architecture), path) for path, _ in network_of(architecture).named_modules()}
    if names == "diffusers":
        return {name.path: ModuleGroup((name,)) for name in sorted(here & owners(architecture).keys())}
    if names == "processor":
        found = {}
        for name in sorted(here & owners(architecture).keys()):
            start, dot, last = name.path.removesuffix(".0").rpartition(".to_")
            if dot and last in ("q", "k", "v", "out"):
                found[f"{start}.processor.to_{last}_lora"] = ModuleGroup((name,))
        return found
    kinds = {kind_of(path) for path in PATHS[names](architecture)}
    table = own_table(architecture).items()
    found = {path: group for path, group in table if kind_of(path) in kinds and here >= set(group.names)}
    if names == "own" and component_of(architecture) == "unet":  # of two places of an upsampler a model has one
        found = {path: group for path, group in found.items() if owners(architecture)[group.names[0]] == path}
    return found


def file_of(
    case: Case, form: str, paths: Collection[str] | None = None, model: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[str, Tensor]]]:
    """A file of a case: its tensors, and by the path in the network its name in the file, and the change of its weight.

    Of norms it has differences.

    Args:
        case: The case.
        form: The form of the tensors: a key of `FORMS`.
        paths: Some of `paths_of`; None: all that stand for modules which no earlier one stands for.
        model: Another network. Of one without values the change is multiplied by a vector of ones.
    """
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    meant: dict[str, tuple[str, Tensor]] = {}
    model = model or (text_encoder() if case.names == "clip" else network_of(case.architecture))
    for path, group in paths_of(case).items():
        if path not in paths if paths is not None else any(name.path in meant for name in group.names):
            continue
        W0, key = torch.cat([weight_of(model, name.path) for name in group.names]), case.key(path)
        found, change = _layer(W0, form, generator)
        tensors |= {f"{key}.{end}": tensor for end, tensor in found.items()}
        pieces = [[(0, len(W0))]] if group.is_stored_so else group.pieces(*W0.shape[:2])
        for name, ranges in zip(group.names, pieces, strict=True):
            meant[name.path] = key, torch.cat([change[start:stop] for start, stop in ranges])
    return tensors, meant


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of a module, with or without `text_model.`."""
    modules = dict(model.named_modules())
    return modules.get(path, modules.get(path.removeprefix(TEXT_PREFIX))).weight  # type: ignore


def _layer(W0: Tensor, form: str, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer by the ends of their keys, and the change of its weight that they mean, in float64."""
    out, *inner = W0.shape
    if not inner:
        change = torch.randn(out, generator=generator)
        return {"w_norm": change, "b_norm": torch.zeros(out)}, change.double()
    end_A, end_B, alpha, magnitude = FORMS[form]
    if form.startswith("lokr"):  # of whole factors, whose alpha does nothing
        (rows, inner_rows), (columns, inner_columns) = factorization(out), factorization(inner[0])
        w1 = torch.randn(rows, columns, generator=generator)
        w2 = torch.randn(inner_rows, inner_columns, *inner[1:], generator=generator)
        found = {end_A: w2, end_B: w1} | ({alpha: torch.tensor(ALPHA)} if alpha else {})
        return found, torch.kron(w1.double().view(*w1.shape, *(1,) * (len(inner) - 1)), w2.double())
    A = torch.randn(RANK, *inner, generator=generator)
    B = torch.randn(out, RANK, *(1,) * (len(inner) - 1), generator=generator)
    found = {end_A: A, end_B: B} | ({alpha: torch.tensor(ALPHA)} if alpha else {})
    s = ALPHA / RANK if alpha else 1.0
    if W0.is_meta:
        return found, s * times_ones(A, B)
    change = s * (B.double().flatten(1) @ A.double().flatten(1)).view(W0.shape)
    if magnitude:
        m = torch.rand(out, generator=generator) + 0.5
        found[magnitude] = m.view(1, -1, *(1,) * (len(inner) - 1)) if inner[1:] else m
        V = (W0.double() + change).flatten(1)
        change = (V * (m.double() / V.norm(dim=1))[:, None]).view(W0.shape) - W0.double()
    return found, change


def times_ones(A: Tensor, B: Tensor) -> Tensor:
    """B A times a vector of ones, which needs no memory for the product."""
    return B.double().flatten(1) @ A.double().flatten(1).sum(1)


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Adds a copy of a layer to a network, and the modules above it."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, copy.copy(layer))
