"""The operations of each kind of layer on its weight: the primitives that both forms of the layer consist of.

W has output rows first, and A has its shape with R rows. The branch x -> h = x A^T -> h B^T has R numbers per token (in
a convolution R channels per group of channels), so its gradients are products with R columns: a dense gradient (O, I)
of the weight is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# dA is u^T x or (x^T u)^T, and dB likewise. On two cores of an AMD EPYC with T = 4096, R = 16, 1280 features, in
# fp32 the one with R columns takes 1.6 ms and the one with R rows 2.8, in bf16 1.2 and 0.8.
LARGE_U = 2**15  # entries of u; below it, transposing the result costs as much as it saves
# Entries at once: 1 MB in fp32 stays in a processor's cache, and its memory is used again. With 2,816 features, sums
# over blocks of 256 tokens (3 MB, whose pages the system allocates anew) take four times as long.
BLOCK = 2**18


class Op:
    """The operations of a Linear on its weight: y (..., O) = x (..., I) W^T + b. All tensors of a call have one dtype.

    Attributes:
        groups: The number of groups of a convolution, otherwise 1.
        merges: Whether W(t) may be built.
        feature_dim: The dimension of y and dY that counts output rows; all others are tokens.
        stacked: Whether the weight is a stack of matrices, see `GroupedOp`.
    """

    groups: int = 1
    merges: bool = True
    feature_dim: int = -1
    stacked: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns y = x W^T + b, in new memory, as the base layer computes it."""
        return F.linear(x, weight, bias)

    def grad_input(self, dY: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Returns dX = dY W. Of x only the shape is read."""
        return dY @ weight

    def reduce(self, x: Tensor, A: Tensor) -> Tensor:
        """Returns h = x A^T."""
        return as_rows(x) @ A.T

    def add_expanded(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Adds h B^T to y, in place where its layout allows that, and returns the sum."""
        y = y.contiguous()
        as_rows(y).addmm_(h, B.T)
        return y

    def grad_h(self, dY: Tensor, B: Tensor) -> Tensor:
        """Returns u = dY B, of the shape of h."""
        return as_rows(dY) @ B

    def grad_B(self, dY: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Returns dY^T h, (O, R). Of B only the shape is read."""
        return as_rows(dY).T @ h if dY.dtype.itemsize >= 4 else (h.T @ as_rows(dY)).T

    def grad_A(self, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """Returns u^T x, of the shape of A. Of A only the shape is read."""
        if u.numel() < LARGE_U or u.dtype.itemsize < 4:
            return u.T @ as_rows(x)
        return (as_rows(x).T @ u).T.contiguous()

    def add_grad_reduced(self, dX: Tensor, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """Adds u A, the gradient of x through h, to dX, likewise, and returns the sum. Of x only the shape is read."""
        dX = dX.contiguous()
        as_rows(dX).addmm_(u, A)
        return dX

    def num_tokens(self, x: Tensor, weight: Tensor) -> int:
        """How often each row of the weight is used: T, or N times the output positions in a convolution."""
        return x.numel() // max(weight.shape[1], 1)

    def concatenate(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the input of the weight [W_a, W_b] (O, I_a + I_b), for inputs a and b of the same tokens."""
        return torch.cat([a, b], -1)

    def can_join(self, weight: Tensor, rank: int) -> bool:
        """Whether `join` can be used, and its weight is smaller than two of this one."""
        return joined_columns(rank) < weight.shape[1]

    def join(self, x: Tensor, weight: Tensor, h: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the input [x, h, 0] and the weight [W, B, 0], whose product is x W^T + h B^T as one sum."""
        missing = joined_columns(B.shape[1]) - B.shape[1]
        h, B = F.pad(h, (0, missing)), F.pad(B, (0, missing))
        return self.concatenate(x, h.view(*x.shape[:-1], h.shape[-1])), torch.cat([weight, B], 1)


@dataclass(frozen=True)
class EmbeddingOp(Op):
    """Embedding: y (..., O) = the columns x (...) of W (O, num), for integer x.

    A pass reads few of the columns, so that building W(t) never pays.
    """

    padding_idx: int | None = None  # its column of A is not trained, like this row of the base
    merges = False

    def __call__(self, x, weight, bias):
        return F.embedding(x, weight.t())

    def reduce(self, x, A):
        return as_rows(F.embedding(x, A.t()))

    def grad_A(self, u, x, A):
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        u = u.to(torch.promote_types(u.dtype, torch.float32))  # a sum in bf16 stops growing after 256 equal terms
        return torch.ops.aten.embedding_dense_backward(u, x.flatten(), A.shape[1], padding_idx, False).t()

    def num_tokens(self, x, weight):
        return x.numel()


@dataclass(frozen=True)
class ConvOp(Op):
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
    feature_dim = 1

    def __call__(self, x, weight, bias):
        return self._convolution(x, weight, bias, self.stride, self.padding, self.dilation)

    def grad_input(self, dY, x, weight):
        return self._backward(dY, x, weight, (True, False))[0]

    def reduce(self, x, A):
        return self(x, self._per_group(A), None)

    def add_expanded(self, y, h, B):
        return y.add_(self._pointwise(h, B))

    def grad_h(self, dY, B):
        """Computes u as a pointwise convolution, with the kernel transposed within each group."""
        return self._pointwise(dY, B.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1))

    def grad_B(self, dY, h, B):
        zeros, ones = self._filled(0), self._filled(1)
        return torch.ops.aten.convolution_backward(
            dY, h, self._as_kernel(B), None, ones, zeros, ones, False, zeros, self.groups, [False, True, False]
        )[1].flatten(1)

    def grad_A(self, u, x, A):
        dense = self._backward(u, x, self._per_group(A), (False, True))[1]
        return dense if self.groups == 1 else dense.unflatten(0, (self.groups, -1)).sum(0)

    def add_grad_reduced(self, dX, u, x, A):
        return dX.add_(self._backward(u, x, self._per_group(A), (True, False))[0])

    def num_tokens(self, x, weight):
        positions = x.shape[0]
        for size, kernel, stride, padding, dilation in zip(
            x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            positions *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return positions

    def concatenate(self, a, b):
        """Concatenates the channels of a and b within each group, as [W_a, W_b] are in the kernel."""
        if self.groups == 1:
            return torch.cat([a, b], 1)  # in their memory layout
        split = [t.unflatten(1, (self.groups, -1)) for t in (a, b)]
        return torch.cat(split, 2).flatten(1, 2)

    def can_join(self, weight, rank):
        """There has to be an entry of the kernel that reads position s p of x for every output position p."""
        geometry = zip(weight.shape[2:], self.padding, self.dilation, strict=True)
        return super().can_join(weight, rank) and all(
            padding % dilation == 0 and 2 * padding <= dilation * (size - 1) for size, padding, dilation in geometry
        )

    def join(self, x, weight, h, B):
        """Sets the kernel entry of `can_join` to B, and writes h at the positions of x that it reads."""
        rank, size = B.shape[1], joined_columns(B.shape[1])
        entry = [padding // dilation for padding, dilation in zip(self.padding, self.dilation, strict=True)]
        every = [slice(0, s * (n - 1) + 1, s) for n, s in zip(h.shape[2:], self.stride, strict=True)]
        kernel, channels = torch.zeros_like(weight[:, :size]), torch.zeros_like(x[:, : self.groups * size])
        kernel[(slice(None), slice(rank), *entry)] = B
        by_group = channels.unflatten(1, (self.groups, size))
        by_group[(slice(None), slice(None), slice(rank), *every)] = h.unflatten(1, (self.groups, rank))
        return self.concatenate(x, channels), torch.cat([weight, kernel], 1)

    def _filled(self, value: int) -> list[int]:
        return [value] * len(self.stride)

    def _convolution(self, x, weight, bias, stride, padding, dilation):
        zeros = self._filled(0)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, self.groups)

    def _backward(self, dY, x, weight, wanted):
        """The gradients of input and weight; `wanted` says which of the two to compute."""
        return torch.ops.aten.convolution_backward(
            dY, x, weight, None, self.stride, self.padding, self.dilation, False, self._filled(0), self.groups,
            [*wanted, False],
        )  # fmt: skip

    def _per_group(self, A: Tensor) -> Tensor:
        """A repeated for every group: (groups R, C / groups, *K)."""
        return A if self.groups == 1 else A.repeat(self.groups, *[1] * (A.dim() - 1))

    def _as_kernel(self, B: Tensor) -> Tensor:
        return B.reshape(*B.shape, *self._filled(1))

    def _pointwise(self, h: Tensor, B: Tensor) -> Tensor:
        return self._convolution(h, self._as_kernel(B), None, self._filled(1), self._filled(0), self._filled(1))


LINEAR = Op()


@dataclass(frozen=True)
class BatchedOp(Op):
    """A Linear that multiplies the weight by each token of x (T, I) on its own, as a batched product does.

    Attributes:
        transposed: Whether the weight is stored as (I, O); the two products add in different orders.
        least: The least number of tokens of a product: that of a single one adds in another order.
    """

    transposed: bool = False
    least: int = 2

    def __call__(self, x, weight, bias):
        rows = x.expand(max(len(x), self.least), -1) if len(x) == 1 else x
        if self.transposed:
            y = torch.bmm(rows.unsqueeze(1), weight.t().expand(len(rows), *weight.t().shape)).squeeze(1)
        else:
            y = torch.bmm(weight.expand(len(rows), *weight.shape), rows.unsqueeze(2)).squeeze(2)
        y = y[: len(x)]
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True)
class GroupedOp(Op):
    """Linears on a stack of weights W (E, O, I): rows of x (S, I) that follow each other are those of one of them.

    A is then (E, R, I), B (E, O, R), magnitudes and norms (E, O).

    Attributes:
        ends: The end of the rows of each weight, (E,), ascending to S.
        each: The operation of each of them.
    """

    ends: Tensor
    each: Op = LINEAR
    stacked = True

    def counts(self, num_rows: int) -> list[int]:
        """The number of rows of each weight, S in all; waits for the device. Without numbers, they are divided evenly.

        Args:
            num_rows: S.
        """
        number = len(self.ends)
        ends = [num_rows * i // number for i in range(1, number + 1)] if self.ends.is_meta else self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def joined_columns(rank: int) -> int:
    """The number of columns that a branch adds to W0, whose rows GPUs read fastest in steps of 16 bytes."""
    return (rank + 7) // 8 * 8


# --- what follows from them ------------------------------------------------------------------------------------------


def as_rows(t: Tensor) -> Tensor:
    """Returns t (..., features) as (T, features): a view where the memory layout allows it."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def per_row(op: Op, v: Tensor, y: Tensor) -> Tensor:
    """Returns one value per output row, v (O,), in a shape that broadcasts against y."""
    return v if op.feature_dim == -1 else v.view(-1, *[1] * (y.dim() - 2))


def sum_tokens(op: Op, dY: Tensor) -> Tensor:
    """Returns the sums of dY over tokens, (O,)."""
    return as_rows(dY).sum(0) if op.feature_dim == -1 else dY.sum([0, *range(2, dY.dim())])


def mean_square(op: Op, y: Tensor, bias: Tensor) -> Tensor:
    """Returns the means over tokens of (y - b)^2, (O,) in at least fp32, without a copy of y.

    By E[y^2] - 2 b E[y] + b^2, which loses (b / rms)^2 of the digits: of a ratio of 64 it knows three.
    """
    rows = as_rows(y) if op.feature_dim == -1 else y
    over, dtype = [0, *range(2, rows.dim())], torch.promote_types(y.dtype, torch.float32)
    count = max(rows.numel() // max(len(bias), 1), 1)
    squares = torch.linalg.vector_norm(rows, dim=over, dtype=dtype).square_() / count
    mean, b = rows.sum(over, dtype=dtype) / count, bias.to(dtype)
    return (squares - 2 * b * mean + b.square()).clamp_min_(0)


def row_sums(
    op: Op, dY: Tensor, y: Tensor, bias: Tensor | None, *, wants_squares: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Sums over tokens.

    Returns:
        The sums of dY (y - b) and of (y - b)^2, (O,) each, in at least fp32. The second is None without a bias, or
        where it is not wanted.
    """
    dots = squares = None
    dtype = y.dtype if y.dtype.itemsize >= 4 else torch.float32
    for some_dY, some_y in zip(_blocks(op, dY), _blocks(op, y), strict=True):
        inner = some_y if y.dtype == dtype else some_y.to(dtype)
        if bias is not None:
            inner = inner - per_row(op, bias, inner)
            if wants_squares:
                squares = _added(squares, inner, inner)
        dots = _added(dots, some_dY, inner)
    assert dots is not None
    return sum_tokens(op, dots), None if squares is None else sum_tokens(op, squares)


def _blocks(op: Op, y: Tensor) -> Sequence[Tensor]:
    if op.feature_dim != -1:
        return (y,)
    rows = as_rows(y)
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or rows.numel() <= BLOCK:
        return (rows,)  # a compiler makes loops of its own, and would make a graph for each number of blocks
    return rows.split(max(1, BLOCK // rows.shape[1]))


def _added(sums: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns sums + a b, in place. `sums` (None at first) has the size of the first, longest block."""
    if sums is None:
        return a * b
    sums[: len(a)].addcmul_(a, b)
    return sums
