"""Caption metrics by the scorers of pycocoevalcap, on the tokens of its Penn Treebank tokenizer, which needs Java.

Where the tokenizer cannot run, there are no metrics, only a note: scores on other tokens are not comparable.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import VLScores, check_answered, table
from dora_mm.utils.progress import tracked

if TYPE_CHECKING:
    from dora_mm.eval.statistics import ConfidenceInterval  # which needs scipy

Tokens = dict[str, list[str]]  # id to tokenised captions, the tokens separated by single spaces


@dataclass(frozen=True)
class CaptionScores:
    """Caption metrics of a split.

    Attributes:
        metrics: By name, x 100.
        per_caption: CIDEr-D x 100 of every caption, in the order of the references; empty where it was not computed.
        skipped: Why some or all metrics are missing.
    """

    metrics: dict[str, float]
    per_caption: tuple[float, ...]
    skipped: str | None = None


def _by_type(predictions: Predictions, ids: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    types = defaultdict(set)
    for example, _ in predictions:
        types[example.id].update(example.kinds)
    grouped = defaultdict(list)
    for key, value in zip(ids, values, strict=False):  # no values where the metrics were skipped
        for name in types[key]:
            grouped[name].append(value / 100)
    return grouped


def _ascii(text: str) -> str:
    return "".join(character if character.isascii() else " " for character in text)


def group_by_id(predictions: Predictions) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the references and the predicted caption of each id.

    Rows with the same id belong to one image or clip: their references are merged, without repetitions.

    Raises:
        ValueError: There are no predictions, an example has no references, or an id has two predictions.
    """
    check_answered(predictions)
    references: dict[str, list[str]] = {}
    captions: dict[str, str] = {}
    for example, prediction in predictions:
        known = references.setdefault(example.id, [])
        if captions.setdefault(example.id, prediction) != prediction:
            raise ValueError(f"{example.id} has two captions to score, {captions[example.id]!r} and {prediction!r}")
        known += [answer for answer in example.answers if answer not in known]
    return references, captions


def score_notes(references: Mapping[str, Sequence[str]], found: CaptionScores) -> tuple[str, ...]:
    """Returns the notes of `VLScores`: the number of captions, what was skipped, and a warning about one caption."""
    counts = [len(texts) for texts in references.values()]
    notes = [f"{len(counts)} captions against {sum(counts) / len(counts):.2f} references each"]
    if found.skipped:
        notes.append(f"skipped: {found.skipped}")
    if len(counts) == 1:
        notes.append("CIDEr of a single caption is always 0: its words are weighted by how rare they are in the split")
    return tuple(notes)


def caption_scores(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], *, meteor: bool = True
) -> CaptionScores:
    """Computes the metrics of one caption per id against its references.

    Args:
        references: Id to captions.
        captions: Id to the predicted caption, for the same ids.
        meteor: Whether to compute METEOR.

    Raises:
        RuntimeError: The tokenizer did not answer for every caption.
    """
    if shutil.which("java") is None:
        return CaptionScores({}, (), "caption metrics need the Penn Treebank tokenizer, and Java is not installed")
    try:
        reference_tokens = tokenize(references)
        caption_tokens = tokenize({key: [text] for key, text in captions.items()})
    except OSError as error:
        return CaptionScores({}, (), f"the Penn Treebank tokenizer could not run ({error})")
    metrics: dict[str, float] = {}
    per_caption: tuple[float, ...] = ()
    skipped = None
    for name, compute in tracked(load_scorers(meteor).items(), "caption metrics", "metrics"):
        try:
            score, scores = compute(reference_tokens, caption_tokens)
        except (OSError, ValueError) as error:  # METEOR's Java program ended: its heap is 2 GB
            assert name == "METEOR", name
            skipped = f"METEOR could not run ({error})"
            continue
        found = {name: score} if name != "BLEU" else {f"BLEU-{n}": value for n, value in enumerate(score, start=1)}
        metrics |= {key: 100 * float(value) for key, value in found.items()}
        if name == "CIDEr":
            per_caption = tuple(100 * float(value) for value in scores)
    return CaptionScores(metrics, per_caption, skipped)


def tokenize(captions: Mapping[str, Sequence[str]]) -> Tokens:
    """Returns lower-case Penn Treebank tokens without punctuation.

    Raises:
        OSError: Java or the tokenizer's folder cannot be used.
        RuntimeError: The tokenizer did not answer for every caption.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer reads a line per caption, and ends lines at more characters than Python (U+2028, form feeds, ...).
    rows = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    tokens = PTBTokenizer().tokenize(rows)
    if {key: len(texts) for key, texts in tokens.items()} != {key: len(texts) for key, texts in captions.items()}:
        raise RuntimeError("the Penn Treebank tokenizer did not answer for every caption: does `java -version` work?")
    return tokens


def load_scorers(meteor: bool) -> dict[str, Callable[[Tokens, Tokens], tuple]]:
    """Returns scorers by name, which take tokens of references and captions and return the score of all and of each."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    scorers = {
        "CIDEr": Cider().compute_score,
        "BLEU": partial(Bleu(4).compute_score, verbose=0),
        "ROUGE-L": Rouge().compute_score,
    }
    return scorers | ({"METEOR": Meteor().compute_score} if meteor else {})


@dataclass(frozen=True)
class CaptionScorer:
    """Scores captions, all of a split together, with the methods of `AnswerScorer`.

    Attributes:
        ascii_only: Whether other characters become spaces, as in the tools of VALUE.
        group: As in `AnswerScorer`.
        grouping: As in `AnswerScorer`.
        unit: As in `AnswerScorer`.
        confidence_intervals: As in `AnswerScorer`.
        scores_answers_only: As in `AnswerScorer`.
    """

    ascii_only: bool = False
    group: Callable[[Example], str | None] = lambda _: None
    grouping: str = ""
    unit: Callable[[Example], str] = lambda example: example.id
    confidence_intervals: Callable[[Predictions, Sequence[str]], dict[str, ConfidenceInterval]] = lambda *_: {}
    scores_answers_only: bool = True

    def score(self, predictions: Predictions, *, meteor: bool) -> VLScores:
        """Computes `CIDEr` (CIDEr-D), `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L`, x 100, by all references of an id.

        The table by `type` has the mean CIDEr of the images or clips with a reference of this type, where files tell
        types.

        Raises:
            ValueError: There are no predictions, an example has no references, or an id has two predictions.
        """
        references, found = self._of_split(predictions, meteor=meteor)
        by_type = _by_type(predictions, list(references), found.per_caption)
        tables = {"type": table(by_type)} if by_type else {}
        tokens = "Penn Treebank tokens" + (", characters beyond ASCII as spaces, as VALUE" if self.ascii_only else "")
        names = {name: "CIDEr-D" if name == "CIDEr" else name for name in found.metrics}
        rules = {name: f"pycocoevalcap's {theirs}, of {tokens}" for name, theirs in names.items()}
        counts = dict.fromkeys(found.metrics, len(references))
        return VLScores("CIDEr", found.metrics, tables, score_notes(references, found), rules, counts=counts)

    def row(self, example: Example, prediction: str) -> float | None:
        return None

    def filled(self, predictions: Predictions) -> Predictions:
        """The predictions: an empty caption has no words in common with any."""
        return predictions

    def values(self, predictions: Predictions) -> np.ndarray:
        _, found = self._of_split(predictions, meteor=False)
        return np.array(found.per_caption) / 100

    def _of_split(self, predictions: Predictions, *, meteor: bool) -> tuple[dict[str, list[str]], CaptionScores]:
        """The references by id, in the order of `CaptionScores.per_caption`, and the scores."""
        references, captions = group_by_id(predictions)
        read = _ascii if self.ascii_only else str
        found = caption_scores(
            {key: [*map(read, texts)] for key, texts in references.items()},
            {key: read(text) for key, text in captions.items()},
            meteor=meteor,
        )
        return references, found


SCORER = CaptionScorer()
CLIP_SCORER = CaptionScorer(ascii_only=True)
