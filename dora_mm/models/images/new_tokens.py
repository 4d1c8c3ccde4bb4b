"""New tokens: words of prompts that stand for rows of their own, beside the untouched tables of the text encoders.

The id of a new token is negative, -1 for the first row. So a table is never extended, no tokenizer is changed, and the
end of a text, where CLIP pools at the highest id, stays where it is. N rows in all, D columns of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_mm import formats
from dora_mm.core import InjectReport
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.strength import Strength
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.tokens import TokenRows


class NewTokens(nn.Module):
    """The words of a model that are new tokens; without any at first.

    Attributes:
        rows: The rows by "<word>/<table>", (count, D) each.
        counts: The number of tokens of each word.
    """

    def __init__(self):
        super().__init__()
        self.rows = nn.ParameterDict()
        self.counts: dict[str, int] = {}
        self._is_off = False

    def add(self, word: str, rows: Mapping[str, Tensor]) -> None:
        """Makes a word new tokens.

        Args:
            word: The word.
            rows: By the name of a table: (count, D), the same count for all.

        Raises:
            ValueError: It is one already, with other rows.
        """
        if word in self.counts:
            known = self.by_word()[word]
            if known.keys() == rows.keys() and all(known[table].equal(values) for table, values in rows.items()):
                return
            raise ValueError(
                f"two adapters have the new token {word}, each with rows of its own: generate with one of them"
            )
        self.counts[word] = len(next(iter(rows.values())))
        for table, values in rows.items():
            self.rows[f"{word}/{table}"] = nn.Parameter(values, requires_grad=False)

    def clear(self) -> None:
        """Removes all words."""
        self.rows, self.counts = nn.ParameterDict(), {}

    def by_word(self) -> dict[str, dict[str, nn.Parameter]]:
        """The rows by word and then by table."""
        found: dict[str, dict[str, nn.Parameter]] = {word: {} for word in self.counts}
        for key, rows in self.rows.items():
            word, table = key.rsplit("/", 1)
            found[word][table] = rows
        return found

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which they are plain words, as the base model reads them."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    def occur_in(self, text: str) -> bool:
        """Whether a text has one of the words as a word of its own."""
        return any(ids for _, ids in self.pieces(text))

    def pieces(self, text: str) -> list[tuple[str, list[int]]]:
        """A text in pieces, each with the ids of the new tokens behind it; only the last one may have none."""
        if self._is_off or not self.counts:
            return [(text, [])]
        words = "|".join(map(re.escape, sorted(self.counts, key=len, reverse=True)))
        parts = re.split(rf"(?<!\w)({words})(?!\w)", text)
        ids = [self._ids(word) for word in parts[1::2]]
        return list(zip(parts[::2], [*ids, []], strict=True))

    def _ids(self, word: str) -> list[int]:
        before = list(self.counts)[: list(self.counts).index(word)]
        first = sum(self.counts[other] for other in before)
        return [-1 - first - number for number in range(self.counts[word])]

    @contextmanager
    def appended(self, embedding: nn.Module, table: str, ids: Tensor) -> Iterator[Tensor]:
        """A context in which an embedding looks up the rows of new tokens, too.

        Args:
            embedding: The module, whose weight is not changed.
            table: The name of its table.
            ids: Token ids (B, L), of which those of new tokens are negative.

        Yields:
            The ids to call the network with: those of new tokens are 0 in it.
        """
        if not bool((ids < 0).any()):
            yield ids
            return
        rows = torch.cat([found[table] for found in self.by_word().values()])

        def put(module: nn.Module, given: Any, found: Tensor) -> Tensor:
            own = ids.to(found.device)
            new = F.embedding((-1 - own).clamp(min=0), rows.to(found.device)).to(found.dtype)
            return torch.where((own < 0).unsqueeze(-1), new, found)

        with embedding.register_forward_hook(put):
            yield ids.clamp(min=0)


def check_rows(tokens: TokenRows, widths: Mapping[str, int], source: Path) -> None:
    """Checks that rows of a file fit the tables of a model.

    Args:
        tokens: The rows.
        widths: The D of each table, by its name; empty for a family without.
        source: The file, for messages.

    Raises:
        ValueError: They do not.
    """
    for word, rows in tokens.items():
        if rows.keys() != widths.keys():
            own = ", ".join(widths) or "none"
            raise ValueError(f"{source} has rows of the new token {word} for {', '.join(rows)}; this model has {own}")
        shapes = {table: tuple(values.shape) for table, values in rows.items()}
        count = (*next(iter(shapes.values())), 0)[0]
        if misfit := [table for table, shape in shapes.items() if shape != (count, widths[table]) or not count]:
            raise ValueError(
                f"{source} does not fit this model: the rows of its new token {word} are {shapes[misfit[0]]} for "
                f"{misfit[0]}, not {(count, widths[misfit[0]])}"
            )


def load_adapter(
    model: Any,
    path: Path,
    *,
    strength: Strength = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
) -> InjectReport:
    """Loads an adapter file into an image model: its networks, and new tokens, which have no strength.

    Args:
        model: An `ImageModel`.
        path: The file, or its folder.
        strength: As in `formats.load`.
        name: As in `formats.load`.
        forward: As in `formats.load`.

    Raises:
        ValueError: It cannot be read, or does not fit the model.
    """
    file = AdapterFile(path)
    tokens = read_tokens(file)
    if tokens:
        check_rows(tokens, model.token_widths, file.path)
    report = formats.load(model.adaptable, file, strength=strength, name=name, forward=forward)
    for word, rows in tokens.items():
        model.new_tokens.add(word, {table: values.to(model.device) for table, values in rows.items()})
    return report


def read_tokens(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """The rows of new tokens of a file, in float32, by word and then by table.

    Raises:
        ValueError: A value is NaN or infinite, or it has embeddings of another kind.
    """
    if others := set(file.embeddings) - {key for keys in file.tokens.values() for key in keys.values()}:
        raise ValueError(f"{file.path} holds {min(others)}, an embedding without the name of its token")
    found = {
        word: {table: file.tensor(key).float() for table, key in keys.items()} for word, keys in file.tokens.items()
    }
    for word, rows in found.items():
        if not all(values.isfinite().all() for values in rows.values()):
            raise ValueError(f"{file.path}: the rows of its new token {word} have values that are NaN or infinite")
    return found
