"""Vision towers: frozen networks that give features for every cell of an image.

Shapes: B images, S = h * w cells, row by row, D channels; C channels of one layer.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dora_mm.config.models import VisionConfig
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.models.vl.towers.building import Preprocessing, build, load_weights
from dora_mm.utils.digest import module_digest
from dora_mm.utils.messages import nearest

MAPS = {  # class of a transformer's blocks -> name of its target map
    ("open_clip.transformer", "ResidualAttentionBlock"): "open-clip-visual",
    ("timm.models.vision_transformer", "Block"): "timm-vit",
}


def load_tower(config: VisionConfig) -> "VisionTower":
    """Loads the vision tower of a config: frozen, in eval mode, on the CPU.

    Random weights (`vision.pretrained` null) come from torch's global generator.

    Raises:
        ValueError: There is no such tower, tag, layer or file, the weights belong to another tower, or they are not on
            this machine and cannot be downloaded; the message names the key.
    """
    parts = build(config)
    known = parts.network.state_dict().keys()
    tower = VisionTower(parts.name, parts.network, config.layers or parts.layers, parts.preprocess)
    if parts.weights is not None:
        load_weights(tower.trunk, parts.weights, parts.prefixes, known)
    return tower


def tower_map(tower: nn.Module) -> str | None:
    """The name of the target map for a tower; None if it is not a plain vision transformer of open_clip or timm."""
    kinds = {(type(module).__module__, type(module).__name__) for module in tower.modules()}
    return next((MAPS[kind] for kind in MAPS if kind in kinds), None)


class VisionTower(nn.Module):
    """A vision network, reduced to the modules that its features need.

    The maps of the layers are averaged to the grid of the coarsest one and concatenated by channel. Class tokens and
    registers are left out. The network stays in eval mode even after `train()`, since batch statistics and dropped
    patches would change the features; adapters injected into it follow `train`.

    Args:
        name: Name of the architecture.
        trunk: The network; it is changed in place.
        layers: Names of modules inside `trunk`; none means the output of the trunk's `forward_features`.
        preprocess: Maps an image to the network's input.

    Attributes:
        feature_dim: D, the number of channels of all layers together.
        grid: (h, w), the number of rows and columns of cells.

    Raises:
        ValueError: A layer does not exist, is named twice, or does not give a map or the tokens of a grid.
    """

    def __init__(self, name: str, trunk: Any, layers: Sequence[str], preprocess: Preprocessing):
        super().__init__()
        self.name = name
        self.trunk = trunk
        self.layers = tuple(layers)
        self.preprocess = preprocess
        names = {name for name, _ in trunk.named_modules() if name}
        for layer in self.layers:
            if layer not in names:
                raise ValueError(f"vision.layers: {name} has no {layer!r}{nearest(layer, names)}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("vision.layers contains a layer twice")
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.feature_dim, self.grid = drop_unused_modules(self)

    @property
    def num_tokens(self) -> int:
        """S, the number of cells."""
        return math.prod(self.grid)

    @property
    def identity(self) -> str:
        """SHA-256 over everything that features depend on: name, weights, layers, preprocessing.

        Takes 1 s for 100M parameters.
        """
        what = [self.name, self.layers, astuple(self.preprocess), module_digest(self.trunk)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Features as tokens.

        Args:
            pixels_BCHW: B images as `preprocess` returns them.

        Returns:
            (B, S, D).
        """
        return self.feature_map(pixels_BCHW).flatten(2).transpose(1, 2)

    def feature_map(self, pixels_BCHW: Tensor) -> Tensor:
        """Features as a map (B, D, h, w); see `forward`."""
        outputs = self._outputs(pixels_BCHW.contiguous(memory_format=torch.channels_last))
        maps = [self._as_map(name, output) for name, output in outputs.items()]
        grid = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
        return torch.cat([m if m.shape[2:] == grid else F.adaptive_avg_pool2d(m, grid) for m in maps], dim=1)

    def train(self, mode: bool = True) -> "VisionTower":
        """Sets the mode of adapters inside the tower; the tower itself stays in eval mode."""
        super().train(mode)
        for module in self.trunk.modules():
            if not isinstance(module, AdaptedLayer):
                module.training = False
        return self

    def _outputs(self, pixels: Tensor) -> dict[str, Any]:
        """The output of each layer, in the order of `layers`; the trunk stops after the last one."""
        if not self.layers:
            return {"forward_features": self.trunk.forward_features(pixels)}
        outputs: dict[str, Any] = {}

        def keep(name: str, output: Any) -> None:
            # A copy, since the activation that follows may work in place.
            outputs[name] = output.clone() if isinstance(output, Tensor) else output
            if len(outputs) == len(self.layers):
                raise _AllLayersSeen

        run = getattr(self.trunk, "forward_features", self.trunk)
        handles = [
            self.trunk.get_submodule(name).register_forward_hook(lambda _module, _args, y, name=name: keep(name, y))
            for name in self.layers
        ]
        try:
            run(pixels)
        except _AllLayersSeen:
            return {name: outputs[name] for name in self.layers}
        finally:
            for handle in handles:
                handle.remove()
        unused = next(name for name in self.layers if name not in outputs)
        raise ValueError(f"vision.layers: {unused} of {self.name} is not used before its maps are pooled: remove it")

    def _as_map(self, name: str, output: Any) -> Tensor:
        """A layer's output as a map (B, C, h, w): a map, or tokens (B, S, C) with or without leading class tokens."""
        if isinstance(output, Tensor) and output.dim() == 4:
            return output.permute(0, 3, 1, 2) if getattr(self.trunk, "output_fmt", None) == "NHWC" else output
        num_extra = getattr(self.trunk, "num_prefix_tokens", int(hasattr(self.trunk, "class_embedding")))
        for extra in (num_extra, 0) if isinstance(output, Tensor) and output.dim() == 3 else ():
            if grid := self._token_grid(output.shape[1] - extra):
                return output[:, extra:].transpose(1, 2).unflatten(2, grid)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"vision.layers: {name} of {self.name} gives {shape}, not a map or the tokens of a grid")

    def _token_grid(self, num_tokens: int) -> tuple[int, int] | None:
        patches = self.trunk if hasattr(self.trunk, "grid_size") else getattr(self.trunk, "patch_embed", None)
        grid = getattr(patches, "grid_size", None) or (0, 0)
        if math.prod(grid) == num_tokens:
            return grid[0], grid[1]
        side = math.isqrt(num_tokens)  # transformers that merge their patches
        return (side, side) if side * side == num_tokens else None


class _AllLayersSeen(BaseException):
    """Stops the trunk once all layers have run. Not an Exception, which a trunk might catch."""


class _FeatureMap(nn.Module):
    """`feature_map` as a forward function, since functional_call calls `forward`."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.tower.feature_map(pixels_BCHW)


def drop_unused_modules(tower: VisionTower) -> tuple[int, tuple[int, int]]:
    """Replaces modules whose parameters do not affect the features by identities.

    Classifiers, pooling heads and the blocks after the last layer would take memory, and adapters there would never
    learn. The graph that autograd records of one pass names those that do, on the meta device, which computes nothing.

    Args:
        tower: The tower; it is changed in place.

    Returns:
        D, and (h, w).
    """
    call = _FeatureMap(tower)
    parameters = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in call.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in call.named_buffers()}
    pixels = torch.empty(1, 3, *tower.preprocess.size, device="meta")
    with torch.enable_grad():
        features = functional_call(call, {**parameters, **buffers}, (pixels,))
    leaves = _leaves(features)
    _drop(tower.trunk, "tower.trunk.", {name for name, parameter in parameters.items() if id(parameter) in leaves})
    return features.shape[1], (features.shape[2], features.shape[3])


def _leaves(t: Tensor) -> set[int]:
    """The ids of the tensors that `t` was computed from and that a backward pass would give a gradient."""
    found: set[int] = set()
    seen, waiting = set(), [t.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += (before for before, _ in node.next_functions)
            if hasattr(node, "variable"):  # an AccumulateGrad
                found.add(id(node.variable))
    return found


def _drop(module: nn.Module, prefix: str, used: set[str]) -> None:
    for name, child in list(module.named_children()):
        names = [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
        if names and not used.intersection(names):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, f"{prefix}{name}.", used)
