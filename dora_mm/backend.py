"""Which implementation of the layer runs."""

from dora_mm.core.functional import TORCH, Forward

BACKENDS = {"torch": TORCH}


def select(backend: str = "auto") -> Forward:
    """The forward functions of a backend; `auto` takes the best one there is, which is plain torch so far."""
    if backend == "auto":
        return TORCH
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: use auto or {', '.join(BACKENDS)}")
    return BACKENDS[backend]
