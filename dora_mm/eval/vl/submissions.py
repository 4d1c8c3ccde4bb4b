"""Predictions in the forms that the official evaluation scripts and servers read.

vqa            JSON    [{"question_id": 1, "answer": "yes"}]
gqa            JSON    [{"questionId": "1", "prediction": "yes"}]
nlvr2          CSV     dev-850-0-0,True
caption        JSON    [{"image_id": 1, "caption": "a dog"}]
tvqa, how2qa   JSON    {"1": 3}
tvc, yc2c      JSONL   {"vid_name": "a_clip", "clip_id": 1, "descs": [{"desc": "She sits down."}]}
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.video import choice
from dora_mm.utils.atomic import write_text

NO_CHOICE = -1  # the scripts ask for a number for each question, and this one is never right


def suffix(task: str) -> str:
    """Of a task's file: .json, .jsonl or .csv."""
    return {"nlvr2": ".csv", "tvc": ".jsonl", "yc2c": ".jsonl"}.get(task, ".json")


def write_predictions(task: str, rows: Predictions, path: Path) -> None:
    """The file appears whole or not at all. Ids that are whole numbers are written as numbers where the official files
    have numbers; others, of data sets that no official script knows, as text.

    Raises:
        ValueError: an id with two different predictions, which the scripts would take one of.
    """
    write_text(path, FORMATS[task](_by_id(task, rows)))


def _by_id(task: str, rows: Predictions) -> list[tuple[Example, str]]:
    """One row for each id; predictions without spaces at their ends."""
    kept: dict[str, tuple[Example, str]] = {}
    for example, prediction in rows:
        row = (example, " ".join(prediction.split()))
        if kept.setdefault(example.id, row)[1] != row[1]:
            first = kept[example.id][1]
            raise ValueError(
                f"{task}: {example.id} has two predictions, {first!r} and {row[1]!r}: write one for each id"
            )
    return list(kept.values())


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _vqa(rows: Predictions) -> str:
    return json.dumps([{"question_id": _number(example.id), "answer": said} for example, said in rows])


def _gqa(rows: Predictions) -> str:
    return json.dumps([{"questionId": example.id, "prediction": said} for example, said in rows])


def _nlvr2(rows: Predictions) -> str:
    return "".join(f"{example.id},{said.capitalize()}\n" for example, said in rows)


def _captions(rows: Predictions) -> str:
    return json.dumps([{"image_id": _number(example.id), "caption": said} for example, said in rows])


def _choices(rows: Predictions) -> str:
    found = {example.id: choice(said) for example, said in rows}
    return json.dumps({key: NO_CHOICE if index is None else index for key, index in found.items()})


def _clips(video: str) -> Callable[[Predictions], str]:
    """`video`: the key of the clip's name, which the two tasks call differently."""
    return lambda rows: _json_lines(
        [
            {video: example.images[0], "clip_id": _number(example.id), "descs": [{"desc": said}]}
            for example, said in rows
        ]
    )


FORMATS: dict[str, Callable[[Predictions], str]] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "caption": _captions,
    "tvqa": _choices,
    "how2qa": _choices,
    "tvc": _clips("vid_name"),
    "yc2c": _clips("video_id"),
}
