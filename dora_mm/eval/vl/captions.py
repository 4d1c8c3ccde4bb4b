"""Caption metrics by pycocoevalcap's scorers on its Penn Treebank tokens, which need Java.

Where that tokenizer cannot run, the metrics are left out and a note says so: scores on other tokens are not comparable.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from dora_mm.data.vl.example import Predictions
from dora_mm.eval.vl.scores import VLScores, check_answered

Tokens = dict[str, list[str]]  # by row, tokenised captions with single spaces


@dataclass(frozen=True)
class CaptionScores:
    """metrics x 100; each: CIDEr-D x 100 of every row, in order; skipped: why some or all are not there."""

    metrics: dict[str, float]
    each: tuple[float, ...]
    skipped: str | None = None


def score_captions(rows: Predictions, *, meteor: bool = True) -> VLScores:
    """`CIDEr` (CIDEr-D), `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L`, all x 100, against all references of a picture.

    Args:
        meteor: False leaves METEOR out, whose Java program takes 5 seconds to load.
    """
    references, found = picture_scores(rows, meteor=meteor)
    return VLScores("caption", "CIDEr", found.metrics, {}, caption_notes(references, found))


def picture_scores(rows: Predictions, *, meteor: bool = True) -> tuple[dict[str, list[str]], CaptionScores]:
    """References by id, in the order in which `each` is."""
    references, predictions = group_by_id(rows)
    return references, caption_scores(references, predictions, meteor=meteor)


def group_by_id(rows: Predictions) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References and prediction of each id. Predictions of one id are one picture or clip, whose references are joined.

    Raises:
        ValueError: no rows, a row without references, or an id with two predictions.
    """
    check_answered(rows)
    references: dict[str, list[str]] = {}
    predictions: dict[str, str] = {}
    for example, prediction in rows:
        known = references.setdefault(example.id, [])
        if predictions.setdefault(example.id, prediction) != prediction:
            raise ValueError(f"{example.id} has two captions to score, {predictions[example.id]!r} and {prediction!r}")
        known += [answer for answer in example.answers if answer not in known]
    return references, predictions


def caption_notes(references: Mapping[str, Sequence[str]], found: CaptionScores) -> tuple[str, ...]:
    counts = [len(texts) for texts in references.values()]
    notes = [f"{len(counts)} captions against {sum(counts) / len(counts):.2f} references each"]
    if found.skipped:
        notes.append(f"skipped: {found.skipped}")
    if len(counts) == 1:
        notes.append("CIDEr of a single caption is always 0: its words are weighted by how rare they are in the split")
    return tuple(notes)


def caption_scores(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], *, meteor: bool = True
) -> CaptionScores:
    """The metrics of one prediction for each key, over its references."""
    if shutil.which("java") is None:
        return CaptionScores({}, (), "caption metrics need the Penn Treebank tokenizer, and Java is not installed")
    try:
        true = tokenize(references)
        said = tokenize({key: [text] for key, text in predictions.items()})
    except OSError as error:
        return CaptionScores({}, (), f"the Penn Treebank tokenizer could not run ({error})")
    metrics: dict[str, float] = {}
    each: tuple[float, ...] = ()
    skipped = None
    for name, compute in tqdm(load_scorers(meteor).items(), desc="caption metrics", disable=None):
        try:
            score, of_rows = compute(true, said)
        except (OSError, ValueError) as error:  # METEOR's Java program ended: its heap is 2 GB
            assert name == "METEOR", name
            skipped = f"METEOR could not run ({error})"
            continue
        found = {name: score} if name != "BLEU" else {f"BLEU-{n}": value for n, value in enumerate(score, start=1)}
        metrics |= {key: 100 * float(value) for key, value in found.items()}
        if name == "CIDEr":
            each = tuple(100 * float(value) for value in of_rows)
    return CaptionScores(metrics, each, skipped)


def tokenize(captions: Mapping[str, Sequence[str]]) -> Tokens:
    """Lower-case Penn Treebank tokens without punctuation.

    Raises:
        OSError: Java or the tokenizer's folder cannot be used. RuntimeError: it did not answer for every caption.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It reads a line per caption, and takes for the end of one more than Python does (U+2028, form feeds, ...).
    rows = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    tokens = PTBTokenizer().tokenize(rows)
    if {key: len(texts) for key, texts in tokens.items()} != {key: len(texts) for key, texts in captions.items()}:
        raise RuntimeError("the Penn Treebank tokenizer did not answer for every caption: does `java -version` work?")
    return tokens


def load_scorers(meteor: bool) -> dict[str, Callable[[Tokens, Tokens], tuple]]:
    """By name, what takes references and predictions and gives the score of all and of each."""
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
