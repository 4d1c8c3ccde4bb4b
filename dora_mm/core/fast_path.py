"""torch's fused inference of nn.TransformerEncoder, which reads the weights and never calls an adapted layer.

It is switched off where a module inside is adapted, by the attributes that torch checks before it takes that path.
"""

from __future__ import annotations

from torch import nn

from dora_mm.core.adapted import AdaptedLayer

SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
BEFORE = "fast_path_before"


def set_fast_paths(model: nn.Module) -> None:
    """Switches the fused inference off where a module inside is adapted, and restores it where none is.

    Args:
        model: The model, whose transformer encoders are changed in place.
    """
    for module in model.modules():
        for kind, (name, off) in SWITCHES.items():
            if not isinstance(module, kind):
                continue
            if any(isinstance(inner, AdaptedLayer) for inner in module.modules()):
                if not hasattr(module, BEFORE):
                    setattr(module, BEFORE, getattr(module, name))
                setattr(module, name, off)
            elif hasattr(module, BEFORE):
                setattr(module, name, getattr(module, BEFORE))
                delattr(module, BEFORE)
