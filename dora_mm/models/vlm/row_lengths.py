"""The lengths of the rows of transformers' models, from their texts and the sizes of their images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from dora_mm.data.images.pixels import upright_size
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.lengths import RowLengths, evenly_spaced
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl import likeliest_answer
from dora_mm.models.vlm.chat import Rendered
from dora_mm.models.vlm.encoding import IGNORED, Row, RowEncoder
from dora_mm.models.vlm.lengths import Size, TokenCounter

if TYPE_CHECKING:
    from dora_mm.models.vlm.family import VLM

BATCH = 512  # rows whose texts are tokenised at once
COMPARED = 4  # rows that are encoded, to compare
ENCODED = 200  # rows that are encoded one by one where the counts are not those of the encoded rows


class RowCounter:
    """Counts the tokens of the rows of a table as `VLM.row` encodes them, without their pixels.

    Args:
        model: The model; its weights are not needed.
        task: The task of the rows.
        table: The rows.
        folder: The folder of their images.

    Attributes:
        tokens: The tokens of each row (N,): so far those of its images.
        image_tokens: The tokens of its images (N,).
        loses_answer: Whether nothing of its answers is left where it is cut (N,), bool.
        unreadable: Why rows cannot be encoded, by index.
        source: How the tokens were counted.
    """

    def __init__(self, model: VLM, task: str, table: ExampleTable, folder: str | None):
        self.model, self.task, self.table, self.folder = model, task, table, folder
        turns = (Turn("user", f"{IMAGE}\n?", False), Turn("assistant", "!", True))
        probe = model.rendered(task, Example("", ("",), "?", turns=turns), "!").text
        self.counter = TokenCounter(model.encoder, probe)
        self.continues = model.plain is not None and model.form.continues
        self.separator = model.plain.separator if model.plain is not None else ""
        self.names = table.image_lists()
        self.unreadable: dict[int, str] = {}
        self.source = "texts by the tokenizer"
        self.image_tokens = self._count_images()
        self.tokens, self.loses_answer = self.image_tokens.copy(), np.zeros(len(table), bool)

    @property
    def lengths(self) -> RowLengths:
        """What was counted so far."""
        rows = np.setdiff1d(np.arange(len(self.table)), list(self.unreadable))
        return RowLengths(
            rows=rows,
            tokens=self.tokens[rows],
            image_tokens=self.image_tokens[rows],
            loses_answer=self.loses_answer[rows],
            limit=self.model.encoder.max_length,
            limit_from=self.model.limit_from,
            source=self.source,
            unreadable=self.unreadable,
        )

    # --- images ------------------------------------------------------------------------------------------------------

    def _count_images(self) -> np.ndarray:
        sizes = self._sizes({name for names in self.names for name in names})
        tokens = {several: self._by_size(sizes, several) for several in (False, True)}
        counts = np.zeros(len(self.names), np.int64)
        for row, names in enumerate(self.names):
            for name in names:
                size = sizes[name]
                found = size if isinstance(size, str) else tokens[len(names) > 1][size]
                if isinstance(found, str):
                    self.unreadable[row] = found
                else:
                    counts[row] += found
        return counts

    def _sizes(self, names: Iterable[str]) -> dict[str, Size | str]:
        """The size of each image, or why it cannot be read."""
        found: dict[str, Size | str] = {}
        for name in tqdm(sorted(names), "reading the sizes of images", unit="image", delay=2, disable=None):
            try:
                found[name] = upright_size(image_path(self.folder, name))
            except ValueError as error:
                found[name] = f"has an image that cannot be read: {error}"
        return found

    def _by_size(self, sizes: dict[str, Size | str], several: bool) -> dict[Size, int | str]:
        """The tokens of an image of each size, alone or beside others, or why it cannot be encoded."""
        names = {name for names in self.names if (len(names) > 1) is several for name in names}
        known = {size for name in names if not isinstance(size := sizes[name], str)}
        tokens, refused, source = self.counter.image_tokens(known, several=several)
        if any(tokens.values()) and source not in self.source:
            self.source += f", {'several images of a row' if several else 'images'} by their sizes ({source})"
        return {**tokens, **{size: f"has an image that cannot be encoded: {why}" for size, why in refused.items()}}

    # --- texts -------------------------------------------------------------------------------------------------------

    def count_texts(self) -> None:
        """Adds the tokens of the texts, each row with its likeliest answer."""
        good = [row for row in range(len(self.table)) if row not in self.unreadable]
        starts = range(0, len(good), BATCH)
        for start in tqdm(starts, f"counting tokens ({self.task})", unit="batch", delay=2, disable=None):
            rows = [text for row in good[start : start + BATCH] if (text := self._text(row)) is not None]
            numbers = [len(self.names[text.row]) for text in rows]
            counts = self.counter.text_tokens([text.rendered.text for text in rows], numbers)
            for text, number, count, ending in zip(rows, numbers, counts, self._endings(rows), strict=True):
                self.tokens[text.row] += count + ending - number * self.counter.per_image
                self.loses_answer[text.row] = self._loses_answer(text, number, ending)

    def _text(self, row: int) -> _Text | None:
        example = self.table[row]
        answer = likeliest_answer(example)
        try:
            rendered = self.model.rendered(self.task, example, answer)
            self.model.encoder.check_places(rendered.text, len(example.images))
            return _Text(row, answer, rendered)
        except ValueError as error:
            self.unreadable[row] = f"cannot be encoded: {error}"
            return None

    def _endings(self, rows: Sequence[_Text]) -> list[int]:
        """The tokens of the answers that continue a plain prompt, whose separator is left out then."""
        if not self.continues or not rows:
            return [0] * len(rows)
        answers = [self.separator + text.answer for text in rows]
        ids = self.model.processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
        return [len(answer) + 1 - self.counter.ends_with_separator for answer in ids]

    def _loses_answer(self, text: _Text, num_images: int, ending: int) -> bool:
        """Whether all tokens with loss are among those that are cut, of the text alone, at its end."""
        tokens, image_tokens, limit = self.tokens[text.row], self.image_tokens[text.row], self.model.encoder.max_length
        if tokens <= limit or image_tokens >= limit or not (self.continues or text.rendered.spans):
            return False
        if self.continues:
            before = tokens - image_tokens - ending - self.counter.ends_with_separator
        else:
            before = self.counter.text_tokens_before(text.rendered.text, text.rendered.spans[0][0], num_images)
        return bool(before >= limit - image_tokens)


class _Text(NamedTuple):
    """The text of a row: its index, its answer, and what the processor reads."""

    row: int
    answer: str
    rendered: Rendered


def row_lengths(model: VLM, task: str, table: ExampleTable, images: str | None, *, texts: bool = True) -> RowLengths:
    """The lengths of the rows of a table as `VLM.row` encodes them; see `VLModel.lengths`."""
    counter = RowCounter(model, task, table, images)
    if not texts:
        return counter.lengths
    counter.count_texts()
    rows = counter.lengths.rows[~counter.lengths.overflow]
    encoded = encoded_lengths(model, task, table, images, rows[evenly_spaced(len(rows), COMPARED)])
    counter.unreadable |= encoded.unreadable
    found, same = counter.lengths, np.isin(counter.lengths.rows, encoded.rows)
    if not all(np.array_equal(getattr(encoded, key), getattr(found, key)[same]) for key in ("tokens", "image_tokens")):
        return encoded_lengths(model, task, table, images, evenly_spaced(len(table), ENCODED))
    return replace(found, source=f"{found.source}; as in {len(encoded.rows)} rows that were encoded")


def encoded_lengths(model: VLM, task: str, table: ExampleTable, images: str | None, rows: np.ndarray) -> RowLengths:
    """The lengths of some rows of a table, which are encoded one by one."""
    whole = copy.copy(model)
    whole.encoder = RowEncoder(model.processor, 1 << 30)
    encoded, bad = {}, {}
    for index in tqdm(rows.tolist(), f"encoding rows ({task})", unit="row", delay=2, disable=None):
        example = table[index]
        try:
            encoded[index] = whole.row(task, example, images, likeliest_answer(example))
        except ValueError as error:
            bad[index] = f"cannot be encoded: {error}"
    limit = model.encoder.max_length
    return RowLengths(
        rows=np.array([*encoded], np.int64),
        tokens=np.array([row.length for row in encoded.values()], np.int64),
        image_tokens=np.array([row.num_image_tokens for row in encoded.values()], np.int64),
        loses_answer=np.array([_loses_labels(row, limit) for row in encoded.values()], bool),
        limit=limit,
        limit_from=model.limit_from,
        source="rows encoded one by one, since this processor's tokens cannot be counted without",
        unreadable=bad,
    )


def _loses_labels(row: Row, limit: int) -> bool:
    """Whether all labels of an encoded row are among the tokens that are cut."""
    if not row.num_image_tokens < limit < row.length or len(row.labels) != row.length:
        return False
    return not (row.labels[~row.is_image][: limit - row.num_image_tokens] != IGNORED).any()
