"""What DoRA is measured against: one linear layer, adapted by PEFT, by us, and by the plain formula.

Everything here runs on machines that have torch alone; only the layers of PEFT need PEFT.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_mm import backend
from dora_mm import targets as maps
from dora_mm.core import DoRASpec, TargetMap, adapt_layer, fixed_parameters
from dora_mm.core.targets import match_modules
from dora_mm.utils.messages import first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A linear layer with (num_out, num_in) weights, the number of tokens of its input, and the rank of its adapter."""

    name: str
    num_out: int
    num_in: int
    num_tokens: int
    rank: int


def peft_layer(
    base: nn.Linear, rank: int, use_dora: bool, dropout: float = 0.0, *, in_float32: bool = False
) -> nn.Module:
    """PEFT's layer around `base`.

    A, B and m have the dtype of the base, in which PEFT's layers are fastest, or float32 where that is asked for, as
    `get_peft_model` makes them unless told otherwise.
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=use_dora, lora_dropout=dropout, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(base)).get_submodule("0")
    for parameter in trained(layer) if in_float32 else ():
        parameter.data = parameter.data.float()
    return layer


def fused_layer(base: nn.Linear, rank: int, runs_in: str = "auto", **settings: Any) -> nn.Module:
    """PEFT's layer with DoRA after `fuse_peft`."""
    from dora_mm import fuse_peft

    backend.select(runs_in)
    holder = nn.ModuleDict({"layer": peft_layer(base, rank, use_dora=True, **settings)})
    fuse_peft(holder)
    return holder["layer"]


def our_layer(base: nn.Linear, rank: int, method: str, runs_in: str = "auto", dropout: float = 0.0) -> nn.Module:
    """Our layer, over the weight of `base`, in the backend `runs_in`."""
    layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    layer.weight, layer.bias = base.weight, base.bias
    return adapt_layer(layer, DoRASpec(rank, method=method, dropout=dropout), forward=backend.select(runs_in))


class DenseDoRA(nn.Module):
    """DoRA with a dense product B A in every pass. The norm n of V = W0 + B A is constant in the backward pass.

    Args:
        base: Holds W0.
        rank: The rank of A and B.
        merged: Whether the layer multiplies with W' = m V / n, so that autograd goes back through V. Otherwise only
            the norms come from V, and x is multiplied with W0 and with A and B, as in PEFT.
    """

    def __init__(self, base: nn.Linear, rank: int, merged: bool):
        super().__init__()
        self.base, self.merged = base, merged
        self.A = nn.Parameter(nn.init.kaiming_uniform_(base.weight.new_empty(rank, base.in_features), a=5**0.5))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(base.weight.detach(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.merged and torch.is_grad_enabled()):
            V = self.base.weight + self.B @ self.A
        gain = self.magnitude / torch.linalg.vector_norm(V.detach(), dim=1)
        if self.merged:
            return F.linear(x, gain[:, None] * V, self.base.bias)
        y = gain * (F.linear(x, self.base.weight) + F.linear(F.linear(x, self.A), self.B))
        return y if self.base.bias is None else y + self.base.bias


Build = Callable[[nn.Linear, int], nn.Module]
Contenders = dict[str, Build]


def contenders(*, dropout: float = 0.0, in_float32: bool = False) -> Contenders:
    """How each contender builds its layer; see `peft_layer`. Our adapters are in float32 always."""
    of_peft: dict[str, Any] = {"dropout": dropout, "in_float32": in_float32}
    return {
        "frozen": lambda base, rank: base,
        "PEFT LoRA": partial(peft_layer, use_dora=False, **of_peft),
        "PEFT DoRA": partial(peft_layer, use_dora=True, **of_peft),
        "PEFT DoRA, fused": partial(fused_layer, **of_peft),
        "our LoRA": partial(our_layer, method="lora", dropout=dropout),
        "our DoRA": partial(our_layer, method="dora", dropout=dropout),
    }


CONTENDERS: Contenders = contenders()
DENSE: Contenders = {
    "dense B@A": partial(DenseDoRA, merged=False),
    "dense W'": partial(DenseDoRA, merged=True),
}


def compiled(build: Build, compiler: str = "inductor") -> Build:
    """Returns a function that builds the same layer and gives it to torch.compile."""

    def build_compiled(base: nn.Linear, rank: int) -> nn.Module:
        layer = build(base, rank)
        layer.compile(dynamic=False, backend=compiler)
        return layer

    return build_compiled


def can_compile(device: torch.device | str = "cpu") -> bool:
    """Whether torch.compile works; it needs a C++ compiler on a CPU, and Triton on a GPU."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing on this machine: it runs without compiled peers
        log.warning("torch.compile does not work here, so the compiled peers are left out: %s", first_line(error))
        return False
    return True


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]


@torch.no_grad()
def change(parameters: list[nn.Parameter]) -> None:
    """Changes the parameters a little and drops their gradients, as an optimizer step does."""
    for parameter in parameters:
        parameter.grad = None
        parameter.add_(1e-4 * torch.randn_like(parameter))


@contextlib.contextmanager
def fixed_bases(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which the base weights do not change, as in the training loop."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(fixed_parameters(layer, base_only=True))
        yield


def kept(name: str, network: nn.Module, num_passes: int) -> contextlib.AbstractContextManager[None]:
    """A context for the passes of an optimizer step of a contender: what it computes once in them, as its trainer does.

    Args:
        name: The contender.
        network: The model with its layers.
        num_passes: The forward passes inside.
    """
    if name.startswith("PEFT DoRA, fused"):
        from dora_mm.peft import fixed_norms

        return fixed_norms(network)
    return fixed_parameters(network, num_passes=num_passes) if name.startswith("our") else contextlib.nullcontext()


# --- the layers of a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model with random weights, the modules to adapt, and the loss of one batch."""

    name: str
    build: Callable[[torch.device, torch.dtype], tuple[nn.Module, Callable[[], torch.Tensor]]]
    targets: Any
    rank: int = 16
    passes: int = 1  # backward passes from one change of the parameters to the next
    checkpointing: bool = False  # whether `build` enables it: every forward pass then runs twice


def target_paths(network: nn.Module, targets: Any) -> list[str]:
    """The paths of the modules that `targets` selects: the name of a target map, or a list of patterns."""
    chosen = (
        maps.find(targets).select(None) if isinstance(targets, str) else TargetMap("bench", {"all": tuple(targets)})
    )
    return list(match_modules(network, chosen))


def contending_layers(
    network: nn.Module, targets: Any, rank: int, contenders: Contenders
) -> dict[str, dict[str, nn.Module]]:
    """Builds the layers of every contender, all over the weights of `network`, which stays as it is.

    Args:
        network: The model.
        targets: As for `target_paths`.
        rank: The rank of the adapters.
        contenders: How each contender builds a layer.

    Returns:
        The name of a contender to its layers by path; `set_layers` puts them into the network.
    """
    bases: dict[str, Any] = {path: network.get_submodule(path) for path in target_paths(network, targets)}
    return {
        name: {path: build(base, rank).to(base.weight.device) for path, base in bases.items()}
        for name, build in contenders.items()
    }


def set_layers(network: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts the layers into the network, by path."""
    for path, layer in layers.items():
        network.set_submodule(path, layer)
