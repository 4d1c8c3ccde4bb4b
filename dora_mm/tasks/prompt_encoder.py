"""Encoded captions: once each where text encoders are frozen, in memory or in files."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch

from dora_mm.data.images.references import ReferenceImage, load_reference
from dora_mm.data.images.tensor_cache import TensorCache
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.utils.progress import Progress, tracked


class Instruction(NamedTuple):
    """A caption with the references that the text encoder sees beside it.

    Attributes:
        text: The caption.
        references: The references of its image, in their order.
        area: In pixels, to which larger ones are scaled down first; None: as the pipeline does.
        flip: Whether they are mirrored.
    """

    text: str
    references: tuple[ReferenceImage, ...]
    area: int | None
    flip: bool


Caption: TypeAlias = str | Instruction


def text_of(caption: Caption) -> str:
    """The text of a caption."""
    return caption if isinstance(caption, str) else caption.text


def with_text(caption: Caption, text: str) -> Caption:
    """The caption with another text and the same references."""
    return text if isinstance(caption, str) else caption._replace(text=text)


def encode_captions(model: ImageModel, captions: Sequence[Caption]) -> list[Prompt]:
    """Encodes captions of any length, with the references that text encoders see."""
    encoded = []
    for is_text, group in groupby(captions, lambda caption: isinstance(caption, str)):
        found = list(group)
        encoded += model.encode_prompts(list(map(text_of, found))) if is_text else _encode_instructions(model, found)
    return encoded


def _encode_instructions(model: ImageModel, instructions: Sequence[Any]) -> list[Prompt]:
    assert isinstance(model, EditingModel)
    references = []
    for found in instructions:
        images = (load_reference(each, alpha=model.references_have_alpha) for each in found.references)
        references.append([model.prepare_reference(image, found.area, flip=found.flip) for image in images])
    return model.encode_edit_prompts([found.text for found in instructions], references)


class PromptEncoder:
    """Encodes captions: once each if the text encoders are frozen, every time if they are trained.

    What is encoded once is kept in main memory: it may be the captions of many epochs, which vary.
    Those with new tokens are encoded every time in any case.

    Args:
        model: The model whose text encoders are used.
        trained: The text encoders are trained.
        folder: Where encoded captions are kept, by content; None: in memory. Each is then encoded alone, so that it
            depends on no other one in its last bits.
    """

    def __init__(self, model: ImageModel, *, trained: bool, folder: str | None = None):
        self.model, self.trained = model, trained
        self._cache: dict[Caption, Prompt] = {}
        self._files = TensorCache(folder) if folder is not None else None

    @property
    def needs_encoders(self) -> bool:
        """Whether a training needs the text encoders after all captions were encoded ahead that can be."""
        return self.trained or bool(self.model.new_tokens.counts)

    def changes(self, caption: Caption) -> bool:
        """Whether a caption is encoded to something else after a step."""
        return self.trained or self.model.new_tokens.occur_in(text_of(caption))

    def keep(self, captions: Sequence[Caption], batch_size: int = 16) -> None:
        """Encodes captions ahead of training, so that the text encoders can be released; none that changes."""
        captions = [caption for caption in captions if not self.changes(caption)]
        if self._files is not None:
            keys = {caption: self._key(caption) for caption in dict.fromkeys(captions)}
            missing = {caption for caption, key in keys.items() if not self._files.has(key)}
            self._files.report((key for caption, key in keys.items() if caption not in missing), "encoded captions")
            for caption in tracked([each for each in keys if each in missing], "encoding captions", "captions"):
                self._write(caption)
            return
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if not new:
            return
        with Progress("encoding captions", len(new), "captions") as progress, torch.no_grad():
            for part in self._of_one_length(new, batch_size):
                for caption, prompt in zip(part, encode_captions(self.model, part), strict=True):
                    self._cache[caption] = {name: tensor.cpu() for name, tensor in prompt.items()}
                progress.advance(len(part))

    def __call__(self, captions: Sequence[Caption]) -> list[Prompt]:
        """Encodes captions of any length; each conditions the denoiser as it does alone."""
        rows = [index for index, caption in enumerate(captions) if self.changes(caption)]
        changing = encode_captions(self.model, [captions[index] for index in rows])
        anew = dict(zip(rows, changing, strict=True))
        if self._files is None:
            self.keep(captions)
        return [anew[index] if index in anew else self._kept(caption) for index, caption in enumerate(captions)]

    def _kept(self, caption: Caption) -> Prompt:
        """A caption that was encoded ahead, on the model's device."""
        found = self._cache[caption] if self._files is None else self._read(caption)
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    @property
    def bytes_per_caption(self) -> float | None:
        """The main memory that an encoded caption takes, on average over those that there are; None: there is none."""
        sizes = [sum(tensor.nbytes for tensor in prompt.values()) for prompt in self._cache.values()]
        return sum(sizes) / len(sizes) if sizes else None

    @cached_property
    def _identity(self) -> str:
        return self.model.text_identity

    def _key(self, caption: Caption) -> str:
        found = text_of(caption)
        if not isinstance(caption, str):
            found = json.dumps([found, [each.digest for each in caption.references], caption.area, caption.flip])
        return hashlib.sha256(f"{self._identity} {found}".encode()).hexdigest()

    def _read(self, caption: Caption) -> Prompt:
        assert self._files is not None
        found = self._files.read(self._key(caption), ("text",))
        return self._write(caption) if found is None else found

    @torch.no_grad()
    def _write(self, caption: Caption) -> Prompt:
        assert self._files is not None
        if all(self.model.components.is_released(name) for name in self.model.text_encoders):
            raise ValueError(f"data.text_cache: {self._files.path(self._key(caption))} is lost: resume the run")
        (prompt,) = encode_captions(self.model, [caption])
        self._files.write(self._key(caption), prompt)
        return prompt

    def _of_one_length(self, captions: Sequence[Caption], batch_size: int) -> Iterator[list[Caption]]:
        """Batches of captions of one length, so that none is padded."""
        groups = defaultdict(list)
        for caption in captions:
            groups[self.model.prompt_length(text_of(caption))].append(caption)
        for group in groups.values():
            yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))
