"""Caption metrics: those of pycocoevalcap on the tokens of its tokenizer, or none."""

import math
import shutil

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl import captions
from dora_mm.eval.vl.metrics import score, score_row

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
REFERENCES = {
    "1": ("A dog runs over the grass.", "a brown dog is running", "The dog runs!", "dog on grass", "A dog, running."),
    "2": ("Two cats on a sofa", "two cats sleep on the couch", "cats lie on a sofa", "A pair of cats.", "cats"),
    "3": ("A red bus in the street", "the bus is red", "a bus drives by", "A red double-decker bus", "bus"),
}
CAPTIONS = {"1": "a dog runs on the grass", "2": "two dogs on a sofa", "3": ""}


def rows(predicted: dict[str, str] = CAPTIONS) -> list[tuple[Example, str]]:
    return [
        (Example(key, (f"{key}.jpg",), "", answers, (1.0,) * len(answers)), predicted[key])
        for key, answers in REFERENCES.items()
    ]


@pytest.fixture(scope="module")
def scores():
    return score("caption", rows(), meteor=False)


@needs_java
@pytest.mark.slow
def test_all_metrics_are_there_x_100():
    """With METEOR, whose program takes 9 seconds to start."""
    scores = score("caption", rows())
    names = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR"]
    assert list(scores.metrics) == names
    assert all(1.0 < scores.metrics[name] < 100 for name in names if name not in ("CIDEr", "BLEU-4"))
    assert scores.main == "CIDEr"
    assert scores.notes == ("3 captions against 5.00 references each",)
    assert score_row("caption", *rows()[0]) is None


@needs_java
def test_metrics_equal_those_of_pycocoevalcap(scores):
    """As its COCOEvalCap runs them, scorer by scorer."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    reference_tokens = PTBTokenizer().tokenize(
        {key: [{"caption": text} for text in texts] for key, texts in REFERENCES.items()}
    )
    caption_tokens = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in CAPTIONS.items()})
    assert reference_tokens["3"][3] == "a red double-decker bus"
    assert scores.metrics["CIDEr"] == pytest.approx(100 * Cider().compute_score(reference_tokens, caption_tokens)[0])
    assert scores.metrics["BLEU-4"] == pytest.approx(
        100 * Bleu(4).compute_score(reference_tokens, caption_tokens, verbose=0)[0][3]
    )
    assert scores.metrics["ROUGE-L"] == pytest.approx(100 * Rouge().compute_score(reference_tokens, caption_tokens)[0])


@needs_java
def test_perfect_captions_and_order(scores):
    perfect = score("caption", rows({key: texts[0] for key, texts in REFERENCES.items()}), meteor=False)
    assert perfect.metrics["BLEU-4"] == pytest.approx(100)
    assert perfect.metrics["ROUGE-L"] == pytest.approx(100)
    assert perfect.metrics["CIDEr"] > 2 * scores.metrics["CIDEr"]
    assert "METEOR" not in perfect.metrics
    assert score("caption", rows()[::-1], meteor=False).metrics["CIDEr"] == pytest.approx(scores.metrics["CIDEr"])


@needs_java
def test_unusual_line_breaks_do_not_shift_captions():
    """The tokenizer ends lines at these; a shifted caption would be compared with references of another image."""
    captions_with_breaks = [
        "a dog\u2028runs",
        "two\rcats",
        "red\x0bbus\x0chere",
        "x\x85y",
        "",
        "last  one\n",
        "…\u2029…",
    ]
    tokens = captions.tokenize({str(number): [text] for number, text in enumerate(captions_with_breaks)})
    assert list(tokens.values())[:6] == [
        ["a dog runs"], ["two cats"], ["red bus here"], ["x y"], [""], ["last one"],
    ]  # fmt: skip


@needs_java
def test_cider_of_a_single_caption_is_zero():
    single = score("caption", rows()[:1], meteor=False)
    assert single.metrics["CIDEr"] == 0.0
    assert "CIDEr of a single caption is always 0" in single.notes[-1]


def test_references_of_one_image_are_merged():
    parts = [(Example("1", ("1.jpg",), "", (text,), (1.0,)), "a dog") for text in ("a dog", "the dog", "a dog")]
    references, predictions = captions.group_by_id(parts)
    assert (references, predictions) == ({"1": ["a dog", "the dog"]}, {"1": "a dog"})
    with pytest.raises(ValueError, match="1 has two captions to score, 'a dog' and 'a cat'"):
        captions.group_by_id([*parts, (parts[0][0], "a cat")])


def test_without_java_nothing_is_scored_and_a_note_says_so(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    scores = score("caption", rows())
    assert scores.metrics == {}
    assert scores.value is None
    assert "skipped: caption metrics need the Penn Treebank tokenizer, and Java is not installed" in scores.notes
    video = score("tvc", rows())
    assert (video.metrics, video.tables) == ({}, {})
    assert "Java is not installed" in video.notes[1]


def test_a_tokenizer_that_cannot_write_is_noted(monkeypatch):
    def fail(captions):
        raise PermissionError(13, "Permission denied", "/usr/lib/tmp1")

    monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(captions, "tokenize", fail)
    scores = score("caption", rows())
    assert scores.metrics == {}
    assert "tokenizer could not run" in scores.notes[1]
    assert "/usr/lib/tmp1" in scores.notes[1]


def test_a_failure_of_meteor_is_noted_and_other_metrics_remain(monkeypatch):
    def fail(reference_tokens, caption_tokens):
        raise ValueError("could not convert string to float: b''")

    tokens = {"1": ["a dog"], "2": ["a cat"]}
    monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(captions, "tokenize", lambda captions: tokens)
    load = captions.load_scorers
    monkeypatch.setattr(captions, "load_scorers", lambda meteor: load(False) | {"METEOR": fail})
    found = captions.caption_scores(tokens, {"1": "a dog", "2": "a cat"})
    assert "METEOR could not run" in (found.skipped or "")
    assert math.isclose(found.metrics["ROUGE-L"], 100)
    assert "METEOR" not in found.metrics


TYPES = {"1": ("v", "vt", "v", "t", "v"), "2": ("t",) * 5, "3": ("v",) * 5}


@needs_java
@pytest.mark.parametrize("task", ["tvc", "yc2c"])
def test_video_captions_are_scored_against_all_references_of_their_clip(task, scores):
    typed = [
        (Example(key, ("clip_07",), "[Subs] hi", texts, (1.0,) * 5, (), TYPES[key]), CAPTIONS[key])
        for key, texts in REFERENCES.items()
    ]
    grouped = score(task, typed, meteor=False)
    assert grouped.main == "CIDEr"
    assert grouped.metrics["CIDEr"] == pytest.approx(scores.metrics["CIDEr"])
    each = {name: mean for name, (mean, _) in grouped.tables["type"].items()}
    assert {name: count for name, (_, count) in grouped.tables["type"].items()} == {"t": 2, "v": 2, "vt": 1}
    first, second, third = each["vt"], 2 * each["t"] - each["vt"], 2 * each["v"] - each["vt"]
    assert (first + second + third) / 3 == pytest.approx(grouped.metrics["CIDEr"])
    one_by_one = [
        (Example(example.id, example.images, "", (text,), (1.0,)), caption)
        for example, caption in typed
        for text in example.answers
    ]
    assert score(task, one_by_one, meteor=False).metrics["CIDEr"] == pytest.approx(grouped.metrics["CIDEr"])


@needs_java
def test_video_captions_lose_non_ascii_characters_as_in_value():
    accented, plain = ({"1": dog, "2": "two cats", "3": "a bus"} for dog in ("a dogé runs", "a dog runs"))
    metrics = score("tvc", rows(accented), meteor=False).metrics
    assert metrics == score("tvc", rows(plain), meteor=False).metrics
    assert metrics["CIDEr"] > score("caption", rows(accented), meteor=False).metrics["CIDEr"]
