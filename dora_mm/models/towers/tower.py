"""Frozen vision: what a vision tower says about every cell of a picture.

Shapes: B pictures, S = h * w cells, row by row, D channels; C channels of one layer.
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

from dora_mm.config.report import nearest
from dora_mm.config.vl import VisionConfig
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.models.towers.building import Preprocessing, build, load_weights
from dora_mm.utils.digest import module_digest

MAPS = {  # class of a transformer's blocks -> the target map for it
    ("open_clip.transformer", "ResidualAttentionBlock"): "open-clip-visual",
    ("timm.models.vision_transformer", "Block"): "timm-vit",
}


def load_tower(config: VisionConfig) -> "VisionTower":
    """The tower of a config, frozen, in eval mode, on the CPU; random weights come from torch's global generator.

    Raises ValueError, which names the key: a tower, tag, layer or file that is not there, weights of another tower,
    weights that would have to be downloaded and cannot be.
    """
    bare = build(config)
    known = bare.network.state_dict().keys()
    tower = VisionTower(bare.name, bare.network, config.layers or bare.layers, bare.preprocess)
    if bare.weights is not None:
        load_weights(tower.trunk, bare.weights, bare.prefixes, known)
    return tower


def tower_map(tower: "VisionTower") -> str:
    """The name of the target map for a tower: attention (`attn`) and MLP (`ff`) of plain vision transformers."""
    kinds = {(type(module).__module__, type(module).__name__) for module in tower.trunk.modules()}
    found = [MAPS[kind] for kind in MAPS if kind in kinds]
    if not found:
        raise ValueError(
            f"vision.tower: there is no target map for {tower.name}, only for vision transformers of open_clip "
            "(ViT-B-32) and timm (timm/vit_base_patch16_224): take one of these, or adapt the language side alone"
        )
    return found[0]


class VisionTower(nn.Module):
    """A network cut off behind the last layer that is taken; what is not needed for it is dropped.

    layers: names of modules inside `trunk`, whose maps are averaged over the cells of the coarsest one and joined by
        channel; none: what the trunk's `forward_features` returns. Class tokens and registers are left out.
    feature_dim: D. grid: (h, w).

    It stays in eval mode whatever `train` says, since batch statistics and dropped patches would change what it says;
    adapters put into it follow `train`.
    """

    def __init__(self, name: str, trunk: Any, layers: Sequence[str], preprocess: Preprocessing):
        super().__init__()
        self.name = name
        self.trunk = trunk
        self.layers = tuple(layers)
        self.preprocess = preprocess
        self._check_layers()
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.feature_dim, self.grid = drop_unused_modules(self)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def identity(self) -> str:
        """Changes with all that features depend on: name, weights, layers, preprocessing. 1 s for 100M parameters."""
        what = [self.name, self.layers, astuple(self.preprocess), module_digest(self.trunk)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, S, D) of what `preprocess` made of B pictures."""
        return self.joined_map(pixels_BCHW).flatten(2).transpose(1, 2)

    def joined_map(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, D, h, w)."""
        outputs = self._outputs(pixels_BCHW.contiguous(memory_format=torch.channels_last))
        maps = [self._as_map(name, output) for name, output in outputs.items()]
        grid = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
        return torch.cat([m if m.shape[2:] == grid else F.adaptive_avg_pool2d(m, grid) for m in maps], dim=1)

    def train(self, mode: bool = True) -> "VisionTower":
        super().train(mode)
        for module in self.trunk.modules():
            if not isinstance(module, AdaptedLayer):
                module.training = False
        return self

    def _outputs(self, pixels: Tensor) -> dict[str, Any]:
        """What each layer gives, in the order of `layers`; the trunk runs no further than needed."""
        if not self.layers:
            return {"forward_features": self.trunk.forward_features(pixels)}
        found: dict[str, Any] = {}

        def keep(name: str, output: Any) -> None:
            # a copy: the activation that follows may work in place
            found[name] = output.clone() if isinstance(output, Tensor) else output
            if len(found) == len(self.layers):
                raise _Enough

        run = getattr(self.trunk, "forward_features", self.trunk)
        handles = [
            self.trunk.get_submodule(name).register_forward_hook(lambda _module, _args, y, name=name: keep(name, y))
            for name in self.layers
        ]
        try:
            run(pixels)
        except _Enough:
            return {name: found[name] for name in self.layers}
        finally:
            for handle in handles:
                handle.remove()
        unused = next(name for name in self.layers if name not in found)
        raise ValueError(f"vision.layers: {unused} of {self.name} is not used before its maps are pooled: leave it out")

    def _as_map(self, name: str, output: Any) -> Tensor:
        """(B, C, h, w) of a map, or of tokens (B, S, C) with or without a class token and the like in front."""
        if isinstance(output, Tensor) and output.dim() == 4:
            return output.permute(0, 3, 1, 2) if getattr(self.trunk, "output_fmt", None) == "NHWC" else output
        num_extra = getattr(self.trunk, "num_prefix_tokens", int(hasattr(self.trunk, "class_embedding")))
        for extra in (num_extra, 0) if isinstance(output, Tensor) and output.dim() == 3 else ():
            if grid := self._token_grid(output.shape[1] - extra):
                return output[:, extra:].transpose(1, 2).unflatten(2, grid)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"vision.layers: {name} of {self.name} gives {shape}, no map and no tokens of a grid")

    def _token_grid(self, num_tokens: int) -> tuple[int, int] | None:
        patches = self.trunk if hasattr(self.trunk, "grid_size") else getattr(self.trunk, "patch_embed", None)
        grid = getattr(patches, "grid_size", None) or (0, 0)
        if math.prod(grid) == num_tokens:
            return grid[0], grid[1]
        side = math.isqrt(num_tokens)  # transformers that merge their patches
        return (side, side) if side * side == num_tokens else None

    def _check_layers(self) -> None:
        names = {name for name, _ in self.trunk.named_modules() if name}
        for name in self.layers:
            if name not in names:
                raise ValueError(f"vision.layers: {self.name} has no {name!r}{nearest(name, names)}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("vision.layers names a layer twice")


class _Enough(BaseException):
    """All layers are there: the rest of the trunk need not run. No Exception, which a trunk might catch."""


class _Map(nn.Module):
    """`joined_map` as a forward function, which is what functional_call calls."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.tower.joined_map(pixels_BCHW)


def drop_unused_modules(tower: VisionTower) -> tuple[int, tuple[int, int]]:
    """Replaces modules whose parameters have no part in the features; returns D and (h, w).

    Classifiers, pooling heads and the blocks behind the last layer would take memory, and adapters there would never
    learn. Which they are is what autograd says of one pass on the meta device, which computes nothing.
    """
    call = _Map(tower)
    parameters = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in call.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in call.named_buffers()}
    pixels = torch.empty(1, 3, *tower.preprocess.size, device="meta")
    with torch.enable_grad():
        features = functional_call(call, {**parameters, **buffers}, (pixels,))
        gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    reached = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    _drop(tower.trunk, "tower.trunk.", reached)
    return features.shape[1], (features.shape[2], features.shape[3])


def _drop(module: nn.Module, prefix: str, reached: set[str]) -> None:
    for name, child in list(module.named_children()):
        names = [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
        if names and not reached.intersection(names):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, f"{prefix}{name}.", reached)
