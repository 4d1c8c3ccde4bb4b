"""Conversations as text: a model's chat template, and the places of the answers in what it renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dora_mm.data.vl.example import IMAGE, Turn


class ChatText(NamedTuple):
    """A conversation as text.

    Attributes:
        text: What the model reads, with the processor's image token in the place of each image.
        spans: Where in `text` the learned answers are, as (start, end), the token that ends each turn included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(processor: Any, turns: Sequence[Turn]) -> ChatText:
    """Renders a conversation for training.

    An answer follows the very text that asks for it when the model answers, also where the template renders an answered
    turn in another way (LLaVA-OneVision). Where the template puts no special token behind an answer (LLaVA 1.5), the
    end-of-sequence token is inserted: without it, the model would never learn to stop.

    Args:
        processor: A processor with a chat template.
        turns: The conversation.

    Raises:
        ValueError: The template refuses the conversation, or does not render an answer as it was given.
    """
    whole = apply_template(processor, turns)
    tokenizer = processor.tokenizer
    ends = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
    text, spans, done = "", [], 0  # the text up to `done` in `whole`
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = apply_template(processor, turns[:number], ask=True)
        start = _shared(prompt, whole)
        last = number + 1 == len(turns)
        so_far = len(whole) if last else _shared(apply_template(processor, turns[: number + 1]), whole)
        end = start + len(whole[start:so_far].rstrip())
        place = whole.find(turn.text.strip(), start, end)
        if place < 0:
            raise ValueError(f"the chat template does not render this answer as it is: {turn.text[:80]!r}")
        text += whole[done:start] + prompt[start:]
        said = whole[start if start == len(prompt) else place : end]
        said += "" if said.endswith(ends) else tokenizer.eos_token
        if turn.loss:
            spans.append((len(text), len(text) + len(said)))
        text, done = text + said, end
    return ChatText(text + whole[done:], tuple(spans))


def render_prompt(processor: Any, turns: Sequence[Turn]) -> str:
    """Renders a conversation up to the place where the model answers."""
    return apply_template(processor, turns, ask=True)


def apply_template(processor: Any, turns: Sequence[Turn], *, ask: bool = False) -> str:
    """Applies the chat template; with `ask`, what begins the model's next turn follows.

    Raises:
        ValueError: The template refuses the conversation, for example its order of roles.
    """
    messages = [{"role": turn.role, "content": _content(turn.text)} for turn in turns]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    except Exception as error:  # templates raise jinja2's errors, and whatever their filters do
        raise ValueError(f"the chat template refuses a conversation: {' '.join(str(error).split())[:300]}") from error


def _content(text: str) -> list[dict[str, str]]:
    """The items of a message. Templates set images apart by themselves, so line breaks beside them go."""
    items: list[dict[str, str]] = []
    pieces = text.split(IMAGE)
    for number, piece in enumerate(pieces):
        if number:
            items.append({"type": "image"})
            piece = piece.removeprefix("\r").removeprefix("\n")
        piece = piece.removesuffix("\n").removesuffix("\r") if number + 1 < len(pieces) else piece
        if piece:
            items.append({"type": "text", "text": piece})
    return items or [{"type": "text", "text": ""}]


def _shared(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
