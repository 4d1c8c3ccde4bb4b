"""The stand-in for the weights of experts, of which their class can only take products with tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dora_mm.core.functional import without_autocast
from dora_mm.core.ops import LINEAR, BatchedOp, GroupedOp

READABLE = {"device", "dtype", "shape", "ndim", "is_cuda", "requires_grad", "size", "dim", "data_ptr"}
MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@dataclass(frozen=True, eq=False)
class StandIn:
    """What a class takes for the weights of its experts: experts are chosen by indexing, and multiply tokens.

    Attributes:
        name: Of the parameter, for errors.
        weight: The parameter.
        product: Takes x (S, I), an operation, and the index of the expert where all rows of x are for one.
        transposed: Whether the parameter is (E, I, O).
        out_first: Whether the last two dimensions of the stand-in are (O, I).
        chosen: The index of an expert; those of the experts of each row (S,); or None for all experts.
    """

    name: str
    weight: Tensor
    product: Callable[..., Tensor]
    transposed: bool
    out_first: bool
    chosen: Tensor | int | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in READABLE:
            raise AttributeError(f"the adapted {self.name} has no {name}: only its products with tokens are known")
        return getattr(self.weight, name)

    def element_size(self) -> int:
        """Of the weights that are multiplied; those of one byte FP8Experts would give to a kernel."""
        return max(self.weight.element_size(), 2)

    def __getitem__(self, index: Any) -> StandIn:
        if self.chosen is not None or not isinstance(index, int | Tensor):
            raise self._unknown(f"an index of type {type(index).__name__}")
        single = isinstance(index, int) or index.dim() == 0
        return replace(self, chosen=int(index) if single else index)

    def transpose(self, first: int, second: int) -> StandIn:
        """Swaps the last two dimensions."""
        if {first % 3, second % 3} != {1, 2} or self.chosen is not None:
            raise self._unknown(f"transpose({first}, {second})")
        return replace(self, out_first=not self.out_first)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes a product of tokens with a stand-in.

        Raises:
            TypeError: The function is another one.
        """
        kwargs = dict(kwargs or {})
        own = next(value for value in (*args, *kwargs.values()) if isinstance(value, StandIn))
        name = getattr(function, "__name__", str(function))
        if function is F.linear:
            return own._linear(*args, **kwargs)
        if function in MATMUL and args[1] is own and not kwargs:
            return own._matmul(args[0])
        if function is torch.bmm and not kwargs:
            return own._bmm(*args)
        if "grouped_mm" in name:
            return own._grouped(*args, **kwargs)
        raise own._unknown(name)

    def _unknown(self, what: str) -> TypeError:
        return TypeError(
            f"{self.name} is adapted, and its class uses it in a way that is not known ({what}): adapt other parts"
        )

    def _linear(self, x: Tensor, own: Any, bias: Tensor | None = None) -> Tensor:
        if own is not self or not isinstance(self.chosen, int) or not self.out_first:
            raise self._unknown("linear")
        y = self.product(x, LINEAR, self.chosen)
        return y if bias is None else y + bias

    def _matmul(self, x: Tensor) -> Tensor:
        if not isinstance(self.chosen, int) or self.out_first:
            raise self._unknown("matmul")
        return self.product(x, LINEAR, self.chosen)

    def _grouped(self, x: Tensor, own: Any, *others: Any, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
        """A grouped product, which is not autocast."""
        ends = others[0] if others else offs
        if own is not self or self.out_first or ends is None or any(v is not None for v in kwargs.values()):
            raise self._unknown("grouped_mm")
        with without_autocast(x.device):
            return self.product(x.to(self.weight.dtype), GroupedOp(ends))

    def _bmm(self, first: Any, second: Any) -> Tensor:
        if self.chosen is None:
            return self._dense(first, second)
        if first is self and self.out_first:
            return self._of_rows(second.squeeze(2)).unsqueeze(2)
        if second is self and not self.out_first:
            return self._of_rows(first.squeeze(1)).unsqueeze(1)
        raise self._unknown("bmm")

    def _dense(self, x: Any, own: Any) -> Tensor:
        """Every expert has as many tokens, x (E, T, I)."""
        if own is not self or self.out_first:
            raise self._unknown("bmm")
        num_experts, num_tokens, _ = x.shape
        ends = torch.arange(1, num_experts + 1, device=x.device) * num_tokens
        return self.product(x.flatten(0, 1), GroupedOp(ends)).unflatten(0, (num_experts, num_tokens))

    def _of_rows(self, x: Tensor) -> Tensor:
        """Every row of x (S, I) has its expert."""
        chosen = self.chosen
        assert isinstance(chosen, Tensor)
        order = chosen.argsort(stable=True)
        ends = chosen.new_zeros(self.weight.shape[0]).scatter_add_(0, chosen, torch.ones_like(chosen)).cumsum(0)
        each = BatchedOp(self.transposed, least=min(len(x), 2))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return self.product(x[order], GroupedOp(ends, each))[back]
