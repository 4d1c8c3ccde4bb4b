"""Conversations with images that are too long, what is left of them, and what a class learns from that.

`python -m tests.models.vl.vlm.encoding.cut_rows` prints a table of all classes with a chat template: of each
conversation, cut at several lengths, the labels that are learned and those that have room, and what was raised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn, pieces_of
from dora_mm.models.vl.vlm.encoding import IGNORED, TokenRow
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.video_rows import write_visuals
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.language_models import LANGUAGE_MODELS
from tests.shared.vl.rarest_models import UNTRAINED

NAMES = tuple(name for name in tiny.BUILDERS if name not in {*LANGUAGE_MODELS, *UNTRAINED})
FILES = {IMAGE: ("wide.png", "square.png", "tall.png", "square.png"), VIDEO: ("long.mp4", "other.mp4")}
WHOLE = 1 << 20  # tokens
ROWS = {  # the number of images in each exchange
    "none": (0, 0),
    "one": (1, 0),
    "two, apart": (1, 1),
    "three, apart": (1, 1, 1),
    "four, apart": (1, 1, 1, 1),
    "four together": (4, 0),
    "two, later": (0, 2),
}


def conversation(
    counts: Sequence[int], *, marker: str = IMAGE, system: str | None = None, unlearned: Sequence[int] = ()
) -> Example:
    """A conversation with a text in front of each image.

    Args:
        counts: The number of images in each exchange.
        marker: VIDEO: they are videos instead.
        system: A system turn.
        unlearned: The exchanges, from 0, whose answers have no loss.
    """
    turns = [] if system is None else [Turn("system", system, False)]
    for number, count in enumerate(counts):
        asked = "".join(f"Here is one more: {marker}" for _ in range(count)) + f"What colour is number {number}?"
        turns += [Turn("user", asked, False), Turn("assistant", f"It is {number} or red.", number not in unlearned)]
    return Example("r", FILES[marker][: sum(counts)], "", (turns[-1].text,), (1.0,), turns=tuple(turns))


def first_exchanges(example: Example, count: int) -> Example:
    """The conversation up to its answer of this number."""
    ends = [number for number, turn in enumerate(example.turns, 1) if turn.role == "assistant"]
    turns = example.turns[: ends[count - 1]]
    num_files = sum(len(pieces_of(turn.text)) // 2 for turn in turns)
    return Example(example.id, example.images[:num_files], "", (turns[-1].text,), (1.0,), turns=turns)


def encoded(vlm: VLM, example: Example, images: str, limit: int = WHOLE) -> TokenRow:
    """A row of at most so many tokens."""
    set_limit(vlm, limit)
    return vlm.rows.row("chat", example, images, "")


def set_limit(vlm: VLM, limit: int) -> None:
    """Gives a model another `model.max_length` without opening it again."""
    vlm.rows.max_length = vlm.rows.encoder.max_length = limit


def opened(base: Path) -> VLM:
    return VLM(VLMModelConfig(path=str(base)))


@dataclass(frozen=True)
class Oracle:
    """What should be left of a conversation, found by trying.

    Attributes:
        prefixes: The rows of its first exchange, of the first two, and so on, uncut.
        has_images: Whether it has images or videos; else it is cut as a text.
    """

    prefixes: Sequence[TokenRow]
    has_images: bool

    @classmethod
    def of(cls, vlm: VLM, example: Example, images: str) -> Oracle:
        count = sum(turn.role == "assistant" for turn in example.turns)
        rows = [encoded(vlm, first_exchanges(example, number), images) for number in range(1, count + 1)]
        return cls(rows, bool(example.images))

    def left(self, limit: int) -> tuple[TokenRow, int]:
        """The row of the exchanges that stay, and their number: the most that fit but for white space, or the first."""
        if not self.has_images:
            return self.prefixes[-1], len(self.prefixes)
        fitting = [number for number, row in enumerate(self.prefixes, 1) if end_of(row) <= limit]
        count = max(fitting, default=1)
        return self.prefixes[count - 1], count

    def labels(self, limit: int) -> list[int]:
        """The labels that have room."""
        return self.left(limit)[0].labels[:limit].tolist()

    def limits(self) -> list[int]:
        """Lengths on both sides of where something is lost: each exchange, the first answer, its first token."""
        first = self.prefixes[0]
        start = int((first.labels != IGNORED).nonzero()[0])
        edges = [*map(end_of, self.prefixes), self.prefixes[-1].length, start + 1]
        found = {each for edge in edges for each in (edge, edge - 1)} | {first.num_image_tokens, 1}
        return sorted((limit for limit in found if limit > 0), reverse=True)


def end_of(row: TokenRow) -> int:
    """The number of tokens up to the end of the last answer."""
    return int((row.labels != IGNORED).nonzero()[-1]) + 1


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = str(write_visuals(folder))
        print("class", *ROWS, sep=" | ")
        for name in NAMES:
            vlm = opened(tiny.build(name, folder / name))
            if vlm.fallback is None:
                print(name, *(cell(vlm, conversation(counts), images) for counts in ROWS.values()), sep=" | ")


@torch.no_grad()
def cell(vlm: VLM, example: Example, images: str) -> str:
    """How many labels are learned of those that have room at all limits of a conversation, and what was raised."""
    oracle = Oracle.of(vlm, example, images)
    learned, room, raised = 0, 0, []
    for limit in oracle.limits():
        set_limit(vlm, limit)
        has_room = sum(label != IGNORED for label in oracle.labels(limit))
        room += has_room
        try:
            batch = vlm.batch("chat", [example], images, [("", 1.0)])
            assert torch.isfinite(vlm.loss(batch, torch.Generator()).total)
            learned += min(has_room, sum(int((labels != IGNORED).sum()) for _, labels, _ in batch.groups))
        except Exception as error:  # whatever a class raises is what the table is about
            raised.append(type(error).__name__)
    kinds = [f"{raised.count(kind)} {kind}" for kind in sorted(set(raised))]
    return ", ".join([f"{learned} of {room}", *kinds])


if __name__ == "__main__":
    main()
