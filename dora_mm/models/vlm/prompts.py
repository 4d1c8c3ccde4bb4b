"""What a model is asked in each task, and what the classes without a chat template can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PROMPTS = {
    "vqa": "{text}\nAnswer with a word or a short phrase.",
    "gqa": "{text}\nAnswer with a word or a short phrase.",
    "nlvr2": "{text}\nIs this true of the two images? Answer true or false.",
    "caption": "Describe the image in one sentence.",
    "choice": "{text}\nAnswer with the letter of the right option.",
    "chat": "{text}",
}
ANSWER_TOKENS = {"caption": 40, "chat": 256}  # the longest generated answer; 16 in all other tasks
DECIDED = {"nlvr2": ("true", "false")}  # tasks whose answer is the likeliest of these


class PlainPrompts(NamedTuple):
    """What a class without a chat template reads.

    Attributes:
        prompts: Its prompts where they differ from a bare question.
        image_token: Its image token has to be in the text, once per image; else the processor adds it.
        images: The number of images that a row may have: exactly one, or (None) one or more.
        separator: What stands between a prompt and the answer that continues it.
    """

    prompts: Mapping[str, str]
    image_token: bool = False
    images: int | None = 1
    separator: str = ""


QUESTION = dict.fromkeys(PROMPTS, "{text}")
BLIP_2 = QUESTION | dict.fromkeys(("vqa", "gqa", "choice"), "Question: {text} Answer:") | {"caption": "a photo of"}
PLAIN = {  # by model_type
    "paligemma": PlainPrompts(
        QUESTION | dict.fromkeys(("vqa", "gqa", "nlvr2", "choice"), "answer en {text}") | {"caption": "caption en"},
        image_token=True,
        images=None,
    ),
    "blip": PlainPrompts(QUESTION),
    "blip-2": PlainPrompts(BLIP_2, separator=" "),
    "instructblip": PlainPrompts(BLIP_2, separator=" "),
    "git": PlainPrompts(QUESTION),
    "florence2": PlainPrompts(QUESTION | {"caption": "What does the image describe?"}),
}
# Classes that raise on a batch of rows with different numbers of images: such rows are computed apart.
SAME_IMAGES = ("mllama",)
# Classes that compute something else for a padded row, so that only rows of the same length are computed together:
# GIT's positions count the padding at the left, and BLIP's decoder attends to that of the questions.
SAME_LENGTH = ("git", "blip")
