"""Riemannian preconditioning of the gradients of A and B (arXiv 2402.02347), between clipping and the optimizer's step.

    gA <- (B^T B + eps I)^-1 gA        gB <- gB (A A^T + eps I)^-1        A (R, I), B (O, R)

It makes the step of B A independent of how that product is divided between its factors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Only for B = 0, where gA is 0 as well: the eigenvalues of A A^T begin near 1/3 (R numbers of variance 1 / (3 I) in I
# columns), and a first step of Adam at rate 1e-3 already gives B^T B traces of O * 1e-6.
EPS = 1e-6


def preconditioner_of(parameters: Mapping[str, nn.Parameter]) -> Callable[..., None]:
    """What an optimizer calls ahead of each step: preconditions the gradients of all A and B.

    Args:
        parameters: The trained parameters by name.
    """
    stems = [name.removesuffix("lora_A") for name in parameters if name.endswith("lora_A")]
    pairs = [(parameters[f"{stem}lora_A"], parameters[f"{stem}lora_B"]) for stem in stems]

    def precondition_all(*_: Any) -> None:
        for A, B in pairs:
            precondition(A, B)

    return precondition_all


@torch.no_grad()
def precondition(A: nn.Parameter, B: nn.Parameter) -> None:
    """Preconditions the gradients of one layer in place; those that are None stay None.

    Args:
        A: (R, I), or (R, I / groups, *K) of a convolution.
        B: (O, R).
    """
    if A.grad is not None:
        A.grad.copy_(solve(B.T, A.grad.flatten(1)).view_as(A))
    if B.grad is not None:
        B.grad.copy_(solve(A.flatten(1), B.grad.T).T)


def solve(factor: Tensor, gradient: Tensor) -> Tensor:
    """Returns (F F^T + eps I)^-1 G for F (R, N) and G (R, M), in float64: F F^T may be nearly singular."""
    wide = factor.double()
    gram = wide @ wide.T + EPS * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.cholesky_solve(gradient.double(), torch.linalg.cholesky(gram))
