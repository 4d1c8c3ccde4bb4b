"""The second step of the embedded vision-language model: captions, through the frozen language model.

A row has an image once, and behind it its captions, each of which attends to the image and itself alone. This is
exactly as if each were a row of its own, at a third of the cost.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.build.pretraining.vision_end import GRID

ASK_CAPTION = "Describe the image in one sentence."  # as dora_mm asks for captions
IGNORED = -100  # label of a token without loss
FAR = -1e9  # added to the logits of attention where it is not allowed

Tokenize = Callable[[str], list[int]]


class SharedImageBatch(NamedTuple):
    """Rows of T tokens.

    Attributes:
        features: Of the tower, before its last stage (B, 49, channels).
        ids: The tokens (B, T).
        captions: The number of the caption that a token belongs to, 0 for image and question, -1 for padding (B, T).
        positions: Each caption continues behind the question (B, T).
        labels: The token that each should predict, or IGNORED (B, T).
    """

    features: Tensor
    ids: Tensor
    captions: Tensor
    positions: Tensor
    labels: Tensor


def row_of(sentences: Sequence[str], tokenize: Tokenize, image_id: int, length: int) -> Tensor:
    """One row, with as many sentences as fit: ids, captions, positions and labels (4, length)."""
    asked = tokenize(f"\n{ASK_CAPTION}<|im_end|>\n<|im_start|>assistant")
    start = [*tokenize("<|im_start|>user\n"), *[image_id] * GRID**2, *asked]
    row = torch.stack([torch.zeros(length), torch.full((length,), -1), torch.arange(length), torch.full((length,), -1)])
    row = row.long()
    row[3] = IGNORED
    end = len(start)
    row[0, :end], row[1, :end] = torch.tensor(start), 0
    for number, sentence in enumerate(sentences, start=1):
        caption = [*tokenize("\n"), *tokenize(f"{sentence}<|im_end|>")]
        size = len(caption)
        if end + size > length:
            continue
        row[0, end : end + size] = torch.tensor(caption)
        row[1, end : end + size] = number
        row[2, end : end + size] = torch.arange(len(start), len(start) + size)
        row[3, end : end + size - 1] = torch.tensor(caption[1:])
        end += size
    return row


def attention_mask(captions_BT: Tensor) -> Tensor:
    """What is added to the logits of attention (B, 1, T, T): tokens see image, question and their own caption."""
    own = captions_BT[:, :, None] == captions_BT[:, None]
    shared = (captions_BT[:, None] == 0) & (captions_BT[:, :, None] >= 0)
    allowed = (own | shared) & torch.ones(own.shape[1:], dtype=torch.bool).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, FAR)[:, None]


class SharedImageTask:
    """The loss of rows through a frozen language model.

    Args:
        model: A FastVlmForConditionalGeneration; its language model and head may be in bfloat16.
        end: Its trained part.
        image_id: The token that stands for a feature of an image.
    """

    def __init__(self, model: Any, end: nn.Module, image_id: int):
        self.language, self.head, self.end, self.image_id = model.model.language_model, model.lm_head, end, image_id

    def loss(self, batch: SharedImageBatch, generator: torch.Generator) -> Tensor:
        """The mean cross-entropy over the tokens of all captions; nothing is drawn from `generator`."""
        embedded = self.language.embed_tokens(batch.ids)
        tokens = self.end(batch.features).to(embedded.dtype)
        embedded = embedded.masked_scatter((batch.ids == self.image_id)[..., None], tokens)
        hidden = self.language(
            inputs_embeds=embedded,
            attention_mask=attention_mask(batch.captions).to(embedded.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        learned = batch.labels != IGNORED
        return F.cross_entropy(self.head(hidden[learned]).float(), batch.labels[learned])
