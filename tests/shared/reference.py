"""DoRA in float64 from the textbook formula and autograd alone, and what the tests compare with it."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_mm.core import Adapter, DoRASpec, adapt_layer


def merged_weight(weight, adapter: Adapter):
    """W(t) of one adapter in float64; gradients flow to A, B and m."""
    W0 = weight.detach().double().flatten(1)
    V = W0
    if adapter.A is not None:
        V = W0 + adapter.scaling * adapter.B.double() @ adapter.A.double().flatten(1)
    W = V
    if adapter.magnitude is not None:
        n = V.norm(dim=1)
        n = n if adapter.norm_grad == "exact" else n.detach()
        g = torch.where(n == 0, torch.ones_like(n), adapter.magnitude.double() / torch.where(n == 0, 1.0, n))
        W = g[:, None] * V
    return (W0 + adapter.strength * (W - W0)).view(weight.shape)


def make(out, inner, rank, *, dtype=torch.float64, seed=0, size=0.3, scaling=1.7, strength=1.0, norm_grad="detached"):
    g = torch.Generator().manual_seed(seed)
    W0 = torch.randn(out, inner, generator=g, dtype=dtype)
    A = torch.randn(rank, inner, generator=g, dtype=dtype).requires_grad_()
    B = (size * torch.randn(out, rank, generator=g, dtype=dtype)).requires_grad_()
    m = (W0.norm(dim=1) * (1 + 0.2 * torch.randn(out, generator=g, dtype=dtype))).requires_grad_()
    return W0, Adapter(A, B, m, scaling, strength, norm_grad)


def variants(adapter):
    yield "dora", adapter
    yield "lora", adapter._replace(magnitude=None)
    yield "magnitude", adapter._replace(A=None, B=None)


def randomize(layer, *, size: float = 0.05, seed: int = 0):
    """Trained values for a fresh adapter: B of `size`, magnitudes some percent off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if layer.lora_B is not None:
            layer.lora_B.copy_(size * torch.randn(layer.lora_B.shape, generator=generator))
        if layer.magnitude is not None:
            factor = 1 + 0.1 * torch.randn(layer.magnitude.shape, generator=generator)
            layer.magnitude.mul_(factor.to(layer.magnitude.device))
    return layer


def linear(in_features, out_features, *, bias=True, dtype=torch.float32, seed=0, **spec):
    """(base, adapted copy of it with trained values)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer.load_state_dict(base.state_dict())
    return base, adapt_layer(layer, DoRASpec(**{"rank": 4, **spec}), path="layer")


class Names(TorchDispatchMode):
    """Records the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class NewTensors(TorchDispatchMode):
    """Records the shapes of all tensors that operators inside return in new memory."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self._storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(t.shape))
                self._storages.append(StorageWeakRef(t.untyped_storage()))
        return result

    def num_alive(self, shape: tuple[int, ...]) -> int:
        """How many of the tensors of this shape still exist."""
        storages = zip(self.shapes, self._storages, strict=True)
        return sum(found == shape and not storage.expired() for found, storage in storages)


def relative_error(found, expected) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def weight_of(layer, weight=None, *, scaling=1.0, strength=1.0, norm_grad="detached"):
    """W(t) of a layer in float64, with output rows first, from its parameters alone (alpha = rank: scaling 1).

    `weight` is W0 where the layer's own differs (a transposed one, that of an embedding, rows of a packed one).
    """
    own = Adapter(layer.lora_A, layer.lora_B, layer.magnitude, scaling, strength, norm_grad)
    return merged_weight(layer.weight if weight is None else weight, own)
