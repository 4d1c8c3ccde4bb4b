"""Which implementation of the layer runs.

    device, dtype, module                     implementation
    a processor                               torch: merged or split by counted cost, see core/fused.py
    CUDA: Linear in fp32, bf16, fp16          triton, or the vendor's product and one pass: kernels/choice.py
    CUDA: convolutions, float64               torch, which the triton backend calls itself
    CUDA: a magnitude with dropout            torch, likewise
    CUDA before compute capability 8.0        torch

`auto` chooses by this table in every pass, since a model may move after it was adapted.
"""

import functools
import logging

import torch

from dora_mm.core.fused import TORCH, Forward

log = logging.getLogger(__name__)
BACKENDS = ("auto", "torch", "triton")
LEAST_CAPABILITY = (8, 0)  # Triton has no tensor cores before: on sm_75 our tiles in fp16 spill 7 KB a thread


def select(backend: str = "auto") -> Forward:
    """The forward function of a backend.

    Raises:
        ValueError: there is no such backend, or triton was asked for by name and does not work here.
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
    _announce("cuda" if torch.cuda.is_available() else "cpu")
    return auto


def auto(x, weight, bias, adapters, **options):
    return CHOSEN[weight.is_cuda](x, weight, bias, adapters, **options)


# By whether the layer is on a CUDA device. Triton is entered when it has been tried.
CHOSEN = {False: TORCH, True: TORCH}


@functools.cache
def _announce(device: str) -> None:
    """Tries triton where there is a GPU for it, and says once what runs."""
    if device == "cuda":
        function, problem = load_triton()
        if function is None:
            log.warning("Triton does not work here (%s): the layer runs in plain torch, right but slower.", problem)
            return
        CHOSEN[True] = function
    chosen = "plain torch" if CHOSEN[device == "cuda"] is TORCH else "Triton"
    log.info("Adapted layers run in %s on this machine (%s).", chosen, device)


@functools.cache
def load_triton() -> tuple[Forward | None, str]:
    """Triton's function, tried on a small layer against plain torch, or None and the reason."""
    try:
        from dora_mm.kernels.dora_linear import TRITON

        if torch.cuda.is_available() and (has := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
            return None, f"it needs compute capability 8.0, and {torch.cuda.get_device_name()} has {has[0]}.{has[1]}"
        return (TRITON, "") if _agrees_with_torch(TRITON) else (None, "its results are wrong")
    except Exception as error:  # whatever a broken installation raises: it is reported, and plain torch is always right
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _agrees_with_torch(function: Forward) -> bool:
    """Output and gradients of small layers. A hundredth is what TF32 and half precision need; faults are larger.

    Of odd sizes, and of multiples of 16 in several tiles, which Triton compiles anew, with a rank for which a launch
    takes as much shared memory as it ever does. In fp32 the vendor's product runs, in half precision for a large inner
    size.
    """
    odd, even = (40, 70, 86, 5), (300, 256, 272, 80)  # tokens, in, out, rank
    trials = [(torch.float32, odd), (torch.float16, odd)]
    if torch.cuda.is_available():  # Triton's interpreter has no bf16, and takes long for large sizes
        log.info("Trying the kernels, which compiles them: some seconds.")
        large = (300, 2048, 2064, 80)
        trials = [(d, sizes) for d in (torch.float32, torch.float16, torch.bfloat16) for sizes in (odd, even, large)]
    for dtype, sizes in trials:
        for found, right in zip(_trial(function, dtype, *sizes), _trial(TORCH, dtype, *sizes), strict=True):
            if not (found.float() - right.float()).norm() <= 0.01 * right.float().norm():
                return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def _trial(
    function: Forward, dtype: torch.dtype, tokens: int, num_in: int, num_out: int, rank: int
) -> list[torch.Tensor]:
    from dora_mm.core.functional import Adapter
    from dora_mm.core.products import LINEAR

    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = torch.Generator().manual_seed(0)
    sizes = ((tokens, num_in), (num_out, num_in), (rank, num_in), (num_out, rank))
    x, W0, A, B = (torch.randn(*size, generator=drawn, device="cpu").to(device) for size in sizes)
    x, W0, m = x.to(dtype), W0.to(dtype), W0.norm(dim=1) * 1.1
    trained = [t.requires_grad_() for t in (x, A, B, m)]
    y = function(x, W0, None, [Adapter(A, B, m)], product=LINEAR, dropout=0.0)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]
