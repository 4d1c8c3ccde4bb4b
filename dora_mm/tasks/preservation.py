"""Prior preservation: images with prompts on which the base model's prediction is the target."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dora_mm.config.images import PreserveConfig, TrainDiffusionConfig
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.tasks.diffusion import ConditionedLatents
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import Caption, PromptEncoder, text_of, with_text


class PreservingBatches:
    """Batches of a training, with prior preservation added.

    A training divides the sum of a step's losses by the sum of its weights. What is held is a mean of its own: so its
    sum is multiplied by that divisor over its own count, both of all micro-batches and processes of the step.

    Args:
        batches: Those of the training.
        config: The `preserve` section.
        placeholder: The word that captions lose where the section has no prompt.
        class_images: Batches of images with captions of their own; None: those of the training are taken.
        micro_batches: Those of an optimizer step.
    """

    def __init__(
        self,
        batches: CaptionedBatches,
        config: PreserveConfig,
        placeholder: str | None,
        class_images: CaptionedBatches | None,
        micro_batches: int,
    ):
        self.batches, self.config, self.placeholder = batches, config, placeholder
        self.class_images, self.micro_batches = class_images, micro_batches

    @property
    def prompts(self) -> PromptEncoder:
        return self.batches.prompts

    def captions(self, num_batches: int) -> list[Caption]:
        """All captions of a training of so many batches, and those that are held, each once."""
        own = self.batches.captions(num_batches)
        preserved = self.class_images.captions(num_batches) if self.class_images else map(self._prompt, own)
        return list(dict.fromkeys([*own, *preserved]))

    def encode_all(self, num_batches: int) -> None:
        """Encodes ahead what stays the same, but for the batches of the training."""
        if self.class_images is not None:
            self.class_images.encode_all(num_batches)
        elif not self.batches.prompts.trained:
            self.batches.prompts.keep([self._prompt(caption) for caption in self.batches.captions(num_batches)], 1)

    def __call__(self, number: int) -> ConditionedLatents:
        """This process's batch of this number."""
        batch, step = self.batches(number), number // self.micro_batches
        if step % self.config.every:
            return batch
        preserved = self._of_class_images(number) if self.class_images else self._of_batch(batch, number)
        return replace(batch, preserved=preserved, preserved_weight=self.config.weight * self._ratio(step))

    def _of_class_images(self, number: int) -> ConditionedLatents:
        assert self.class_images is not None
        batch, captions = self.class_images(number), self.class_images.captions_of(number)
        base_prompts = self.class_images.encode_by_base(captions, [False] * len(captions))
        return replace(batch, weights=None, base_prompts=base_prompts)

    def _of_batch(self, batch: ConditionedLatents, number: int) -> ConditionedLatents:
        texts = [self._prompt(caption) for caption in self.batches.captions_of(number)]
        dropped = [not text_of(text) for text in texts]
        prompts, base_prompts = self.batches.encode(texts, dropped), self.batches.encode_by_base(texts, dropped)
        latents, framings, references = batch.latents, batch.framings, batch.references
        return ConditionedLatents(latents, prompts, framings, references=references, base_prompts=base_prompts)

    def _prompt(self, caption: Caption) -> Caption:
        if self.config.prompt is not None:
            return with_text(caption, self.config.prompt)
        assert self.placeholder is not None
        return with_text(caption, without_word(text_of(caption), self.placeholder))

    def _ratio(self, step: int) -> float:
        """The divisor of the training's losses in a step, over the number of images that are held."""
        numbers = range(step * self.micro_batches, (step + 1) * self.micro_batches)
        own = [self.batches.counts(number) for number in numbers]
        preserved = [self.class_images.counts(number) for number in numbers] if self.class_images else own
        return sum(weight for weight, _ in own) / sum(count for _, count in preserved)


def preserving(
    batches: CaptionedBatches, config: TrainDiffusionConfig, class_images: Sequence[CaptionedImage]
) -> CaptionedBatches | PreservingBatches:
    """The batches of a training, with prior preservation added if its config has the section `preserve`.

    Args:
        batches: Those of the training.
        config: Its config.
        class_images: The images of folders of role preserve.
    """
    if config.preserve is None:
        return batches
    # The captions of a class are its own, without what those of the training have around them
    captions = config.data.captions and config.data.captions.model_copy(update={"prefix": None, "suffix": None})
    data = config.data.model_copy(update={"mask": None, "caption_dropout": 0.0, "captions": captions})
    own: Any = {"batch_size": batches.batch_size, "seed": batches.seed, "process": batches.process}
    preserved = CaptionedBatches(batches.model, class_images, batches.prompts, data, **own) if class_images else None
    return PreservingBatches(
        batches, config.preserve, config.data.placeholder, preserved, config.train.gradient_accumulation_steps
    )


def without_word(text: str, word: str) -> str:
    """A text without a word, and without the spaces and commas that it leaves."""
    text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", text)
    text = re.sub(r"\s+", " ", re.sub(r"\s+,", ",", text))
    return re.sub(r"^[\s,]+|[\s,]+$", "", re.sub(r",(\s*,)+", ",", text))
