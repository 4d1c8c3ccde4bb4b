"""Answers whose tokens are drawn, the same in every batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from dora_mm.config.vl import TextSamplingConfig
from dora_mm.utils.randomness import generator


class SampledTokens(LogitsProcessor):
    """Makes the largest logit that of a token drawn from the distribution (the Gumbel-max trick).

    To the logits, divided by the temperature and filtered by `top_p`, noise is added that depends only on the seed, the
    row and the position in its answer. So a row has the same answer alone and in a batch, but where the batch changes
    its logits by more than the two largest sums differ: in float32 hardly ever, in half precision for a share of rows.

    Args:
        config: The temperature, the share and the seed.
        rows: What tells each row of the batch from all others.
    """

    def __init__(self, config: TextSamplingConfig, rows: Sequence[str]):
        self.config, self.rows = config, rows
        self._start: int | None = None
        self._filter = TopPLogitsWarper(config.top_p) if config.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token, of rows of tokens (B, L)."""
        if self._start is None:
            self._start = input_ids.shape[1]
        logits = scores.float() / self.config.temperature
        if self._filter is not None:
            logits = self._filter(input_ids, logits)  # pyright: ignore[reportArgumentType]
        position = input_ids.shape[1] - self._start
        return logits + torch.stack([self._noise(row, position, logits.shape[1]) for row in self.rows]).to(logits)

    def _noise(self, row: str, position: int, count: int) -> Tensor:
        """Standard Gumbel noise (V,)."""
        stream = generator(self.config.seed, position, f"answer to {row}")
        return -torch.empty(count).exponential_(generator=stream).log()
