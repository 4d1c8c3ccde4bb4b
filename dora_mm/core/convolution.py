"""What a convolution does with a weight: see `Product` in products.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_mm.core.products import Product


@dataclass(frozen=True)
class ConvProduct(Product):
    """Convolution: y (N, O, *positions) = x (N, C, *positions) convolved with W (O, C / groups, *K), plus b (O,).

    A is (R, C / groups, *K) and the same for every group of channels; h and u are (N, groups R, *positions).

    Attributes:
        stride: One number per dimension of K, in positions.
        padding: One number per dimension, of zeros at either end.
        dilation: One number per dimension.
        groups: The number of groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __call__(self, x, weight, bias):
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, self._zeros, self.groups
        )

    def num_tokens(self, x, weight):
        positions = x.shape[0]
        for size, kernel, stride, padding, dilation in zip(
            x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            positions *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return positions

    def concatenate(self, a, b):
        """Concatenates the channels of a and b within each group, as [W_a, W_b] are in the kernel."""
        split = [t.unflatten(1, (self.groups, -1)) for t in (a, b)]
        return torch.cat(split, 2).flatten(1, 2)

    def grad_input(self, dY, x, weight):
        return self._backward(dY, x, weight, (True, False))[0]

    def reduce(self, x, A):
        return self(x, self._per_group(A), None)

    def expand(self, h, B, y):
        return y.add_(self._pointwise(h, B))

    def grad_h(self, dY, B):
        """Computes u as a pointwise convolution, with the kernel transposed within each group."""
        return self._pointwise(dY, B.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1))

    def grad_B(self, dY, h, B):
        return torch.ops.aten.convolution_backward(
            dY, h, self._as_kernel(B), None, self._ones, self._zeros, self._ones, False, self._zeros, self.groups,
            [False, True, False],
        )[1].flatten(1)  # fmt: skip

    def grad_A(self, u, x, A):
        dense = self._backward(u, x, self._per_group(A), (False, True))[1]
        return dense if self.groups == 1 else dense.unflatten(0, (self.groups, -1)).sum(0)

    def add_reduced_grad(self, dX, u, x, A):
        return dX.add_(self._backward(u, x, self._per_group(A), (True, False))[0])

    def per_row(self, v, y):
        return v.view(-1, *[1] * len(self.stride))

    def select(self, t, rows):
        return t[:, rows]

    def token_sum(self, dY):
        return dY.sum([0, *range(2, dY.dim())])

    def row_sums(self, dY, y, bias):
        dims = [0, *range(2, y.dim())]
        inner = y.to(torch.promote_types(y.dtype, torch.float32))
        squares = None
        if bias is not None:
            inner = inner - self.per_row(bias, y)
            squares = (inner * inner).sum(dims)
        return (dY * inner).sum(dims), squares

    @property
    def _zeros(self) -> list[int]:
        return [0] * len(self.stride)

    @property
    def _ones(self) -> list[int]:
        return [1] * len(self.stride)

    def _backward(self, dY, x, weight, wanted):
        """The gradients of input and weight; `wanted` says which of the two to compute."""
        return torch.ops.aten.convolution_backward(
            dY, x, weight, None, self.stride, self.padding, self.dilation, False, self._zeros, self.groups,
            [*wanted, False],
        )  # fmt: skip

    def _per_group(self, A: Tensor) -> Tensor:
        """A repeated for every group: (groups R, C / groups, *K)."""
        return A if self.groups == 1 else A.repeat(self.groups, *[1] * (A.dim() - 1))

    def _as_kernel(self, B: Tensor) -> Tensor:
        return B.reshape(*B.shape, *self._ones)

    def _pointwise(self, h: Tensor, B: Tensor) -> Tensor:
        return torch.convolution(
            h, self._as_kernel(B), None, self._ones, self._zeros, self._ones, False, self._zeros, self.groups
        )
