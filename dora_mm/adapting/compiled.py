"""Regional compilation: torch.compile of the blocks that a network repeats, in the passes of a training alone.

Blocks of a kind share one graph, so that a model compiles in the time of one block. Whatever a network does in
evaluation mode (validations, images, answers) is done without: it would be a graph for each of their shapes.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dora_mm.core import TargetMap
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.models.streaming import repeated_blocks
from dora_mm.utils.messages import compiler_problem

# Dropout draws what it does without: torch's generators, not those of the compiler.
COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"fallback_random": True}}
# Graphs of one class of blocks: by width, by what is adapted in it, and by the shape of the input, first as it is and
# then as any other. Without a limit this high, torch runs the rest as it is, and says so in a warning only.
MOST_GRAPHS = 64


def compile_blocks(networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]) -> None:
    """Compiles the blocks of networks, each when it is first trained. Names of modules and parameters stay the same.

    Args:
        networks: The networks, by component.
        target_maps: Their target maps, by component.
    """
    for component, network in networks.items():
        for block in repeated_blocks(network, target_maps[component]):
            block.forward = in_training(block, torch.compile(block.forward, **COMPILER))
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)


def compiled_line(networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]) -> str:
    """A line on what is compiled, for the dry run."""
    kinds = Counter(
        f"{type(block).__name__} of {component}"
        for component, network in networks.items()
        for block in repeated_blocks(network, target_maps[component])
    )
    blocks = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"compiled  {blocks or 'nothing'}, in the steps alone; any time below is without"


def in_training(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The forward function of a block: compiled in training mode, else as it was."""
    forward_pass, layers = block.forward, [module for module in block.modules() if isinstance(module, AdaptedLayer)]

    @functools.wraps(forward_pass)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward_pass(*args, **kwargs)
        for layer in layers:
            layer.keep_norm()
        return compiled(*args, **kwargs)

    return forward


def check_compiler(device: torch.device) -> None:
    """Compiles a small function, to see whether it works.

    Raises:
        ValueError: It does not.
    """
    try:
        torch.compile(lambda x: x.square() + 1, **COMPILER)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing on this machine
        raise ValueError(
            f"train.compile: torch.compile does not work here, where it needs a C++ compiler and, on a GPU, Triton "
            f"({compiler_problem(error)}): leave it out"
        ) from None
