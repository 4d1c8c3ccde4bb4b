"""Which implementation of the layer runs.

    device, dtype, module                     implementation
    CPU                                       torch: merged or unmerged, see choose_form in core/forms.py
    CUDA: Linear in fp32, bf16, fp16          triton, or cuBLAS and one more pass: see kernels/gpus.py
    CUDA: experts of mixtures, likewise       triton
    CUDA: convolutions, float64               torch, called by the triton backend
    CUDA: a magnitude with dropout            torch, called by the triton backend
    CUDA: experts, an exact norm or several   torch, called by the triton backend; it waits for the device
          adapters
    CUDA before compute capability 8.0        torch

`auto` decides by this table in every pass, since a model may be moved after it was adapted.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.ops import GroupedOp
from dora_mm.core.passes import Options
from dora_mm.utils.progress import Progress

log = logging.getLogger(__name__)
BACKENDS = ("auto", "torch", "triton")
LEAST_CAPABILITY = (8, 0)  # below it Triton has no tensor cores: on sm_75 our fp16 tiles spill 7 KB per thread


def select(backend: str = "auto") -> Forward:
    """Returns the forward function of a backend.

    Args:
        backend: "auto", "torch" or "triton". "auto" warns once where there is a GPU and Triton does not work.

    Returns:
        The function, with the signature of `core.forms.adapted_product`.

    Raises:
        ValueError: There is no such backend, or "triton" was requested and does not work on this machine.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: use {', '.join(BACKENDS)}")
    if backend == "triton":
        function, problem = load_triton()
        if function is None:
            raise ValueError(f"backend triton does not work here ({problem}): use auto or torch")
        return function
    if backend == "torch":
        return TORCH
    if torch.cuda.is_available():
        _enter_triton()
    return auto


def implementation(backend: str) -> str:
    """The implementation that runs adapted layers on this machine, such as "triton 3.6.0" or "torch".

    Raises:
        ValueError: See `select`.
    """
    chosen = select(backend)
    chosen = CHOSEN[torch.cuda.is_available()] if chosen is auto else chosen
    return "torch" if chosen is TORCH else f"triton {version('triton')}"


def about_layers(backend: str | None) -> dict[str, str]:
    """The entry of `circumstances` for adapted layers; empty where a config has no backend."""
    return {} if backend is None else {"adapted layers": implementation(backend)}


def auto(x, weight, bias, adapters, options):
    """`core.forms.adapted_product` in the implementation chosen for the device that holds `weight`."""
    return CHOSEN[weight.is_cuda](x, weight, bias, adapters, options)


# By whether the layer is on a CUDA device. Triton is entered once it has passed its trial.
CHOSEN = {False: TORCH, True: TORCH}


@functools.cache
def _enter_triton() -> None:
    """Takes Triton for layers on a GPU, and warns where it does not work."""
    function, problem = load_triton()
    if function is None:
        log.warning("Triton does not work here (%s): adapted layers run in plain torch, which is slower.", problem)
    else:
        CHOSEN[True] = function


@functools.cache
def load_triton() -> tuple[Forward | None, str]:
    """Tries the Triton implementation on small layers, against plain torch.

    Returns:
        The forward function and "", or None and the reason why Triton does not work here.
    """
    try:
        from dora_mm.kernels.dora_linear import TRITON
        from dora_mm.kernels.gpus import look_at

        if torch.cuda.is_available() and (has := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
            return None, f"it needs compute capability 8.0, and {torch.cuda.get_device_name()} has {has[0]}.{has[1]}"
        for index in range(torch.cuda.device_count()):
            look_at(index)
        with Progress("compiling and testing the Triton kernels"):
            return (TRITON, "") if _agrees_with_torch(TRITON) else (None, "its results are wrong")
    except Exception as error:  # whatever a broken installation raises: it is reported, and plain torch works
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _agrees_with_torch(function: Forward) -> bool:
    """Whether output and gradients of small layers agree with plain torch, up to 1 %.

    TF32 and half precision need that much; real faults are larger. The sizes are odd ones and multiples of 16 over
    several tiles, for which Triton compiles separate kernels; rank 80 takes the most shared memory that a launch ever
    does. fp32 runs cuBLAS's product, and so does half precision from the inner sizes in kernels/gpus.py on.
    """
    odd, even = (40, 70, 86, 5), (300, 256, 272, 80)  # tokens, in, out, rank
    trials, stacks = [(torch.float32, odd), (torch.float16, odd)], [(torch.float16, odd)]
    if torch.cuda.is_available():  # Triton's interpreter has no bf16, and is slow for large sizes
        from dora_mm.kernels.gpus import gpu

        chosen = gpu(torch.empty(0, device="cuda"))
        large = (300, chosen.vendor_from, chosen.vendor_from_back, 80)
        trials = [(d, sizes) for d in (torch.float32, torch.float16, torch.bfloat16) for sizes in (odd, even, large)]
        stacks = [(d, even) for d in (torch.float32, torch.bfloat16)]
    return all(_agree(_trial, function, *each) for each in trials) and all(
        _agree(_trial_of_experts, function, *each) for each in stacks
    )


def _agree(trial: Callable[..., list[torch.Tensor]], function: Forward, dtype: torch.dtype, sizes: Any) -> bool:
    """Whether the tensors that a trial returns are those of plain torch."""
    pairs = zip(trial(function, dtype, *sizes), trial(TORCH, dtype, *sizes), strict=True)
    return all((found.float() - right.float()).norm() <= 0.01 * right.float().norm() for found, right in pairs)


@torch.inference_mode(False)
@torch.enable_grad()
def _trial(
    function: Forward, dtype: torch.dtype, tokens: int, num_in: int, num_out: int, rank: int
) -> list[torch.Tensor]:
    sizes = ((tokens, num_in), (num_out, num_in), (rank, num_in), (num_out, rank))
    return _results(function, dtype, sizes, Options())


@torch.inference_mode(False)
@torch.enable_grad()
def _trial_of_experts(
    function: Forward, dtype: torch.dtype, tokens: int, num_in: int, num_out: int, rank: int
) -> list[torch.Tensor]:
    """Of three experts, the second has no rows."""
    sizes = ((tokens, num_in), (3, num_out, num_in), (3, rank, num_in), (3, num_out, rank))
    ends = torch.tensor([tokens // 3, tokens // 3, tokens], dtype=torch.int32, device=_device())
    return _results(function, dtype, sizes, Options(GroupedOp(ends)))


def _results(
    function: Forward, dtype: torch.dtype, sizes: Sequence[Sequence[int]], options: Options
) -> list[torch.Tensor]:
    """The output, and the gradients of x, A, B and m, from random tensors of the sizes of x, W0, A and B."""
    from dora_mm.core.functional import Adapter

    stream = torch.Generator().manual_seed(0)
    x, W0, A, B = (torch.randn(*size, generator=stream, device="cpu").to(_device()) for size in sizes)
    x, W0, m = x.to(dtype), W0.to(dtype), W0.norm(dim=-1) * 1.1
    trained = [t.requires_grad_() for t in (x, A, B, m)]
    y = function(x, W0, None, [Adapter(A, B, m)], options)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
