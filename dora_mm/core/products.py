"""What a layer does with a weight: the product itself and the parts of its gradient. Here for Linear and Embedding.

Shapes: x (..., I), y and dY (..., O), weight (O, I), A (R, I), B (O, R), bias, gain, norm and magnitude (O,), h and u
(T, R); T is the number of tokens. For convolutions see convolution.py.

The low-rank branch is x -> h = x A^T -> h B^T, whose h has R features per token (in a convolution R channels per
group). Its gradients are products with R columns, so the dense (O, I) gradient of the weight is never computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.core.functional import SMALL_GAIN, Adapter, RowGains, as_matrix, directions, row_gains

LARGE_BIAS = {torch.float32: 64.0, torch.float64: 64.0}  # |b| / rms(y - b) above which y - b has lost too many digits
LARGE_BIAS_HALF = 4.0
# dA and dB can each be computed by two products. On two cores of an AMD EPYC with T = 4096, R = 16, 1280 features, in
# fp32 the one with R columns takes 1.6 ms and the one with R rows 2.8, in bf16 1.2 and 0.8.
LARGE_U = 2**15  # entries of u; below it, transposing the result costs as much as it saves
ROWS_AT_ONCE = 256  # a block of this size stays in a processor's cache: the product is never written to memory


class Product(ABC):
    """What the layer needs of an operation that is linear in its weight.

    Methods compute in the dtype of their arguments, which have one dtype unless stated otherwise.

    Attributes:
        groups: The number of groups of a convolution, otherwise 1.
        splits_half: Whether `split` rounds once in half precision.
        always_splits: Whether W(t) is never built.
    """

    groups: int = 1
    splits_half: bool = False
    always_splits: bool = False

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns y = x W^T + b, in new memory, as the base layer computes it."""

    @abstractmethod
    def num_tokens(self, x: Tensor, weight: Tensor) -> int:
        """How often each row of the weight is used: T, or N times the output positions in a convolution."""

    @abstractmethod
    def concatenate(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the input of the weight [W_a, W_b] (O, 2 I), for inputs a and b of the shape of x."""

    def concatenated(
        self, x: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Returns x W^T + other other_weight^T + b, rounded once.

        Args:
            x: Input of the first product.
            weight: Weight of the first product.
            other: Input of the second product, of the shape of x.
            other_weight: Weight of the second product, of the shape of `weight`.
            bias: b (O,), or None.
        """
        return self(self.concatenate(x, other), torch.cat([weight, other_weight], 1), bias)

    @abstractmethod
    def grad_input(self, dY: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Returns dX = dY W, of the shape of x. Of x only the shape is read."""

    # --- the low-rank branch ---

    @abstractmethod
    def reduce(self, x: Tensor, A: Tensor) -> Tensor:
        """Returns h = x A^T, (T, R)."""

    @abstractmethod
    def expand(self, h: Tensor, B: Tensor, y: Tensor) -> Tensor:
        """Adds h B^T to y in place, and returns y. y is contiguous."""

    @abstractmethod
    def grad_h(self, dY: Tensor, B: Tensor) -> Tensor:
        """Returns u = dY B, of the shape of h."""

    @abstractmethod
    def grad_B(self, dY: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Returns dY^T h, (O, R). Of B only the shape is read."""

    @abstractmethod
    def grad_A(self, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """Returns u^T x, of the shape of A. Of A only the shape is read."""

    @abstractmethod
    def add_reduced_grad(self, dX: Tensor, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """Adds u A, the gradient of x through h, to dX in place, and returns dX. Of x only the shape is read."""

    # --- output rows ---

    def rows(self, weight: Tensor, adapter: Adapter, n0: Tensor | None) -> RowGains:
        """Computes n and g, (O,) each, of one adapter.

        Args:
            weight: W0.
            adapter: The adapter.
            n0: The row norms (O,) of W0 where they are known already, else None.
        """
        return row_gains(weight, adapter, n0)

    @abstractmethod
    def per_row(self, v: Tensor, y: Tensor) -> Tensor:
        """Returns one value per output row, v (O,), in a shape that broadcasts against y."""

    @abstractmethod
    def select(self, t: Tensor, rows: Tensor) -> Tensor:
        """Selects output rows of y or dY: t (..., O) at the indices `rows` (N,) gives (..., N)."""

    @abstractmethod
    def token_sum(self, dY: Tensor) -> Tensor:
        """Returns the sum of dY over tokens, (O,)."""

    @abstractmethod
    def row_sums(self, dY: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sums over tokens.

        Returns:
            The sums of dY (y - b) and of (y - b)^2, (O,) each, in at least fp32. The second is None without a bias.
        """

    def inner_dots(self, dY: Tensor, x: Tensor, weight: Tensor, adapter: Adapter) -> Tensor:
        """Returns the sums over tokens of dY (x V^T), (O,) in at least fp32, where V = W0 + s B A."""
        V = directions(as_matrix(weight), adapter).view(weight.shape).to(dY.dtype)
        return self.row_sums(dY, self(x, V, None), None)[0]

    def chooses_rows(self) -> bool:
        """Whether sums for some rows cost nothing for the others. A compiled graph cannot branch on values."""
        return not torch.compiler.is_compiling()

    def chosen_inner_dots(
        self, dY: Tensor, x: Tensor, weight: Tensor, adapter: Adapter, chosen: Tensor
    ) -> Tensor | None:
        """Computes `inner_dots` for some rows.

        Args:
            dY: Gradient of the output.
            x: Input of the layer.
            weight: W0.
            adapter: The adapter.
            chosen: The rows, a boolean mask (O,).

        Returns:
            `inner_dots` where `chosen` is True and 0 elsewhere, (O,); None where `chosen` is False everywhere.
        """
        if self.chooses_rows() and not chosen.any():
            return None
        if not self.chooses_rows() or self.groups > 1:  # a selection of rows does not divide into groups
            return torch.where(chosen, self.inner_dots(dY, x, weight, adapter), 0.0)
        V = directions(as_matrix(weight), adapter).view(weight.shape).to(dY.dtype)
        rows = chosen.nonzero()[:, 0]
        some = self.row_sums(self.select(dY, rows), self(x, V[rows], None), None)[0]
        return some.new_zeros(len(V)).index_copy_(0, rows, some)

    def magnitude_grad(
        self,
        dY: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Adapter,
        rows: RowGains,
    ) -> Tensor:
        """Computes dm = rowsum(dY (y - b)) / m of one adapter at strength 1.

        Rows with a small gain, or with a bias much larger than y - b, use the product with V instead.

        Args:
            dY: Gradient of the output.
            x: Input of the layer.
            y: Output of the layer, which must not have been modified.
            weight: W0.
            bias: b (O,), or None.
            adapter: The adapter, which has a magnitude.
            rows: Its n and g.

        Returns:
            dm (O,) in at least fp32, 0 where n is 0.
        """
        assert rows.norm is not None
        assert rows.gain is not None
        assert adapter.magnitude is not None
        dots, squares = self.row_sums(dY, y, bias)
        dm = dots / adapter.magnitude
        if rows.regular and bias is None:
            return dm
        is_zero, unsafe = rows.norm == 0, rows.gain.abs() <= SMALL_GAIN
        if bias is not None and squares is not None:
            rms = (squares / max(self.num_tokens(x, weight), 1)).sqrt()
            unsafe = unsafe | (bias.abs() > large_bias(y.dtype) * rms)
        dots = self.chosen_inner_dots(dY, x, weight, adapter, unsafe & ~is_zero)
        if dots is not None:
            dm = torch.where(unsafe, dots / rows.norm, dm)
        return dm.masked_fill_(is_zero, 0)

    # --- the product with W0 itself, plus the low-rank branches ---

    def split(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        branches: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Returns y = e x W0^T + sum of h B^T over the branches + b.

        The bias is part of the product, as b / e, so that a fresh adapter (e = 1, B = 0) changes no bit.

        Args:
            x: Input of the layer.
            weight: W0.
            bias: b (O,), or None.
            gain: e (O,) in at least fp32, or None for 1.
            branches: Pairs (h, B), with B scaled by everything that multiplies the branch; B may have another dtype
                than h.
        """
        outside = None
        if gain is not None and bias is not None:
            if torch.compiler.is_compiling() or bool((gain.abs() <= SMALL_GAIN).any()):
                bias, outside = None, bias
            else:
                bias = bias / gain
        return self.complete(self(x, weight, bias), outside, gain, branches)

    def complete(
        self, y: Tensor, bias: Tensor | None, gain: Tensor | None, branches: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Returns e y + sum of h B^T over the branches (h, B) + b, computed in place: y is overwritten."""
        if gain is not None:
            y.mul_(self.per_row(gain, y))
        for h, B in branches:
            y = self.expand(h, B, y)
        return y if bias is None else y.add_(self.per_row(bias, y))

    def split_grad_input(
        self, dY: Tensor, x: Tensor, weight: Tensor, gain: Tensor | None, branches: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Returns dX = (e dY) W0 + sum of u A over the branches, the gradient of `split`.

        Args:
            dY: Gradient of the output.
            x: Input of the layer, of which only the shape is read.
            weight: W0.
            gain: e (O,) in at least fp32, or None for 1.
            branches: Pairs (u, A).
        """
        dX = self.grad_input(dY if gain is None else dY * self.per_row(gain, dY), x, weight)
        for u, A in branches:
            dX = self.add_reduced_grad(dX, u, x, A)
        return dX


def large_bias(dtype: torch.dtype) -> float:
    """The ratio |b| / rms(y - b) above which dm must not be computed from a y of this dtype."""
    return LARGE_BIAS.get(dtype, LARGE_BIAS_HALF)


class LinearProduct(Product):
    """Linear: y (..., O) = x (..., I) W^T + b."""

    def __call__(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def num_tokens(self, x, weight):
        return x.numel() // max(weight.shape[1], 1)

    def concatenate(self, a, b):
        return torch.cat([a, b], -1)

    def grad_input(self, dY, x, weight):
        return dY @ weight

    def reduce(self, x, A):
        return as_rows(x) @ A.T

    def expand(self, h, B, y):
        as_rows(y).addmm_(h, B.T)  # y is contiguous, a product's result
        return y

    def grad_h(self, dY, B):
        return as_rows(dY) @ B

    def grad_B(self, dY, h, B):
        return as_rows(dY).T @ h if dY.dtype.itemsize >= 4 else (h.T @ as_rows(dY)).T

    def grad_A(self, u, x, A):
        if u.numel() < LARGE_U or u.dtype.itemsize < 4:
            return u.T @ as_rows(x)
        return (as_rows(x).T @ u).T.contiguous()

    def add_reduced_grad(self, dX, u, x, A):
        as_rows(dX).addmm_(u, A)
        return dX

    def base(self, x: Tensor, weight: Tensor, A: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Computes x W0^T and W0 A^T in one product, which reads W0 once.

        Args:
            x: Input of the layer (..., I).
            weight: W0 (O, I).
            A: A (R, I), or None.

        Returns:
            x W0^T (T, O), for `complete`, and W0 A^T (O, R), which is None without A.
        """
        rows = as_rows(x)
        if A is None:
            return rows @ weight.T, None
        y, AW0 = (torch.cat([rows, A]) @ weight.T).split([len(rows), len(A)])
        return y, AW0.T

    def per_row(self, v, y):
        return v

    def select(self, t, rows):
        return t[..., rows]

    def token_sum(self, dY):
        return as_rows(dY).sum(0)

    def row_sums(self, dY, y, bias):
        dots, squares = None, None
        for some_dY, some_y in zip(row_blocks(dY), row_blocks(y), strict=True):
            inner = some_y if bias is None else some_y - bias
            dots = added_to(dots, some_dY, inner)
            squares = None if bias is None else added_to(squares, inner, inner)
        assert dots is not None
        return dots.sum(0), None if squares is None else squares.sum(0)


def row_blocks(t: Tensor) -> Iterator[Tensor]:
    """Yields t (..., features) as matrices (tokens, features) in at least fp32, ROWS_AT_ONCE tokens each."""
    rows = as_rows(t)
    for block in (rows,) if len(rows) <= ROWS_AT_ONCE else rows.split(ROWS_AT_ONCE):
        yield block if block.dtype.itemsize >= 4 else block.float()


def added_to(sums: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns sums + a b, computed in place. `sums` (None at first) has the size of the first, longest block."""
    if sums is None:
        return a * b
    sums[: len(a)].addcmul_(a, b)
    return sums


def like_tokens(y: Tensor, x: Tensor) -> Tensor:
    """Returns y (T, O) as (..., O), for x (..., I)."""
    return y.view(*x.shape[:-1], y.shape[-1])


def as_rows(t: Tensor) -> Tensor:
    """Returns t (..., features) as (T, features): a view where the memory layout allows it."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


@dataclass(frozen=True)
class EmbeddingProduct(LinearProduct):
    """Embedding: y (..., O) = the columns x (...) of W (O, num), for integer x.

    A pass reads few of the columns, so that building W(t) never pays.
    """

    padding_idx: int | None = None  # its column of A is not trained, like this row of the base
    splits_half = always_splits = True

    def __call__(self, x, weight, bias):
        return F.embedding(x, weight.t())

    def num_tokens(self, x, weight):
        return x.numel()

    def reduce(self, x, A):
        return as_rows(F.embedding(x, A.t()))

    def grad_A(self, u, x, A):
        found = u.new_zeros(A.shape[1], A.shape[0]).index_add_(0, x.flatten(), u)
        if self.padding_idx is not None:
            found[self.padding_idx] = 0
        return found.t()

    def split(self, x, weight, bias, gain, branches):
        rows = self(x, weight, None)
        y = rows.to(torch.promote_types(rows.dtype, torch.float32))  # rounded once, at the end
        if gain is not None:
            y = y.mul_(gain)
        for h, B in branches:
            y = self.expand(h, B, y)
        return y.to(rows.dtype)


LINEAR = LinearProduct()
