"""What a layer does with a weight: the product itself and the pieces of its gradient. Here for Linear and Embedding.

The low-rank branch is x -> h = x A^T -> h B^T, whose h has R features a token (a convolution: R channels a group). Its
gradients are products with R columns, so the dense (O, I) gradient of the weight is never computed.
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
# Of the two products that give dA or dB, on two cores of an AMD EPYC with T = 4096, R = 16, 1280 features: in fp32 the
# one with R columns takes 1.6 ms and that with R rows 2.8, in bf16 1.2 and 0.8.
LARGE_U = 2**15  # entries of u; below, turning the result costs as much as it saves
ROWS_AT_ONCE = 256  # a block of them stays in a processor's cache: the product is never written to memory


class Product(ABC):
    groups: int = 1
    splits_half: bool = False  # whether `split` rounds once in half precision
    always_splits: bool = False  # whether W(t) is never built

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b."""

    @abstractmethod
    def num_tokens(self, x: Tensor, weight: Tensor) -> int:
        """How often each row of the weight is used."""

    @abstractmethod
    def concatenate(self, a: Tensor, b: Tensor) -> Tensor:
        """The inputs of a weight [W_a, W_b] with twice the columns."""

    def concatenated(
        self, x: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x W^T + other other_W^T + b, where the first product is rounded with the second in it."""
        return self(self.concatenate(x, other), torch.cat([weight, other_weight], 1), bias)

    @abstractmethod
    def grad_input(self, dY: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """dY W."""

    # --- the low-rank branch ---

    @abstractmethod
    def reduce(self, x: Tensor, A: Tensor) -> Tensor:
        """h = x A^T."""

    @abstractmethod
    def expand(self, h: Tensor, B: Tensor, y: Tensor) -> Tensor:
        """y += h B^T in place."""

    @abstractmethod
    def grad_h(self, dY: Tensor, B: Tensor) -> Tensor:
        """u = dY B, of h's shape."""

    @abstractmethod
    def grad_B(self, dY: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """dY^T h, (O, R)."""

    @abstractmethod
    def grad_A(self, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """u^T x, of A's shape."""

    @abstractmethod
    def add_reduced_grad(self, dX: Tensor, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        """dX += u A in place: the gradient that reaches x through h."""

    # --- output rows ---

    def rows(self, weight: Tensor, adapter: Adapter, n0: Tensor | None) -> RowGains:
        """n and g of one adapter. n0: the row norms of a weight that is known not to have changed."""
        return row_gains(weight, adapter, n0)

    @abstractmethod
    def per_row(self, v: Tensor, y: Tensor) -> Tensor:
        """A value per output row, (O,), in a shape that multiplies y."""

    @abstractmethod
    def select(self, t: Tensor, rows: Tensor) -> Tensor:
        """The chosen output rows of y or dY."""

    @abstractmethod
    def token_sum(self, dY: Tensor) -> Tensor:
        """(O,)."""

    @abstractmethod
    def row_sums(self, dY: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sums over tokens of dY (y - b) and, where there is a bias, of (y - b)^2: (O,) each, in at least fp32."""

    def inner_dots(self, dY: Tensor, x: Tensor, weight: Tensor, adapter: Adapter) -> Tensor:
        """Sums over tokens of dY (x V^T): (O,)."""
        V = directions(as_matrix(weight), adapter).view(weight.shape).to(dY.dtype)
        return self.row_sums(dY, self(x, V, None), None)[0]

    def chooses_rows(self) -> bool:
        """Whether sums for chosen rows cost nothing for the others: a compiled graph cannot branch on values."""
        return not torch.compiler.is_compiling()

    def chosen_inner_dots(
        self, dY: Tensor, x: Tensor, weight: Tensor, adapter: Adapter, chosen: Tensor
    ) -> Tensor | None:
        """`inner_dots` for the rows where `chosen` (O,) is True, 0 elsewhere; None for 0."""
        if self.chooses_rows() and not chosen.any():
            return None
        if not self.chooses_rows() or self.groups > 1:  # some rows of a grouped convolution are none
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
        """dm = rowsum(dY (y - b)) / m of one adapter at strength 1; 0 where n is 0.

        Rows whose gain is small, or whose bias drowns y, take the product with V instead.
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

    # --- the product with W0 as it is, and the low-rank branch beside it ---

    def split(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        low: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """y = e x W0^T + sum of h B^T over (h, B) + b, with e (O,).

        The bias rides inside the product as b / e, so that a fresh adapter (e = 1, B = 0) changes no bit.
        """
        outside = None
        if gain is not None and bias is not None:
            if torch.compiler.is_compiling() or bool((gain.abs() <= SMALL_GAIN).any()):
                bias, outside = None, bias
            else:
                bias = bias / gain
        return self.complete(self(x, weight, bias), outside, gain, low)

    def complete(
        self, y: Tensor, bias: Tensor | None, gain: Tensor | None, low: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """e y + sum of h B^T over (h, B) + b, in place."""
        if gain is not None:
            y.mul_(self.per_row(gain, y))
        for h, B in low:
            y = self.expand(h, B, y)
        return y if bias is None else y.add_(self.per_row(bias, y))

    def split_grad_input(
        self, dY: Tensor, x: Tensor, weight: Tensor, gain: Tensor | None, low: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """dX = (e dY) W0 + sum of u A over (u, A)."""
        dX = self.grad_input(dY if gain is None else dY * self.per_row(gain, dY), x, weight)
        for u, A in low:
            dX = self.add_reduced_grad(dX, u, x, A)
        return dX


def large_bias(dtype: torch.dtype) -> float:
    return LARGE_BIAS.get(dtype, LARGE_BIAS_HALF)


class LinearProduct(Product):
    """y (..., O) = x (..., I) W^T + b; h and u are (T, R)."""

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
        """x W0^T, (T, O), for `complete`, and W0 A^T out of the same product, which reads W0 once."""
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
    """(T, features) in at least fp32, a block of tokens at a time."""
    rows = as_rows(t)
    for block in (rows,) if len(rows) <= ROWS_AT_ONCE else rows.split(ROWS_AT_ONCE):
        yield block if block.dtype.itemsize >= 4 else block.float()


def added_to(sums: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """sums + a b in place, for blocks of which the first is the longest."""
    if sums is None:
        return a * b
    sums[: len(a)].addcmul_(a, b)
    return sums


def like_tokens(y: Tensor, x: Tensor) -> Tensor:
    """(T, O) in x's shape."""
    return y.view(*x.shape[:-1], y.shape[-1])


def as_rows(t: Tensor) -> Tensor:
    """(T, features); a view where the memory allows it."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


@dataclass(frozen=True)
class EmbeddingProduct(LinearProduct):
    """y (..., O) = the columns ids (...) of W (O, num). Reading a few of them never pays for building W(t)."""

    padding_idx: int | None = None  # its column of A is not trained, as the base's row is not
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

    def split(self, x, weight, bias, gain, low):
        rows = self(x, weight, None)
        y = rows.to(torch.promote_types(rows.dtype, torch.float32))  # rounded once, at the end
        if gain is not None:
            y = y.mul_(gain)
        for h, B in low:
            y = self.expand(h, B, y)
        return y.to(rows.dtype)


LINEAR = LinearProduct()
