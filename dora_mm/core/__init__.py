"""The adapted layers, the target maps and the injection. Imports only torch."""

from dora_mm.core.adapted import AdaptedLayer, base_model
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.functional import Adapter
from dora_mm.core.inject import (
    InjectReport,
    MergeReport,
    adapted_layers,
    adapter_parameters,
    fixed_parameters,
    inject,
    merge,
    remove,
    set_assistant_strength,
    set_strength,
    unmerge,
)
from dora_mm.core.kinds import adapt_layer, restore_layer
from dora_mm.core.layer import DoRAConv, DoRAEmbedding, DoRALinear
from dora_mm.core.spec import DoRASpec
from dora_mm.core.targets import TargetMap

__all__ = [
    "TORCH",
    "AdaptedLayer",
    "Adapter",
    "DoRAConv",
    "DoRAEmbedding",
    "DoRALinear",
    "DoRASpec",
    "Forward",
    "InjectReport",
    "MergeReport",
    "TargetMap",
    "adapt_layer",
    "adapted_layers",
    "adapter_parameters",
    "base_model",
    "fixed_parameters",
    "inject",
    "merge",
    "remove",
    "restore_layer",
    "set_assistant_strength",
    "set_strength",
    "unmerge",
]
