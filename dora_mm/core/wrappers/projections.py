"""Layers over a parameter, or a part of one, that another module holds: the projections of their holder.

The holder keeps its parameters and their names. Before any of its projections is adapted, it keeps its class, too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dora_mm.core.adaptation import ADAPTER_NAMES
from dora_mm.core.adapted import AdaptedLayer


class Projection(nn.Module):
    """A layer whose weight belongs to its holder; a subclass says which one that is.

    Args:
        holder: The module that has the parameter.
    """

    def __init__(self, holder: Any):
        super().__init__()
        self.train(holder.training)
        self.holder = (holder,)  # the tuple hides it from the module's children


class AdaptedProjection(AdaptedLayer):
    """Mixin for adapted projections."""

    parameter_names = ADAPTER_NAMES  # the weight is the holder's
    holder: tuple[nn.Module]

    @property
    def owner(self) -> nn.Module:
        return self.holder[0]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Loads the adapter if the state dict has it. The weight was loaded by the holder."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class ProjectionHolder(nn.Module):
    """Mixin for the classes of holders whose projections are adapted."""

    def parameters_of_projections(self) -> dict[str, str]:
        """The name of the parameter that each projection is of, by the name of the projection."""
        raise NotImplementedError

    def adapted_projections(self) -> dict[str, AdaptedProjection]:
        """The projections that are adapted, by name."""
        found = {name: getattr(self, name) for name in self.parameters_of_projections()}
        return {name: projection for name, projection in found.items() if isinstance(projection, AdaptedProjection)}

    def _apply(self, fn, recurse=True):
        projections = self.adapted_projections().values()  # they are moved before the weight is
        redraw = [any(t.is_meta for t in p.adapter_tensors().values()) for p in projections]
        super()._apply(fn, recurse)
        for projection, was_meta in zip(projections, redraw, strict=True):
            projection.follow_weight(redraw=was_meta)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads a base model's weight as an adapted layer does: a fresh adapter gets a new m, a trained one fails."""
        parameters = self.parameters_of_projections()
        loaded = {
            name: projection
            for name, projection in self.adapted_projections().items()
            if prefix + parameters[name] in state_dict
        }
        bare = {name: not any(key.startswith(f"{prefix}{name}.") for key in state_dict) for name in loaded}
        for name, projection in loaded.items():
            if problem := projection.why_not_load(bare=bare[name]):
                errors.append(problem)
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for name, projection in self.adapted_projections().items():
            projection.adaptation.forget(base=True)
            projection.after_load(bare=bare.get(name, False))
