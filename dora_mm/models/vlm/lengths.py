"""The number of tokens of rows without their pixels: of text by the tokenizer, of images by their sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from dora_mm.models.vlm.encoding import RowEncoder

Size = tuple[int, int]  # (h, w) of an image in pixels
SMALL = (64, 64)  # of the images that stand for those of a row while its text is counted


class ImageTokens(NamedTuple):
    """The numbers of tokens of images.

    Attributes:
        tokens: By size.
        refused: Why the processor refuses an image of a size.
        source: How they were found.
    """

    tokens: dict[Size, int]
    refused: dict[Size, str]
    source: str


class TokenCounter:
    """Counts the tokens of texts with images as a RowEncoder would encode them.

    A text is tokenised with the shortest form of what the processor puts in the place of an image: each run of the same
    image token counts as one. The tokens beside an image are then those of the whole text, also where they merge with
    the first of the image's own.

    Args:
        encoder: The encoder of the rows; its `max_length` plays no part.
        probe: A text with one image, as the encoder takes it.

    Attributes:
        per_image: The number of tokens of an image's short form.
        ends_with_separator: Whether the tokenizer ends a text with a separator, as BERT's does.
    """

    def __init__(self, encoder: RowEncoder, probe: str):
        self.processor, self.tokenizer = encoder.processor, encoder.tokenizer
        self.encoder, self.probe = RowEncoder(encoder.processor, 1 << 30), probe
        token = getattr(self.processor, "image_token", None)
        self.token = token if isinstance(token, str) and token in probe else None
        _, replaced = self.encoder.process(probe, [blank(SMALL)])
        self.short = self._shortened(replaced[0].text) if replaced else self.token or ""
        row = self.encoder.question(probe, [blank(SMALL)], ends=True)
        (counted,) = self.text_tokens([probe], [1])
        self.per_image = counted - (row.length - row.num_image_tokens)
        separator = self.tokenizer.sep_token_id
        self.ends_with_separator = separator is not None and int(row.inputs["input_ids"][0, -1]) == separator

    def _shortened(self, text: str) -> str:
        for image_id in self.encoder.image_ids.tolist():
            token = self.tokenizer.convert_ids_to_tokens(image_id)
            text = re.sub(f"(?:{re.escape(token)})+", lambda _, token=token: token, text)
        return text

    def text_tokens(self, texts: Sequence[str], num_images: Sequence[int]) -> list[int]:
        """The number of tokens of each text, `per_image` of each of its images included.

        Args:
            texts: As the encoder takes them.
            num_images: The number of images of each.
        """
        found = [0] * len(texts)
        groups: dict[Hashable, list[int]] = {}
        for index, (text, count) in enumerate(zip(texts, num_images, strict=True)):
            groups.setdefault((count > 0, bool(self.encoder.settings(text))), []).append(index)
        for group in groups.values():
            encoded = self._encoded([texts[i] for i in group], [num_images[i] for i in group])
            for index, ids in zip(group, encoded["input_ids"], strict=True):
                found[index] = len(ids)
        return found

    def text_tokens_before(self, text: str, position: int, num_images: int) -> int:
        """The number of tokens of text, without those of images, before the one that is at a position of the text."""
        offsets = self._encoded([text], [num_images], return_offsets_mapping=True)["offset_mapping"][0]
        images = text[:position].count(self.token) if self.token else 0
        place = position + images * (len(self.short) - len(self.token or ""))
        tokens = next((i for i, (start, end) in enumerate(offsets) if end > start and end > place), len(offsets))
        return tokens - images * self.per_image

    def _encoded(self, texts: list[str], num_images: Sequence[int], **settings: Any) -> Any:
        images = [[blank(SMALL)] * count for count in num_images] if num_images[0] else None
        _, prepared, *_ = self.processor.prepare_inputs_layout(images=images, text=texts)
        prepared = [text.replace(self.token, self.short) for text in prepared] if self.token else prepared
        given = self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.tokenizer.init_kwargs, **self.encoder.settings(texts[0])
        )["text_kwargs"]
        special = given.get("add_special_tokens", True)
        return self.tokenizer(prepared, add_special_tokens=special, verbose=False, **settings)

    def image_tokens(self, sizes: Collection[Size], *, several: bool = False) -> ImageTokens:
        """The number of tokens of images of these sizes.

        The most different sizes are encoded. Where the processor's own formula agrees with those, it counts the others;
        where all of them have the same number, the others have it, too. Else one image of each kind is encoded.

        Args:
            sizes: The sizes.
            several: Whether the images are in a row with others, which makes a difference to LLaVA-OneVision.
        """
        found, refused = self._encode({size: size for size in _extremes(sizes)}, several)
        rest = [size for size in sizes if size not in found and size not in refused]
        formula = self._formula(found)
        if formula is not None:
            more, others = _results(dict.fromkeys(rest, formula))
            return ImageTokens(found | more, refused | others, "the processor's formula")
        if len(set(found.values())) == 1 and not refused:
            number = next(iter(found.values()))
            return ImageTokens(found | dict.fromkeys(rest, number), {}, "the same for every size")
        more, others = self._encode({size: self._kind(size) for size in rest}, several)
        return ImageTokens(found | more, refused | others, "an image of each kind encoded")

    def _encode(self, kinds: Mapping[Size, Hashable], several: bool) -> tuple[dict[Size, int], dict[Size, str]]:
        """As `_results`, by encoding a blank image of each kind."""
        count = 2 if several else 1
        text = self.probe.replace(self.token, self.token * count) if self.token else self.probe
        known: dict[Hashable, int] = {}

        def tokens(size: Size) -> int:
            if kinds[size] not in known:
                row = self.encoder.question(text, [blank(size)] * count, ends=True)
                known[kinds[size]] = row.num_image_tokens // count
            return known[kinds[size]]

        return _results(dict.fromkeys(kinds, tokens))

    def _formula(self, found: Mapping[Size, int]) -> Callable[[Size], int] | None:
        """The processor's own formula, None if it has none, or one that is not right for the sizes that are known."""
        own = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if own is None or not found:
            return None

        def tokens(size: Size) -> int:
            return own(image_sizes=[size])["num_image_tokens"][0]

        around, *others = {number - tokens(size) for size, number in found.items()}  # what else is part of an image
        return None if others else lambda size: tokens(size) + around

    def _kind(self, size: Size) -> Hashable:
        """What the number of tokens depends on: the patches of an image if its processor tells them, else its size."""
        patches = getattr(self.processor.image_processor, "get_number_of_image_patches", None)
        return size if patches is None else patches(*size, {})


def _results(functions: Mapping[Size, Callable[[Size], int]]) -> tuple[dict[Size, int], dict[Size, str]]:
    """The numbers of tokens of sizes, and why the processor refuses others, for example those of an extreme shape."""
    found, refused = {}, {}
    for size, tokens in functions.items():
        try:
            found[size] = tokens(size)
        except ValueError as error:
            refused[size] = " ".join(str(error).split())
    return found, refused


def _extremes(sizes: Collection[Size]) -> list[Size]:
    """The smallest, largest, highest, widest, flattest and narrowest sizes, at most eight."""
    measures = [lambda s: s[0] * s[1], lambda s: s[0], lambda s: s[1], lambda s: s[0] / s[1]]
    return list(dict.fromkeys(best(sizes, key=key) for key in measures for best in (min, max))) if sizes else []


def blank(size: Size) -> Image.Image:
    """A black image of a size (h, w)."""
    return Image.new("RGB", (size[1], size[0]))
