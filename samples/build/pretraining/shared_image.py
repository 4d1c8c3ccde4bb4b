"""The second step of the embedded vision-language model: captions and questions, through the frozen language model.

A row has an image once, and behind it several turns, each of which attends to the image and itself alone. This is
exactly as if each were a row of its own, at a third of the cost.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.build.pretraining.vision_end import GRID
from samples.build.scenes.questions import FAMILIES, all_questions
from samples.build.scenes.scenes import Scene
from samples.build.scenes.sentences import captions
from samples.build.scenes.things import Thing

ASK_CAPTION = "Describe the image in one sentence."  # as dora_mm asks for captions
NUM_CAPTIONS, NUM_QUESTIONS = 2, 9  # of a row, at most: those that no longer fit are left out
IGNORED = -100  # label of a token without loss
FAR = -1e9  # added to the logits of attention where it is not allowed

Tokenize = Callable[[str], list[int]]


class SharedImageBatch(NamedTuple):
    """Rows of T tokens.

    Attributes:
        features: Of the tower, before its last stage (B, 49, channels).
        ids: The tokens (B, T).
        turns: The number of the turn that a token belongs to, 0 for the image, -1 for padding (B, T).
        positions: Each turn continues behind the image (B, T).
        labels: The token that each should predict, or IGNORED (B, T).
    """

    features: Tensor
    ids: Tensor
    turns: Tensor
    positions: Tensor
    labels: Tensor


def turns_of(things: Sequence[Thing], scene: Scene, seed: int, stream: random.Random) -> list[tuple[str, str]]:
    """What is asked about a scene, with the answers: captions, and questions whose answers are evenly mixed."""
    found = [(ASK_CAPTION, caption) for caption in stream.sample(captions(scene, seed), NUM_CAPTIONS)]
    by_answer: dict[str, dict[str, list[str]]] = {}
    for question in all_questions(things, scene, stream):
        by_answer.setdefault(question.family, {}).setdefault(question.answer, []).append(question.text)
    for family in stream.choices(list(by_answer), [FAMILIES[family][0] for family in by_answer], k=NUM_QUESTIONS):
        answer = stream.choice(sorted(by_answer[family]))
        found.append((stream.choice(by_answer[family][answer]), answer))
    return found


def row_of(turns: Sequence[tuple[str, str]], tokenize: Tokenize, image_id: int, length: int) -> Tensor:
    """One row: ids, turns, positions and labels (4, length)."""
    start = [*tokenize("<|im_start|>user\n"), *[image_id] * GRID**2, *tokenize("\n")]
    row = torch.stack([torch.zeros(length), torch.full((length,), -1), torch.arange(length), torch.full((length,), -1)])
    row = row.long()
    row[3] = IGNORED
    end = len(start)
    row[0, :end], row[1, :end] = torch.tensor(start), 0
    for number, (question, answer) in enumerate(turns, start=1):
        asked = tokenize(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        target = tokenize(f"{answer}<|im_end|>")
        size = len(asked) + len(target)
        if end + size > length:
            continue
        row[0, end : end + size] = torch.tensor(asked + target)
        row[1, end : end + size] = number
        row[2, end : end + size] = torch.arange(len(start), len(start) + size)
        row[3, end + len(asked) - 1 : end + size - 1] = torch.tensor(target)
        end += size
    return row


def attention_mask(turns_BT: Tensor) -> Tensor:
    """What is added to the logits of attention (B, 1, T, T): tokens see the image and their own turn, up to here."""
    own = turns_BT[:, :, None] == turns_BT[:, None]
    image = (turns_BT[:, None] == 0) & (turns_BT[:, :, None] >= 0)
    allowed = (own | image) & torch.ones(own.shape[1:], dtype=torch.bool).tril()
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
        """The mean cross-entropy over the tokens of all answers; nothing is drawn from `generator`."""
        embedded = self.language.embed_tokens(batch.ids)
        tokens = self.end(batch.features).to(embedded.dtype)
        embedded = embedded.masked_scatter((batch.ids == self.image_id)[..., None], tokens)
        hidden = self.language(
            inputs_embeds=embedded,
            attention_mask=attention_mask(batch.turns).to(embedded.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        learned = batch.labels != IGNORED
        return F.cross_entropy(self.head(hidden[learned]).float(), batch.labels[learned])
