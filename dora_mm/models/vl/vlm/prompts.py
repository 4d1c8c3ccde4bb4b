"""Prompts of models without a chat template, and which rows a class can compute together."""

from __future__ import annotations

from typing import NamedTuple

from dora_mm.registries.vl_tasks import VLTask


class FallbackPrompts(NamedTuple):
    """The prompts of a model without a chat template.

    Attributes:
        question: The prompt for the answer to a question.
        caption: The prompt for a caption.
        image_token: Its image token has to be in the text, once per image; else the processor adds it.
        images: The number of images that a row may have: none, exactly one, or (None) one or more.
        separator: The text between a prompt and the answer that continues it. It is a part of the answer; of language
            models it is the end of the prompt, unless the prompt ends with white space itself.
    """

    question: str = "{text}"
    caption: str = ""
    image_token: bool = False
    images: int | None = 1
    separator: str = ""

    def prompt(self, task: VLTask) -> str:
        """The prompt of a task, with {text} for the question; a conversation is used as it is."""
        if task.fallback is not None:
            return task.fallback
        return {"questions": self.question, "captions": self.caption, "conversations": "{text}"}[task.kind]


BLIP_2 = FallbackPrompts("Question: {text} Answer:", "a photo of", separator=" ")
TEXTS = FallbackPrompts(images=0, separator="\n")  # of language models
FALLBACK_PROMPTS = {  # by model_type
    "paligemma": FallbackPrompts("answer en {text}", "caption en", image_token=True, images=None),
    "blip": FallbackPrompts(),
    "blip-2": BLIP_2,
    "instructblip": BLIP_2,
    "git": FallbackPrompts(),
    "chameleon": FallbackPrompts(image_token=True, images=None),
    "fuyu": FallbackPrompts(caption="Generate a coco-style caption.\n", separator="\x04"),
    "kosmos-2": FallbackPrompts("Question: {text} Answer:", "An image of", separator=" "),
    "florence2": FallbackPrompts(caption="What does the image describe?"),
}
# Classes that raise on a batch of rows with different numbers of images: such rows are computed apart.
SAME_IMAGES = ("mllama",)
# Classes that compute something else for a padded row, so that only rows of the same length are computed together:
# GIT's positions count the padding at the left, and BLIP's decoder attends to that of the questions.
SAME_LENGTH = ("git", "blip")
# Classes whose images are not told apart by row, so that each row is computed by itself: MiniCPM-V's stand side by side
# in one, Molmo's are found by their place among all patches of a batch, and HunYuan-VL's have a number among all images
# of a batch as one of their positions.
UNBATCHED_MODELS = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "molmo2", "emu3", "hunyuan_vl")
# Classes that read images or videos, not both at once: SmolVLM's processor drops the images of a row that has a video,
# and GLM's models take the frames of videos in a batch for images.
EITHER = ("smolvlm", "glm4v", "glm4v_moe", "glm46v", "glm_ocr")
