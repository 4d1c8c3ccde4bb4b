"""Adapters of low rank that come closest to a weight: LoRA by singular values, and DoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.state import LayerState

OVERSAMPLED = 8  # directions beside the R ones, with which the iteration finds those in fewer steps
FEWEST_STEPS, MOST_STEPS = 2, 200
ENOUGH = 1e-3  # an iteration ends when a step lowers the error by less than this share of it
LEAST_GAIN = 1e-2  # B is divided by the gain


@torch.no_grad()
def low_rank(D: Tensor, *, rank: int | None = None, energy: float | None = None) -> LayerState:
    """The plain LoRA that comes closest to a difference of weights: a rank, or the smallest that keeps enough energy.

    Args:
        D: (O, I) or (O, I, *K).
        rank: The rank; far below the full one, a randomised method finds the same in a fraction of the time.
        energy: The share of ||D||^2 that B A has to have, where `rank` is None.
    """
    matrix = D.flatten(1)
    full = min(matrix.shape)
    if rank is not None and rank * 4 < full:
        with torch.random.fork_rng(devices=[]):  # the method draws from torch's global generator
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(full, 2 * rank + 8), niter=4)
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        assert energy is not None
        squares = S.double().square()
        kept = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(S.dtype).tiny)
        rank = int((kept < energy).sum()) + 1 if squares.any() else 1
    rank = min(rank, full)
    root = S[:rank].sqrt()
    tensors = {"lora_A": (root[:, None] * Vh[:rank]).view(rank, *D.shape[1:]), "lora_B": U[:, :rank] * root}
    return LayerState(DoRASpec(rank, method="lora"), tensors)


@torch.no_grad()
def fitted_adapter(W: Tensor, W0: Tensor, rank: int) -> LayerState:
    """The DoRA of a rank that comes close to a weight W' over W0.

    A DoRA computes g (W0 + B A) with a gain g per row, which is g W0 + M for a matrix M of rank R. So the smallest
    ||g W0 + M - W'|| is wanted, over g and M. For a given g, M is the best approximation of W' - g W0 of rank R, by its
    singular values. For a given row space of M, spanned by the orthonormal columns of Q (I, R), what M can express does
    not matter, and g fits the rest of each row: with P = 1 - Q Q^T,

        g = (w' P w0) / (w0 P w0)

    The two steps are repeated, and each lowers the error. If W' is a DoRA of rank R of W0, the result is that DoRA up
    to rounding. Then B A = M / g, and m = <w', v> / ||v|| for the rows v of V = W0 + B A: the norms of the rows of W'
    where their directions are met, and else the shorter ones that minimise the error.

    Args:
        W: W' (O, I) or (O, I, *K).
        W0: The base weight, in the same shape.
        rank: R; at most as many as W' has rows or columns.

    Returns:
        The adapter, with alpha = rank; tensors in fp32.
    """
    rows, base = W.flatten(1).double(), W0.flatten(1).double()
    rank = min(rank, *rows.shape)
    g, Q = _gain_and_row_space(rows, base, rank)
    A, B = Q.T, ((rows - g[:, None] * base) @ Q) / g[:, None]
    root = torch.linalg.vector_norm(B, dim=0).sqrt()
    root = root.masked_fill(root == 0, 1)
    A, B = (A * root[:, None]).float(), (B / root).float()
    V = base + B.double() @ A.double()
    norm = torch.linalg.vector_norm(V, dim=1)
    magnitude = ((rows * V).sum(1) / norm).masked_fill(norm == 0, 0).clamp(min=0)
    tensors = {"lora_A": A.view(rank, *W.shape[1:]), "lora_B": B, "magnitude": magnitude.float()}
    return LayerState(DoRASpec(rank), tensors)


def _gain_and_row_space(rows: Tensor, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The gain (O,) and Q (I, R) of `fitted_adapter`, from the rows of W' and W0 (O, I) in float64."""
    squares, dots = base.square().sum(1), (rows * base).sum(1)
    size, all_rows = (rows - base).square().sum(), rows.square().sum(1)
    g, before = _quotient(dots, squares, squares), math.inf
    num_directions = min(rank + OVERSAMPLED, *rows.shape)
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(rows.shape[1], num_directions, dtype=torch.float64, generator=generator)
    Q, rows_Z, base_Z = Z[:, :rank], rows @ Z, base @ Z
    for step in range(MOST_STEPS):
        E_Z = rows_Z - g[:, None] * base_Z  # of E = W' - g W0
        Z = torch.linalg.qr(rows.T @ E_Z - base.T @ (g[:, None] * E_Z)).Q
        rows_Z, base_Z = rows @ Z, base @ Z
        first = torch.linalg.svd(rows_Z - g[:, None] * base_Z, full_matrices=False).Vh.T[:, :rank]
        Q, rows_Q, base_Q = Z @ first, rows_Z @ first, base_Z @ first
        dots_P, squares_P = dots - (rows_Q * base_Q).sum(1), squares - base_Q.square().sum(1)
        g = _quotient(dots_P, squares_P, squares)
        error = (all_rows - rows_Q.square().sum(1) - 2 * g * dots_P + g * g * squares_P).clamp(min=0).sum()
        if error < 1e-16 * size or (step >= FEWEST_STEPS and error > (1 - ENOUGH) ** 2 * before):
            break
        before = float(error)
    return g, Q


def _quotient(dots: Tensor, squares: Tensor, scale: Tensor) -> Tensor:
    """The gains; 1 where nothing of a row of W0 is left to fit."""
    return torch.where(squares > 1e-9 * scale, dots / squares, 1.0).clamp(min=LEAST_GAIN)
