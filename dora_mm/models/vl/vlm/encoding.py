"""Rows of text and images as the inputs of a vision-language model, and batches of such rows."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.data.images.frames import Video
from dora_mm.models.vl.vlm.chat import Span, chat_template
from dora_mm.models.vl.vlm.features import check_features
from dora_mm.models.vl.vlm.placeholders import (
    CHANGED,
    ImageSpan,
    RecordingTokenizer,
    image_spans,
    inside,
    moved,
    overlap,
)
from dora_mm.models.vl.vlm.videos import reads_videos, video_inputs
from dora_mm.utils.messages import first_line

IGNORED = -100  # label of a token without loss, as in all of transformers
TEXT_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"),
    *("cross_attention_mask", "image_embeds_position_mask"),
)


@dataclass(frozen=True)
class TokenRow:
    """One row as the inputs of a model.

    Attributes:
        inputs: The model's inputs by name: of the text (TEXT_INPUTS), with a token per column (1, L, ...); and of the
            images and videos, of which there may be none.
        labels: Token ids with IGNORED where there is no loss: (L,), those of `input_ids`; or (T,), the target of a
            decoder.
        num_images: The number of its images.
        is_image: Whether each token of `input_ids` stands for an image or a video (L,), bool.
        num_cut: How many tokens are missing, since they are too many.
        num_image_cut: How many of these stand for images and videos.
        num_exchanges_cut: How many whole exchanges are missing, the last ones of a conversation.
        num_exchanges: How many of its exchanges, from the first on, have room as a whole.
        loses_answer: Whether nothing of the answers is left of a row that was cut, though its prompts may have loss. It
            is not to be computed: its images may be cut, too.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_images: int
    is_image: Tensor
    num_cut: int = 0
    num_image_cut: int = 0
    num_exchanges_cut: int = 0
    num_exchanges: int = 0
    loses_answer: bool = False

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return self.inputs["input_ids"].shape[1]

    @property
    def num_image_tokens(self) -> int:
        """How many of the L tokens stand for images and videos."""
        return int(self.is_image.sum())

    @property
    def frames(self) -> tuple[int, ...] | None:
        """The shape of its videos where they have one, (videos, frames, ...); None: no videos, or patches of any."""
        pixels = self.inputs.get("pixel_values_videos")
        return tuple(pixels.shape[1:]) if pixels is not None and pixels.dim() == 5 else None


class RowEncoder:
    """Turns texts and images into rows, one at a time, so that images cannot end up in another row.

    Args:
        processor: The model's processor.
        config: The model's config, which says how many features it makes of images.
        max_length: The number of tokens that a row may have. Those at its end that are beyond it are cut: never what
            stands between two images, which some classes would take for one.
        limit_from: What sets that number: a key of the config, or the model.
        learns_prompts: All text has loss, and not only the answers.

    Attributes:
        kinds: What may be in a row beside text: "image", "video".
    """

    def __init__(self, processor: Any, config: Any, max_length: int, limit_from: str, *, learns_prompts: bool = False):
        self.processor, self.tokenizer, self.config = processor, processor.tokenizer, config
        self.max_length, self.limit_from, self.learns_prompts = max_length, limit_from, learns_prompts
        images = ("image",) if processor.image_processor is not None else ()
        self.kinds = (*images, "video") if reads_videos(processor) else images
        ids = {kind: token_ids(processor, kind) for kind in self.kinds}
        self.image_ids = torch.tensor(sorted({i for found in ids.values() for i in found}), dtype=torch.long)
        self._reads_as = {
            token: f"a part of an {kind}" if kind == "image" else f"a part of a {kind}"
            for kind in self.kinds
            for token in self.tokenizer.convert_ids_to_tokens(ids[kind])
        } | {token: f"the place of {kind}s" for kind in self.kinds if (token := self._token(kind)) is not None}

    def _token(self, kind: str) -> str | None:
        token = getattr(self.processor, f"{kind}_token", None)
        return token if isinstance(token, str) else None

    def check_text(self, text: str) -> None:
        """Checks that a text has no token with which the model reads an image or a video.

        Raises:
            ValueError: It has one, in place of which the model would see an image, or which it would miss one for.
        """
        for token, meaning in self._reads_as.items():
            if token in text:
                raise ValueError(f"the text has {token}, which this model reads as {meaning}: write it otherwise")

    def conversation(
        self,
        text: str,
        learned_spans: Sequence[Span],
        ends: Sequence[int] = (),
        images: Sequence[Any] = (),
        videos: Sequence[Video] = (),
    ) -> TokenRow:
        """A rendered conversation as a row whose answers have loss.

        Args:
            text: The conversation, with the processor's token in the place of each image and video.
            learned_spans: Where in it the learned answers are; see `render`.
            ends: Where its exchanges end.
            images: Its images, PIL, in the order of the text.
            videos: Its videos, in the order of the text.

        Raises:
            ValueError: The numbers of images and of places for them differ, or the processor changes what is learned.
        """
        inputs, spans, expanded = self._process(text, images, videos)
        offsets = inputs.pop("offset_mapping")[0]
        learned = torch.zeros(len(offsets), dtype=torch.bool)
        for start, end in learned_spans:
            span = moved(start, spans), moved(end, spans)
            if expanded[slice(*span)] != text[start:end]:
                raise ValueError(CHANGED)
            learned |= overlap(offsets, *span)
        tokens = [int((offsets[:, 0] < moved(end, spans)).sum()) for end in ends]
        return self._row(inputs, learned, inside(offsets, spans), len(images), tokens)

    def question(
        self,
        text: str,
        images: Sequence[Any],
        videos: Sequence[Video] = (),
        *,
        answer: str | None = None,
        ends: bool = False,
    ) -> TokenRow:
        """A prompt, with its answer behind it where one is given, which then has loss.

        Args:
            text: The prompt, with the processor's image token where it has one.
            images: Its images, PIL.
            videos: Its videos.
            answer: The answer.
            ends: The text ends with the prompt, since another part of the model answers. Else the separator with which
                BERT's tokenizers end a text is left out, since the answer continues it.

        Raises:
            ValueError: As `conversation`.
        """
        inputs, spans, _ = self._process(text, images, videos)
        is_image = inside(inputs.pop("offset_mapping")[0], spans)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        separator = self.tokenizer.sep_token_id
        if not ends and separator is not None and inputs["input_ids"][0, -1] == separator:
            inputs = _columns(inputs, slice(0, -1))
        start = inputs["input_ids"].shape[1]
        if answer is not None:
            inputs = _continued(inputs, self.target(answer))
        learned = torch.arange(inputs["input_ids"].shape[1]) >= start
        return self._row(inputs, learned, F.pad(is_image[:start], (0, len(learned) - start)), len(images))

    def target(self, answer: str) -> Tensor:
        """The token ids (T,) of an answer that continues a text, with the end token."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        return torch.tensor([*ids, end])

    def decoder_target(self, answer: str, start: int | None = None) -> Tensor:
        """The token ids (T,) of an answer that a decoder writes, as the tokenizer ends a text; `start` is the first."""
        ids = self.tokenizer(answer)["input_ids"]
        return torch.tensor(ids if start is None else [start, *ids[1:]])

    def _process(
        self, text: str, images: Sequence[Any], videos: Sequence[Video]
    ) -> tuple[dict[str, Tensor], list[ImageSpan], str]:
        """The processor's inputs, with `offset_mapping`, the place of each image, and the text that was tokenized.

        Raises:
            ValueError: The numbers of images and of places for them differ, the processor fails at the row, or writes
                other numbers of tokens than the model makes features.
        """
        self._check_placeholders(text, {"image": len(images), "video": len(videos)})
        bos = self.tokenizer.bos_token  # a text that begins as a sequence does gets no special tokens once more
        settings = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        settings |= video_inputs(self.processor, videos) if videos else {}
        processor, recorder = copy.copy(self.processor), RecordingTokenizer(self.tokenizer)
        processor.tokenizer = recorder
        try:
            found = processor(
                text=[text],
                images=[list(images)] if images else None,
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **settings,
            )
        except Exception as error:  # whatever processors raise, which fail in many ways at images of odd shapes
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"the model's processor fails at it ({kind}{first_line(error)})") from error
        if not found["input_ids"].numel():
            raise ValueError("the model's tokenizer makes no tokens of its text")
        check_features(self.config, found)
        found.pop("video_metadata", None)
        chat = found.pop("text_replacement_offsets", ())  # of each text; none without images
        tokens = [token for kind in self.kinds if (token := self._token(kind)) is not None]
        spans = image_spans(text, recorder.text, tokens, [*chat[0]] if len(chat) else [])
        return dict(found), spans, recorder.text

    def _check_placeholders(self, text: str, counts: dict[str, int]) -> None:
        for kind in self.kinds:
            token, count = self._token(kind), counts[kind]
            num_placeholders = None if token is None else text.count(token)
            if num_placeholders not in (None, 0, count) or (
                count and num_placeholders == 0 and chat_template(self.processor)
            ):
                raise ValueError(f"the text has {num_placeholders} places for {kind}s, and the row has {count} {kind}s")

    def _row(
        self,
        inputs: dict[str, Tensor],
        learned: Tensor,
        expanded: Tensor,
        num_images: int,
        ends: Sequence[int] = (),
    ) -> TokenRow:
        is_image = expanded | torch.isin(inputs["input_ids"][0], self.image_ids)
        answer = learned & ~is_image
        learned = answer
        if self.learns_prompts:  # but for the first token, which nothing predicts
            learned = (torch.arange(len(answer)) > 0) & ~is_image
        labels = inputs["input_ids"][0].masked_fill(~learned, IGNORED)
        if len(labels) <= self.max_length:
            return TokenRow(inputs, labels, num_images, is_image, num_exchanges=len(ends))
        kept, beyond = slice(0, self.max_length), slice(self.max_length, None)
        return TokenRow(
            _columns(inputs, kept),
            labels[kept],
            num_images,
            is_image[kept],
            num_cut=len(labels[beyond]),
            num_image_cut=int(is_image[beyond].sum()),
            num_exchanges=bisect_right(ends, self._room(is_image)),
            loses_answer=not bool(answer[kept].any()),
        )

    def _room(self, is_image: Tensor) -> int:
        """Up to which token the exchanges of a row that is too long have room as a whole.

        Where prompts have loss, too, part of an exchange is as good: up to the first image that has no room.
        """
        beyond = torch.nonzero(is_image[self.max_length :])
        if not self.learns_prompts:
            return self.max_length
        return self.max_length + int(beyond[0]) if len(beyond) else len(is_image)


def token_ids(processor: Any, kind: str) -> list[int]:
    """The ids of the tokens that stand for images or videos; none where these are not part of the text."""
    ids = getattr(processor, f"{kind}_token_ids", None) or [getattr(processor, f"{kind}_token_id", None)]
    token = getattr(processor, f"{kind}_token", None)
    if ids == [None] and token is not None:  # BLIP-2 has a token without its id
        ids = [processor.tokenizer.convert_tokens_to_ids(str(token))]
    return [i for i in ids if i is not None]


def _columns(inputs: dict[str, Tensor], kept: Any) -> dict[str, Tensor]:
    """Selects tokens of the text inputs."""
    return {name: value[:, kept] if name in TEXT_INPUTS else value for name, value in inputs.items()}


def _continued(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Appends tokens: they are attended to, and of type 1 where types tell a prompt from its answer."""
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.ones_like(ids)}
    found = dict(inputs)
    for name in TEXT_INPUTS:
        if name in inputs:
            more = values.get(name, torch.zeros_like(ids))
            found[name] = torch.cat([inputs[name], more[None].to(inputs[name].dtype)], dim=1)
    return found


def collate(rows: Sequence[TokenRow], *, pad: int, left: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Rows as one batch.

    Args:
        rows: B rows.
        pad: The id of the padding token.
        left: Pad at the left, for generation; else at the right.

    Returns:
        The inputs by name, and the labels (B, T). Images of all rows follow each other, and those of different shapes
        are padded with zeros at the right and bottom, as the processors do.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.inputs))
    longest = max(row.length for row in rows)
    inputs = {}
    for name in names:
        if name in TEXT_INPUTS:  # a row of text alone may lack the types of its tokens, which are then all 0
            values = [row.inputs.get(name, torch.zeros_like(row.inputs["input_ids"])) for row in rows]
            values = [_padded(value, longest, pad if name == "input_ids" else 0, left) for value in values]
        else:
            values = [row.inputs[name] for row in rows if name in row.inputs]
        if isinstance(values[0], list):  # the numbers of tiles of Unlimited-OCR's images
            inputs[name] = [item for value in values for item in value]
        else:
            inputs[name] = torch.cat(list(_same_shape(values)))
    targets = max(len(row.labels) for row in rows)
    labels = torch.cat([_padded(row.labels[None], targets, IGNORED, left) for row in rows])
    return inputs, labels


def _padded(value: Tensor, length: int, fill: int, left: bool) -> Tensor:
    missing = length - value.shape[1]
    return F.pad(value, [0, 0] * (value.dim() - 2) + ([missing, 0] if left else [0, missing]), value=fill)


def _same_shape(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors padded with zeros so that all dimensions but the first agree."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padding = [
        [n for have, want in zip(v.shape[:0:-1], shape[::-1], strict=True) for n in (0, want - have)] for v in values
    ]
    return [F.pad(value, pad) if any(pad) else value for value, pad in zip(values, padding, strict=True)]
