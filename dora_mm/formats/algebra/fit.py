"""Adapters of low rank that come closest to a weight: LoRA by singular values, and DoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.row_blocks import row_blocks
from dora_mm.formats.state import LayerState

OVERSAMPLED = 8  # directions beside the R ones, with which the iteration finds those in fewer steps
FEWEST_STEPS, MOST_STEPS = 2, 200
ENOUGH = 1e-3  # an iteration ends when a step lowers the error by less than this share of it
ROUNDING = 1e-7  # of ||D||^2, in fp32
EXACT = 1e-6  # or when the error is this share of the update, which is rounding
LEAST_GAIN = 1e-2  # B is divided by the gain


@dataclass(frozen=True)
class Truncation:
    """How many singular values an approximation keeps; at least one is set.

    Attributes:
        rank: At most so many.
        energy: The fewest with this share of the sum of their squares, ||D||^2.
        spectral: The fewest that leave nothing larger than this share of the largest one, ||D||_2, out.
    """

    rank: int | None = None
    energy: float | None = None
    spectral: float | None = None

    @property
    def is_rank(self) -> bool:
        """Whether the rank alone decides."""
        return self.energy is None and self.spectral is None

    def kept(self, values: Tensor) -> int:
        """How many of the singular values (N,), the largest first, are kept: at least one."""
        values, counts = values.double(), []
        if not values.any():
            return 1
        if self.energy is not None:
            shares = values.square().cumsum(0) / values.square().sum()
            counts.append(int((shares < self.energy).sum()) + 1)
        if self.spectral is not None:
            counts.append(int((values > self.spectral * values[0]).sum()))
        most = min(self.rank or len(values), len(values))
        return max(1, min(max(counts, default=most), most))


@torch.no_grad()
def low_rank(D: Tensor, keep: Truncation) -> LayerState:
    """The plain LoRA that comes closest to a difference of weights.

    Args:
        D: (O, I) or (O, I, *K).
        keep: Its rank; of a rank far below the full one, a randomised method finds the same in a fraction of the time.
    """
    matrix = D.flatten(1)
    full = min(matrix.shape)
    if keep.rank is not None and keep.is_rank and keep.rank * 4 < full:
        U, S, Vh = _leading_values(matrix, keep.rank)
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _as_lora(U, S, Vh, keep, D.shape[1:])


@torch.no_grad()
def resized(layer: LayerState, keep: Truncation) -> LayerState:
    """The plain LoRA of a lower rank that comes closest to a plain LoRA, without the product of its factors.

    With the QR decompositions B = Q R and A^T = P T, the singular values of s B A are those of s R T^T, which has as
    many rows and columns as the rank. Computed in float64.
    """
    A, B = (layer.tensors[name].double() for name in ("lora_A", "lora_B"))
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.flatten(1).T)
    U, S, Vh = torch.linalg.svd(layer.spec.scaling * R @ T.T, full_matrices=False)
    return _as_lora(Q @ U, S, Vh @ P.T, keep, A.shape[1:])


def _leading_values(D: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of D (O, I), with their vectors: U (O, N), S (N,), Vh (N, I) for N > rank.

    Subspace iteration, as in `fitted_adapter`, until a step takes less than twice `ENOUGH` of the square of the error
    away. Orthonormal columns Z leave ||D||^2 - ||D Z||^2 of it, so that no step has to compute what is left.
    """
    size, before = float(D.norm()) ** 2, 0.0
    generator, shape = torch.Generator().manual_seed(0), (D.shape[0], min(rank + OVERSAMPLED, *D.shape))
    D_Z = torch.randn(shape, generator=generator, dtype=D.dtype)
    for step in range(MOST_STEPS):
        Z = torch.linalg.qr((D_Z.T @ D).T).Q  # faster than D.T @ D_Z
        D_Z = D @ Z
        energy = float(torch.linalg.eigvalsh(_gram(D_Z))[-rank:].sum())
        if step + 1 >= FEWEST_STEPS and energy - before <= 2 * ENOUGH * (size - energy) + ROUNDING * size:
            break
        before = energy
    U, S, Vh = torch.linalg.svd(D_Z, full_matrices=False)
    return U, S, Vh @ Z.T


def _as_lora(U: Tensor, S: Tensor, Vh: Tensor, keep: Truncation, inner: torch.Size) -> LayerState:
    """The first terms of U diag(S) Vh as B and A (R, *inner), in fp32."""
    rank = keep.kept(S)
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return LayerState(DoRASpec(rank, method="lora"), {"lora_A": A.float().view(rank, *inner), "lora_B": B.float()})


@torch.no_grad()
def fitted_adapter(W: Tensor, W0: Tensor, rank: int) -> LayerState:
    """The DoRA of a rank that comes close to a weight W' over W0.

    A DoRA computes g (W0 + B A) with a gain g per row, which is W0 + h W0 + M for h = g - 1 and a matrix M of rank R.
    So with D = W' - W0 the smallest ||D - h W0 - M|| is wanted, over h and M. For a given h, M is the best
    approximation of E = D - h W0 of rank R, by its singular values. For a given row space of M, spanned by the
    orthonormal columns of Q (I, R), what M can express does not matter, and h fits the rest of each row: with
    P = 1 - Q Q^T,

        h = (d' P w0) / (w0 P w0)

    The two steps are repeated, and each lowers the error. If W' is a DoRA of rank R of W0, the result is that DoRA up
    to rounding. Then B A = M / g, and m = <w', v> / ||v|| for the rows v of V = W0 + B A: the norms of the rows of W'
    where their directions are met, and else the shorter ones that minimise the error.

    The singular values are those of a randomised method: subspace iteration with `OVERSAMPLED` more directions than R,
    a step of it for each h. For one h the error is in expectation at most sqrt(2 + R / (OVERSAMPLED - 1)) times the
    smallest one after its first step (what lies outside all directions: Halko, Martinsson and Tropp, 2011, theorem
    10.5; and what they hold beyond R), and falls with each further one. Tests hold the result to 2 % above that of
    whole decompositions, for slowly falling singular values, too.

    Args:
        W: W' (O, I) or (O, I, *K).
        W0: The base weight, in the same shape.
        rank: R; at most as many as W' has rows or columns.

    Returns:
        The adapter, with alpha = rank; tensors in fp32.
    """
    base = W0.flatten(1).float()
    D = W.flatten(1).float() - base
    rank = min(rank, *D.shape)
    squares, dots = _row_dots(base, base), _row_dots(D, base)
    h, Q, D_Q, base_Q = _gain_and_row_space(D, base, squares, dots, rank)
    BA_Q = (D_Q - h[:, None] * base_Q) / (1 + h)[:, None]
    inner = _row_dots(BA_Q, base_Q)
    norm = (squares + 2 * inner + _row_dots(BA_Q, BA_Q)).clamp(min=0).sqrt()
    magnitude = ((squares + dots + inner + _row_dots(BA_Q, D_Q)) / norm).masked_fill(norm == 0, 0).clamp(min=0)
    root = torch.linalg.vector_norm(BA_Q, dim=0).sqrt()
    root = root.masked_fill(root == 0, 1)
    A, B = Q.T * root[:, None], BA_Q / root
    tensors = {"lora_A": A.view(rank, *W.shape[1:]), "lora_B": B, "magnitude": magnitude.float()}
    return LayerState(DoRASpec(rank), tensors)


def distance(layer: LayerState, W: Tensor, W0: Tensor) -> tuple[float, float]:
    """For a DoRA with s = 1: ||W_adapter - W'|| and ||W' - W0||, without the rounding of W0.

    W_adapter - W' is h W0 + g B A - D for h = g - 1, where g comes from norms in float64: ||v||^2 is
    ||w0||^2 + 2 b A w0 + b A A^T b^T for a row v of V and b of B.
    """
    base, A, B = W0.flatten(1), layer.tensors["lora_A"].flatten(1), layer.tensors["lora_B"]
    D = W.flatten(1) - base
    squares = _row_dots(base, base) + 2 * _row_dots(B, base @ A.T) + _row_dots(B, B @ (A @ A.T))
    norm = squares.clamp(min=0).sqrt()
    g = (layer.tensors["magnitude"].double() / norm).masked_fill(norm == 0, 1)
    return _distance(D, base, (g - 1).float(), g.float()[:, None] * B, A.T), float(D.norm())


def _gain_and_row_space(
    D: Tensor, base: Tensor, squares: Tensor, dots: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For `fitted_adapter`: h (O,), Q (I, R), D Q and W0 Q (O, R).

    Args:
        D: (O, I).
        base: W0 (O, I).
        squares: (O,), the products of each row of W0 with itself.
        dots: (O,), and with the row of D.
        rank: R.
    """
    size, before = float(D.norm()), math.inf
    h = _quotient(dots, squares, squares)
    num_directions = min(rank + OVERSAMPLED, *D.shape)
    Z = torch.randn(D.shape[1], num_directions, generator=torch.Generator().manual_seed(0))
    D_Z, base_Z = D @ Z, base @ Z
    Q, D_Q, base_Q = Z[:, :rank], D_Z[:, :rank], base_Z[:, :rank]
    for step in range(MOST_STEPS):
        E_Z = D_Z - h[:, None] * base_Z
        Z = torch.linalg.qr((E_Z.T @ D - (h[:, None] * E_Z).T @ base).T).Q  # faster than D.T @ E_Z
        D_Z, base_Z = D @ Z, base @ Z
        first = _first_directions(D_Z - h[:, None] * base_Z, rank)
        Q, D_Q, base_Q = Z @ first, D_Z @ first, base_Z @ first
        h = _quotient(dots - _row_dots(D_Q, base_Q), squares - _row_dots(base_Q, base_Q), squares)
        if step + 1 < FEWEST_STEPS:
            continue
        error = _distance(D, base, h, D_Q - h[:, None] * base_Q, Q)
        if error < EXACT * size or (step >= FEWEST_STEPS and error > (1 - ENOUGH) * before):
            break
        before = error
    return h, Q, D_Q, base_Q


def _first_directions(E_Z: Tensor, rank: int) -> Tensor:
    """The combinations of its columns with the largest singular values of E_Z (O, ...), from its small Gram matrix."""
    return torch.linalg.eigh(_gram(E_Z)).eigenvectors.flip(1)[:, :rank].to(E_Z.dtype)


def _gram(E_Z: Tensor) -> Tensor:
    """The products of its columns with each other, in float64."""
    return E_Z.double().T @ E_Z.double()


def _row_dots(one: Tensor, other: Tensor) -> Tensor:
    """The products of the rows of two matrices, summed in float64: what is left of them after others is small."""
    return torch.cat([(one[rows] * other[rows]).sum(1, dtype=torch.float64) for rows in row_blocks(one)])


def _distance(D: Tensor, base: Tensor, h: Tensor, M_Q: Tensor, Q: Tensor) -> float:
    """||D - h W0 - M||."""
    parts = (
        torch.addmm(D[rows], M_Q[rows], Q.T, alpha=-1).addcmul_(h[rows, None], base[rows], value=-1)
        for rows in row_blocks(D)
    )
    return math.hypot(*(float(part.norm()) for part in parts))


def _quotient(dots: Tensor, squares: Tensor, scale: Tensor) -> Tensor:
    """h, in fp32; 0 where nothing of a row of W0 is left to fit."""
    return torch.where(squares > 1e-9 * scale, dots / squares, 0.0).clamp(min=LEAST_GAIN - 1).float()
