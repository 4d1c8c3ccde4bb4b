"""The rows of transformers' models as they see them: the text of the tokens, and which of these carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dora_mm.data.vl.example import Example
from dora_mm.data.vl.shown import Piece, ShownRow
from dora_mm.models.vl import likeliest_answer
from dora_mm.models.vlm.encoding import IGNORED

if TYPE_CHECKING:
    from dora_mm.models.vlm.family import VLM

MOST_RUNS = 6  # of tokens of one image that are listed; of more, the middle is left out


def shown_row(model: VLM, task: str, example: Example, images: str | None) -> ShownRow:
    """A row as `VLM.row` encodes it; see `VLModel.shown`."""
    row = model.row(task, example, images, likeliest_answer(example))
    tokenizer = model.processor.tokenizer
    ids, labels = row.inputs["input_ids"][0].tolist(), row.labels.tolist()
    learned = [label != IGNORED for label in labels]
    if model.form.continues:
        read, written = pieces(tokenizer, ids, learned, row.is_image.tolist()), []
    else:
        learned[0] = model.form.start is None  # else the decoder is given this one
        read = pieces(tokenizer, ids, [False] * len(ids), row.is_image.tolist())
        written = pieces(tokenizer, labels, learned, [False] * len(labels))
    parts = [f"{row.length:,} tokens", f"{row.num_image_tokens:,} for images", f"{sum(learned):,} with loss"]
    if row.num_cut:
        parts.append(f"{row.num_cut:,} cut at the end, beyond {model.encoder.max_length:,} ({model.limit_from})")
    return ShownRow(", ".join(parts), read, written)


def pieces(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool], is_image: Sequence[bool]) -> list[Piece]:
    """Token ids as pieces of text, divided where tokens with loss begin or end, and around images."""
    found, done, start = [], "", 0
    for (has_loss, image), group in groupby(zip(learned, is_image, strict=True)):
        end = start + len(list(group))
        text = decode(tokenizer, ids[:end])
        own = text[len(done) :] if text.startswith(done) else decode(tokenizer, ids[start:end])
        found.append(Piece(image_runs(tokenizer, ids[start:end]) if image else own, has_loss, image))
        done, start = text, end
    return found


def image_runs(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tokens of images, each run of the same one as its text and its number."""
    runs = [(decode(tokenizer, [token]), len(list(group))) for token, group in groupby(ids)]
    texts = [text.replace("\n", "\\n") + (f" x {count}" if count > 1 else "") for text, count in runs]
    if len(texts) > MOST_RUNS:
        texts = [*texts[: MOST_RUNS // 2], f"... {len(ids):,} tokens in all ...", *texts[-MOST_RUNS // 2 :]]
    return " ".join(texts)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
