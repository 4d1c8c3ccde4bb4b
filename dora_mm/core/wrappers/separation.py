"""Modules that hold the weights of several layers: finding these layers, separating them, and restoring the module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dora_mm.core.wrappers import attention, experts


def with_projections(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Adds the layers of attentions and experts that are not separated yet to the modules of a model.

    Args:
        modules: The modules by path.

    Returns:
        The modules by path, in the same order, with new projections after each module that holds their weights.
    """
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        found[path] = module
        found |= {inside(path, name): projection for name, projection in projections_of(module).items()}
    return found


def projections_of(module: nn.Module) -> Mapping[str, nn.Module]:
    """New projections of a module by name; empty where it holds none, or they are separated already."""
    return attention.projections_of(module) or experts.projections_of(module)


def inside(path: str, name: str) -> str:
    """The path of a child of the module at `path`, which is empty for the model itself."""
    return f"{path}.{name}" if path else name


def separate(holder: nn.Module, projections: Mapping[str, nn.Module]) -> None:
    """Makes a module call its projections, in place.

    Args:
        holder: A module for which `attention.why_not_separable` returns None.
        projections: Its projections, by name.
    """
    if isinstance(holder, nn.MultiheadAttention):
        attention.separate_projections(holder, projections)
    else:
        experts.separate_experts(holder, projections)


def restore(model: nn.Module) -> None:
    """Restores the modules of a model in which no projection is adapted any longer, in place."""
    for module in list(model.modules()):
        if isinstance(module, attention.PackedAttention):
            attention.restore_attention(module)
        elif isinstance(module, experts.AdaptedExperts):
            experts.restore_experts(module)
