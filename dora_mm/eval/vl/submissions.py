"""Predictions in the formats that the official evaluation scripts and servers read; for others as JSON lines.

vqa             JSON    [{"question_id": 1, "answer": "yes"}]
gqa             JSON    [{"questionId": "1", "prediction": "yes"}]
nlvr2           CSV     dev-850-0-0,True
captions        JSON    [{"image_id": 1, "caption": "a dog"}]
clip_choices    JSON    {"1": 3}
clip_captions   JSONL   {"vid_name": "a_clip", "clip_id": 1, "descs": [{"desc": "She sits down."}]}
answers         JSONL   {"id": "1", "answer": "B"}
"""

import json
from pathlib import Path
from typing import Any

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.video import choice
from dora_mm.registries.registry import load
from dora_mm.registries.submissions import SUBMISSIONS
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.atomic import write_text

NO_CHOICE = -1  # the scripts need a number for each question, and this one is never right


def suffix(task: str) -> str:
    """Returns the suffix of a task's file: .json, .jsonl or .csv."""
    return SUBMISSIONS[TASKS[task].submission].suffix


def write_predictions(task: str, predictions: Predictions, path: Path) -> None:
    """Writes the submission file of a task atomically.

    Ids that are integers are written as numbers where the official files have numbers; other ids, of data sets that no
    official script knows, as text.

    Args:
        task: Name of the task.
        predictions: Examples with predictions; rows of the same id are written once.
        path: The file to write, see `suffix`.

    Raises:
        ValueError: An id has two different predictions, of which the scripts would use only one.
    """
    write_text(path, load(SUBMISSIONS[TASKS[task].submission].text)(_by_id(task, predictions)))


def _by_id(task: str, predictions: Predictions) -> list[tuple[Example, str]]:
    """Returns one row per id, with single spaces between the words of its prediction, but for conversations."""
    kept: dict[str, tuple[Example, str]] = {}
    keeps_spaces = TASKS[task].kind == "conversations"
    for example, prediction in predictions:
        row = (example, prediction if keeps_spaces else " ".join(prediction.split()))
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


def vqa(predictions: Predictions) -> str:
    return json.dumps([{"question_id": _number(example.id), "answer": answer} for example, answer in predictions])


def gqa(predictions: Predictions) -> str:
    return json.dumps([{"questionId": example.id, "prediction": answer} for example, answer in predictions])


def nlvr2(predictions: Predictions) -> str:
    return "".join(f"{example.id},{answer.capitalize()}\n" for example, answer in predictions)


def captions(predictions: Predictions) -> str:
    return json.dumps([{"image_id": _number(example.id), "caption": caption} for example, caption in predictions])


def clip_choices(predictions: Predictions) -> str:
    indices = {example.id: choice(prediction) for example, prediction in predictions}
    return json.dumps({key: NO_CHOICE if index is None else index for key, index in indices.items()})


def answers(predictions: Predictions) -> str:
    return _json_lines([{"id": example.id, "answer": answer} for example, answer in predictions])


def clip_captions_of_vid_name(predictions: Predictions) -> str:
    return _clip_captions("vid_name", predictions)


def clip_captions_of_video_id(predictions: Predictions) -> str:
    return _clip_captions("video_id", predictions)


def _clip_captions(video_key: str, predictions: Predictions) -> str:
    """Captions of clips; `video_key` is the key of a clip's name, of which VALUE has two."""
    return _json_lines(
        [
            {video_key: example.images[0], "clip_id": _number(example.id), "descs": [{"desc": caption}]}
            for example, caption in predictions
        ]
    )
