"""Views of rows, to check them before a training: their lengths, their tokens as text, and which of these have loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from dora_mm.data.vl.example import Example
from dora_mm.data.vl.row_view import Piece, RowView
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl.vl_model import RowLengths, likeliest_answer
from dora_mm.models.vl.vlm.encoding import IGNORED, TokenRow
from dora_mm.models.vl.vlm.example_encoder import ExampleEncoder
from dora_mm.utils.progress import tracked

MOST_RUNS = 6  # of tokens of one image that are listed; of more, the middle is left out


def row_lengths(
    encoder: ExampleEncoder, task: str, table: ExampleTable, rows: Iterable[int], images: str | None
) -> RowLengths:
    """The lengths of rows of a table; see `VLModel.lengths`."""
    encoded: dict[int, TokenRow] = {}  # of pairs the longer row
    bad: dict[int, str] = {}
    for index in tracked(list(rows), f"encoding rows ({task})", "rows"):
        example = table[index]
        try:
            rows_of_example = encoder.answered(task, example, images, likeliest_answer(example))
            longest = max(rows_of_example, key=lambda row: row.length + row.num_cut)
            encoded[index] = replace(longest, loses_answer=any(row.loses_answer for row in rows_of_example))
        except ValueError as error:
            bad[index] = str(error.__cause__)  # without the row, whose place is known
    found = encoded.values()
    lost = np.array([row.loses_answer for row in found], bool)

    def numbers(values: Iterable[int]) -> np.ndarray:
        return np.fromiter(values, np.int64, len(found))

    return RowLengths(
        rows=numbers(encoded),
        tokens=numbers(row.length + row.num_cut for row in found),
        image_tokens=numbers(row.num_image_tokens + row.num_image_cut for row in found),
        tokens_read=numbers(row.length for row in found) * ~lost,
        exchanges_cut=numbers(row.num_exchanges_cut for row in found),
        loses_answer=lost,
        limit=encoder.max_length,
        limit_from=encoder.limit_from,
        bad=bad,
    )


def row_view(encoder: ExampleEncoder, task: str, example: Example, images: str | None) -> RowView:
    """A row as the model sees it; see `VLModel.row_view`."""
    num_requests = encoder.day.num_requests
    row = encoder.row(task, example, images, likeliest_answer(example))
    tokenizer, form = encoder.processor.tokenizer, encoder.form
    ids, labels = row.inputs["input_ids"][0].tolist(), row.labels.tolist()
    learned = [label != IGNORED for label in labels]
    if form.continues:
        read, written = pieces(tokenizer, ids, learned, row.is_image.tolist()), []
    else:
        learned[0] = form.start is None  # else the decoder is given this one
        read = pieces(tokenizer, ids, [False] * len(ids), row.is_image.tolist())
        written = pieces(tokenizer, labels, learned, [False] * len(labels))
    parts = [f"{row.length:,} tokens", f"{row.num_image_tokens:,} for images", f"{sum(learned):,} with loss"]
    if row.num_cut:
        limit = f"beyond {encoder.max_length:,} ({encoder.limit_from})"
        last = f": the last {row.num_exchanges_cut:,} exchanges" if row.num_exchanges_cut > 1 else ": the last exchange"
        parts.append(f"{row.num_cut:,} cut at the end, {limit}{last if row.num_exchanges_cut else ''}")
        parts += ["left out: nothing of its answers is left"] if row.loses_answer else []
    parts += [f"dated {encoder.day.date} (model.date)"] if encoder.day.num_requests > num_requests else []
    return RowView(", ".join(parts), read, written)


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
