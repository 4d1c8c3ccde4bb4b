"""Which implementation of the layer runs.

    device, dtype, module                     implementation
    a processor                               torch: merged or split by counted cost, see core/fused.py
    CUDA: Linear in fp32, bf16, fp16          triton, or the vendor's product and one pass: kernels/choice.py
    CUDA: convolutions, float64, dropout      torch, which the triton backend calls itself
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
RANK_TRIED = 70  # above 64 a launch takes all the shared memory that one of ours ever does


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
    """Output and gradients of small layers. In fp32 the vendor's product runs, in half precision a small inner size
    takes our own and a large one the vendor's. A hundredth is what TF32 and half precision need; faults are larger."""
    trials = [(torch.float32, 70), (torch.float16, 70)]
    if torch.cuda.is_available():  # Triton's interpreter has no bf16, and takes long for large sizes
        trials += [(torch.bfloat16, 70), (torch.bfloat16, 2048)]
    for dtype, size in trials:
        for found, right in zip(_trial(function, dtype, size), _trial(TORCH, dtype, size), strict=True):
            if not (found.float() - right.float()).norm() <= 0.01 * right.float().norm():
                return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def _trial(function: Forward, dtype: torch.dtype, size: int) -> list[torch.Tensor]:
    from dora_mm.core.functional import Adapter
    from dora_mm.core.products import LINEAR

    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = torch.Generator().manual_seed(0)
    sizes = ((40, size), (size + 16, size), (RANK_TRIED, size), (size + 16, RANK_TRIED))
    x, W0, A, B = (torch.randn(*size, generator=drawn).to(device) for size in sizes)
    x, W0, m = x.to(dtype), W0.to(dtype), W0.norm(dim=1) * 1.1
    trained = [t.requires_grad_() for t in (x, A, B, m)]
    y = function(x, W0, None, [Adapter(A, B, m)], product=LINEAR, dropout=0.0)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]
