"""Small data files in the layouts of the official ones, and sources that read them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_mm.config.vl_data import SourceConfig


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def vqa_question(number: int, **changes: Any) -> dict[str, Any]:
    return {"image_id": 42 + number // 2, "question": f"What is {number}?", "question_id": 42000 + number} | changes


def vqa_annotation(number: int, answers: Sequence[str] = ("net",) * 9 + ("mesh",), **changes: Any) -> dict[str, Any]:
    listed = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    row = {"question_type": "what is", "multiple_choice_answer": answers[0], "answers": listed, "answer_type": "other"}
    return row | {"image_id": 42 + number // 2, "question_id": 42000 + number} | changes


def vqa_v2(folder: Path, questions: Sequence[Any] | None = None, annotations: Sequence[Any] | None = None):
    """A source with the official pair of files, by default of four rows."""
    about = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_subtype": "val2014", "data_type": "mscoco"}
    questions = [vqa_question(number) for number in range(4)] if questions is None else questions
    annotations = [vqa_annotation(number) for number in range(4)] if annotations is None else annotations
    return SourceConfig(
        format="vqa_v2",
        file=str(write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**about, "questions": questions})),
        annotations=str(
            write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations, **about})
        ),
    )


GQA = {
    "02930152": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    },
    "07333408": {
        "question": "What is on the white wall?",
        "imageId": "n375429",
        "answer": "pipe",
        "types": {"detailed": "existAttr", "semantic": "rel", "structural": "query"},
        "fullAnswer": "The pipe is on the wall.",
        "groups": {"global": "", "local": ""},
    },
}

NLVR2 = [
    {
        "sentence": "One image shows exactly two brown acorns.",
        "left_url": "https://example.org/left.jpg",
        "right_url": "https://example.org/right.jpg",
        "writer": 13,
        "label": "True",
        "identifier": "train-850-0-0",
        "directory": 40,
        "synset": "acorn",
        "query": "two acorns0",
    },
    {"sentence": "There are no dogs.", "label": "False", "identifier": "dev-12-3-1", "validation": {"26": "False"}},
]

CAPTIONS = {
    "info": {"year": 2014},
    "images": [
        {"license": 5, "file_name": "COCO_train2014_000000057870.jpg", "id": 57870, "height": 480, "width": 640},
        {"license": 4, "file_name": "COCO_train2014_000000384029.jpg", "id": 384029, "height": 429, "width": 640},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 384029, "id": 1, "caption": "A kitchen with a stove."},
        {"image_id": 57870, "id": 2, "caption": "A table in a restaurant.\n"},
        {"image_id": 384029, "id": 3, "caption": "A stove in a kitchen."},
    ],
}

KARPATHY = {
    "images": [
        {
            "filepath": f"{part}2014",
            "sentids": [2 * cocoid, 2 * cocoid + 1],
            "filename": f"COCO_{part}2014_{cocoid:012d}.jpg",
            "imgid": index,
            "split": split,
            "cocoid": cocoid,
            "sentences": [{"tokens": ["a"], "raw": f"A {split} {cocoid}.", "imgid": index, "sentid": 2 * cocoid}],
        }
        for index, (part, split, cocoid) in enumerate(
            [("val", "test", 391895), ("val", "restval", 60623), ("train", "train", 522418), ("val", "val", 184613)]
        )
    ],
    "dataset": "coco",
}

SUBTITLES = [
    {
        "vid_name": "friends_s01e03_seg02_clip_19",
        "sub": [
            {"text": " Monica : Hi,\nyou. ", "start": 0.5, "end": 1.2},
            {"text": "Joey: Hey!", "start": 2, "end": 3},
        ],
    },
    {"vid_name": "house_s01_clip_00", "sub": []},
]

TVQA = [
    {
        "qid": 122039,
        "q": " What is Joey holding?",
        "a0": "A cup.",
        "a1": "A hat",
        "a2": "A book",
        "a3": "A dog",
        "a4": "Nothing. ",
        "answer_idx": 2,
        "ts": "76.01-84.2",
        "vid_name": "friends_s01e03_seg02_clip_19",
        "show_name": "Friends",
    }
]

TVC = [
    {
        "vid_name": "friends_s01e03_seg02_clip_19",
        "duration": 61.5,
        "ts": [12.1, 20.5],
        "clip_id": 87613,
        "descs": [
            {"desc": "Joey waves.", "type": "v", "from_retrieval": True, "desc_id": 90200},
            {"desc": "They talk.", "type": "vt", "desc_id": 90201},
        ],
    },
    {"vid_name": "house_s01_clip_00", "duration": 10.0, "ts": [0, 3.5], "clip_id": 87614},
]
