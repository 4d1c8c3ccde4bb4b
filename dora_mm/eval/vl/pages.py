"""An HTML page of examples: images, question, prediction and reference answers, also of two runs side by side.

One file without scripts that loads nothing from elsewhere: it can be opened from the disk, also on a phone, and sent to
others. Images are in it, or beside it where there are many: 5,000 rows without pictures take two seconds to open.
It is written without a library of templates: with jinja2 this file, a template and a style sheet have 206 lines
together, 30 less, and there is a dependency more; the page of a gallery fills in five places and gains nothing.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

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
    """The examples of one task; `note` is printed below the heading."""

    title: str
    examples: Sequence[PageExample]
    note: str = ""


def write_examples_page(path: Path, title: str, sections: Sequence[PageSection]) -> None:
    """Writes the page atomically, with images scaled down and embedded.

    Args:
        path: The HTML file.
        title: The title and heading of the page.
        sections: One per task.
    """
    examples = [example for section in sections for example in section.examples]
    verdicts = Counter(example.verdict for example in examples)
    changes = Counter(example.change for example in examples)
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    write_text(
        path,
        PAGE.format(
            title=_text(title), style=STYLE, filters=_filters(verdicts, changes), links=_links(sections), body=body
        ),
    )


def _text(text: str) -> str:
    """Escapes text; halves of surrogate pairs, which JSON allows and UTF-8 does not, become question marks."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _filters(verdicts: Counter, changes: Counter) -> str:
    """Returns radio buttons that filter by verdict and by change, or "" where no example has a score.

    They come first on the page, since style sheets can only select what follows a checked button.
    """
    total = sum(verdicts.values())
    if verdicts[None] == total:
        return ""
    choices = {"all": f"all {total}"} | {key: f"{name} {verdicts[key]}" for key, name in VERDICTS.items()}
    choices |= {key: f"{name} {changes[key]}" for key, name in CHANGES.items() if changes[key]}
    inputs = (f'<input type="radio" name="show" id="show-{key}"{" checked" * (key == "all")}>' for key in choices)
    labels = (f'<label for="show-{key}">{text}</label>' for key, text in choices.items())
    return "\n".join(inputs) + '\n<nav class="filters" aria-label="filter">' + "".join(labels) + "</nav>"


def _links(sections: Sequence[PageSection]) -> str:
    return "".join(f'<a href="#s{number}">{_text(section.title)}</a>' for number, section in enumerate(sections))


def _section(number: int, section: PageSection) -> str:
    entries = "\n".join(_entry(f"s{number}-{_anchor(example.name)}", example) for example in section.examples)
    note = f'<p class="note">{_text(section.note)}</p>' if section.note else ""
    heading = f"<h2>{_text(section.title)}</h2>{note}"
    return f'<section id="s{number}">\n{heading}\n<div class="cards">\n{entries}\n</div>\n</section>'


def _anchor(name: str) -> str:
    """An id in words that an address takes as it is."""
    return quote(name.encode("utf-8", "replace").decode("utf-8"), safe="").replace("%", "_")


def _entry(anchor: str, example: PageExample) -> str:
    verdict = example.verdict
    mark = ""
    if verdict is not None:
        score = f" ({example.score:.1f})" if verdict == "part" else ""
        mark = f'<span class="mark">{VERDICTS[verdict]}{score}</span>'
    question = f'<p class="question" dir="auto">{_text(example.question)}</p>' if example.question else ""
    prediction = _text(example.prediction) or "<i>(nothing)</i>"
    answers = "".join(_answer(*answer) for answer in example.answers)
    return (
        f'<article id="{anchor}" class="card {verdict or "unscored"} {example.change or "same"}">{_images(example)}\n'
        f'<div class="words">{question}'
        f'<p class="said"><span><small>prediction</small> <b dir="auto">{prediction}</b></span>{mark}</p>\n'
        f"{_before(example)}{answers and f'<ul><li><small>answers</small></li>{answers}</ul>'}"
        f'<p class="name"><a href="#{anchor}">{_text(example.name)}</a></p></div></article>'
    )


def _before(example: PageExample) -> str:
    if example.before is None or example.change is None:
        return ""
    text, score = example.before
    number = "" if score is None else f" ({score:.1f})"
    mark = f'<span class="mark">{CHANGES[example.change]}</span>'
    content = _text(text) or "<i>(nothing)</i>"
    return f'<p class="before"><span><small>before</small> <span dir="auto">{content}</span>{number}</span>{mark}</p>\n'


def _answer(answer: str, score: float | None) -> str:
    number = "" if score is None or score == 1 else f" <small>{score:g}</small>"
    return f'<li><span dir="auto">{_text(answer)}</span>{number}</li>'


def _images(example: PageExample) -> str:
    if not example.images:
        return '<div class="pictures none">no picture</div>'
    addresses = [_text(image) if isinstance(image, str) else data_uri(image) for image in example.images]
    images = (
        f'<img src="{address}" alt="picture {number} of {len(addresses)}" loading="lazy">'
        for number, address in enumerate(addresses, start=1)
    )
    return f'<div class="pictures">{"".join(images)}</div>'


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """Returns the image as a WebP data URI: on white, its longer side at most `side` pixels."""
    small = on_white(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{filters}
<nav class="sections" aria-label="tasks">{links}</nav>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root {
  --paper: #f6f6f4; --card: #fff; --ink: #1c1c1a; --pale: #66665f; --line: #dcdcd6;
  --right: #1a7f37; --part: #8a5a00; --wrong: #c0261f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161614; --card: #22221f; --ink: #ecece6; --pale: #a3a39a; --line: #3a3a35;
    --right: #5ccf7a; --part: #e0b04c; --wrong: #ff8078;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; }
a { color: inherit; }
input[name=show] { position: fixed; top: 0; opacity: 0; pointer-events: none; }  /* fixed: focus must not scroll */
nav { display: flex; flex-wrap: wrap; gap: .5rem; }
.filters { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--paper); }
.filters label { padding: .3rem .8rem; border: 1px solid var(--line); border-radius: 2rem; cursor: pointer; }
.sections { gap: 1rem; margin-top: .25rem; color: var(--pale); }
section { scroll-margin-top: 3.5rem; }
.note { margin: 0 0 .75rem; color: var(--pale); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.card {
  display: flex; flex-direction: column; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  content-visibility: auto; contain-intrinsic-size: auto 22rem;  /* of thousands only what is seen is laid out */
}
.card:target { outline: 3px solid var(--ink); outline-offset: 2px; scroll-margin-top: 4rem; }
.pictures { display: flex; gap: 2px; background: var(--line); }
.pictures img { flex: 1; min-width: 0; width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--card); }
.pictures.none { padding: 1.5rem; justify-content: center; color: var(--pale); }
.words { padding: .7rem .9rem; display: flex; flex-direction: column; flex: 1; gap: .4rem; }
.words p, ul { margin: 0; }
.question { color: var(--pale); max-height: 12rem; overflow: auto; white-space: pre-line; }  /* may be long */
.before { font-size: .9rem; color: var(--pale); }
.said, .before { display: flex; gap: .6rem; justify-content: space-between; align-items: baseline; }
.mark { flex: none; font-size: .85rem; font-weight: 600; }
.right .mark { color: var(--right); }
.part .mark { color: var(--part); }
.wrong .mark { color: var(--wrong); }
.better .before .mark { color: var(--right); }
.worse .before .mark { color: var(--wrong); }
.other .before .mark { color: var(--pale); }
ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .3rem; }
li { padding: .05rem .55rem; border: 1px solid var(--line); border-radius: .9rem; font-size: .9rem; }
li:first-child { padding: .05rem 0; border: 0; }
small, .name { color: var(--pale); }
.words .name { margin-top: auto; font-size: .75rem; }
input:focus-visible ~ .filters { outline: 2px solid var(--pale); }
#show-all:checked ~ .filters [for=show-all], #show-right:checked ~ .filters [for=show-right],
#show-part:checked ~ .filters [for=show-part], #show-wrong:checked ~ .filters [for=show-wrong],
#show-better:checked ~ .filters [for=show-better], #show-worse:checked ~ .filters [for=show-worse],
#show-other:checked ~ .filters [for=show-other] {
  background: var(--ink); color: var(--paper);
}
#show-right:checked ~ main .card:not(.right), #show-part:checked ~ main .card:not(.part),
#show-wrong:checked ~ main .card:not(.wrong), #show-better:checked ~ main .card:not(.better),
#show-worse:checked ~ main .card:not(.worse), #show-other:checked ~ main .card:not(.other) { display: none; }
#show-right:checked ~ main section:not(:has(.right)), #show-part:checked ~ main section:not(:has(.part)),
#show-wrong:checked ~ main section:not(:has(.wrong)), #show-better:checked ~ main section:not(:has(.better)),
#show-worse:checked ~ main section:not(:has(.worse)), #show-other:checked ~ main section:not(:has(.other)) {
  display: none;
}
"""
