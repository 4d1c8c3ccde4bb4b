"""DoRA in float64 from the textbook formula and autograd alone, and what the tests compare with it."""

import copy
import math

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_mm.core import Adapter, DoRASpec, adapt_layer

# Of results in float64: sums of thousands of terms that cancel to a hundredth are off by 1e-12, a wrong term by 1e-6
DOUBLE = 1e-10


def merged_weight(weight, adapter: Adapter, dtype=torch.float64):
    """W(t) of one adapter, in float64 if nothing else is asked for; gradients flow to A, B and m."""
    W0 = weight.detach().to(dtype).flatten(1)
    V = W0
    if adapter.A is not None:
        V = W0 + adapter.scaling * adapter.B.to(dtype) @ adapter.A.to(dtype).flatten(1)
    W = V
    if adapter.magnitude is not None:
        n = V.norm(dim=1)
        n = n if adapter.norm_grad == "exact" else n.detach()
        g = torch.where(n == 0, torch.ones_like(n), adapter.magnitude.to(dtype) / torch.where(n == 0, 1.0, n))
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
    """The norm of a difference over that of what is expected; without that, where nothing but zeros is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / (expected.norm() or 1.0)).item()


def check_error(found, usual, exact, name="", dtype=None):
    """Asserts that the error of a result is at most twice that of a plain computation, plus one rounding of the result.

    Errors are norms of differences from `exact`. No tolerance is picked: see docs/developing.md.

    Args:
        found: The result.
        usual: The same by the formula, or by what it has to agree with, in the same dtypes.
        exact: The same in float64, by other means than the result: a fault of both would not be seen.
        name: The name of the result.
        dtype: The dtype of products, where the result has another one.
    """
    check_errors({name: found}, {name: usual}, {name: exact}, dtype)


def check_errors(found, usual, exact, dtype=None):
    """`check_error` of the results of one pass, by name, all together: their root mean square, each over its own norm.

    (A gradient of few numbers may be off by more than twice another's error by chance, on some processors.)
    """
    assert found.keys() == usual.keys() == exact.keys()
    assert all(tensor is not None and tensor.shape == exact[name].shape for name, tensor in found.items())
    errors, others = ({name: relative_error(t, exact[name]) for name, t in each.items()} for each in (found, usual))
    error, other = (math.hypot(*each.values()) / math.sqrt(len(each)) for each in (errors, others))
    dtypes = {tensor.dtype for tensor in found.values()}
    unit = max(DOUBLE if each == torch.float64 else torch.finfo(each).eps / 2 for each in dtypes)
    assert other <= max(torch.finfo(each).eps for each in (dtype, *dtypes) if each) ** 0.5, f"no measure: {others}"
    assert error <= 2 * other + unit, f"{errors}, where the plain computation has {others}"


def numbered(tensors):
    """Results by their numbers, as `check_errors` takes them."""
    return dict(enumerate(tensors))


def doubled(model):
    """A copy of a model in float64, where a layer computes without rounding that another dtype would show."""
    return copy.deepcopy(model).double()


def weight_of(layer, weight=None, *, scaling=1.0, strength=1.0, norm_grad="detached", dtype=torch.float64):
    """W(t) of a layer, with output rows first, from its parameters alone (alpha = rank: scaling 1).

    `weight` is W0 where the layer's own differs (a transposed one, that of an embedding, rows of a packed one).
    """
    own = Adapter(layer.lora_A, layer.lora_B, layer.magnitude, scaling, strength, norm_grad)
    return merged_weight(layer.weight if weight is None else weight, own, dtype)
