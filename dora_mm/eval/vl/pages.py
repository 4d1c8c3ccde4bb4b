"""An HTML page of examples: images, question, prediction and reference answers, also of two runs side by side.

One file without scripts that loads nothing from elsewhere: it can be opened from the disk, also on a phone, and sent to
others. Images are in it, or beside it where there are many: 5,000 rows without images take two seconds to open.
Its template is `examples.html`, for jinja2, which torch brings.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, Template
from PIL import Image

from dora_mm.data.images.pixels import on_white
from dora_mm.data.vl.example import Example
from dora_mm.utils.atomic import write_text

SIDE = 320  # pixels of the longer side: two images fit side by side on a phone; about 10 kB each
VERDICTS = {"right": "right", "part": "partly", "wrong": "wrong"}
CHANGES = {"better": "better", "worse": "worse", "other": "another answer"}  # than in the run before
Shown = Image.Image | str  # an image, or the address of its file from the page


@dataclass(frozen=True)
class PageExample:
    """One example on the page.

    Attributes:
        name: The id of the example.
        question: The text of the example; "" is not printed.
        prediction: The predicted answer or caption.
        answers: Reference answers and the score of each; scores of 1 and None are not printed.
        score: The score of the prediction, 0 to 1; None where single predictions have no score (captions).
        images: Of any size.
        before: The answer of another run and its score, with which the page compares; None: there is none.
    """

    name: str
    question: str
    prediction: str
    answers: tuple[tuple[str, float | None], ...]
    score: float | None = None
    images: tuple[Shown, ...] = ()
    before: tuple[str, float | None] | None = None

    @classmethod
    def from_example(
        cls,
        example: Example,
        prediction: str,
        score: float | None,
        images: Sequence[Shown] = (),
        before: tuple[str, float | None] | None = None,
    ) -> "PageExample":
        """Takes name, question and answers from `example`; the question of a conversation is all of it."""
        answers = tuple(zip(example.answers, example.scores, strict=True))
        prompt_turns = example.turns[: len(example.turns) - len(answers)]
        question = (
            "\n".join(f"{turn.role}: {turn.text}" for turn in prompt_turns) if len(prompt_turns) > 1 else example.text
        )
        return cls(example.id, question, prediction, answers, score, tuple(images), before)

    @property
    def verdict(self) -> str | None:
        """A key of VERDICTS, or None without a score."""
        if self.score is None:
            return None
        return "right" if self.score >= 1 else "part" if self.score > 0 else "wrong"

    @property
    def change(self) -> str | None:
        """A key of CHANGES; None where the answer is that of the run before, or there is none."""
        if self.before is None or self.before[0] == self.prediction:
            return None
        was, score = self.before[1], self.score
        if was is None or score is None or was == score:
            return "other"
        return "better" if score > was else "worse"


@dataclass(frozen=True)
class PageSection:
    """The examples of one task."""

    title: str
    examples: Sequence[PageExample]


def write_examples_page(path: Path, title: str, sections: Sequence[PageSection]) -> None:
    """Writes the page atomically, with images scaled down and embedded.

    Args:
        path: The HTML file.
        title: The title and heading of the page.
        sections: One per task.
    """
    examples = [example for section in sections for example in section.examples]
    write_text(path, _template().render(title=title, sections=sections, filters=_filters(examples)))


@cache
def _template() -> Template:
    """The page's template, which takes longer to compile than to render."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_without_halves,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    known = {"address": _address, "anchor": _anchor, "verdicts": VERDICTS, "changes": CHANGES}
    return environment.get_template("examples.html", globals=known)


def _without_halves(value: Any) -> Any:
    """A value to print; halves of surrogate pairs, which JSON allows and UTF-8 does not, become question marks."""
    return value.encode("utf-8", "replace").decode("utf-8") if type(value) is str else value


def _filters(examples: Sequence[PageExample]) -> dict[str, str]:
    """The texts of the buttons that filter by verdict and by change; none where no example has a score."""
    verdicts = Counter(example.verdict for example in examples)
    changes = Counter(example.change for example in examples)
    if verdicts[None] == len(examples):
        return {}
    choices = {"all": f"all {len(examples)}"} | {key: f"{name} {verdicts[key]}" for key, name in VERDICTS.items()}
    return choices | {key: f"{name} {changes[key]}" for key, name in CHANGES.items() if changes[key]}


def _anchor(name: str) -> str:
    """An id in words that an address takes as it is."""
    return quote(name.encode("utf-8", "replace").decode("utf-8"), safe="").replace("%", "_")


def _address(image: Shown) -> str:
    return image if isinstance(image, str) else data_uri(image)


def data_uri(image: Image.Image) -> str:
    """Returns the image as a WebP data URI: on white, its longer side at most `SIDE` pixels."""
    small = on_white(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
