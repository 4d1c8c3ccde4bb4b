"""Small files of suites in the layouts in which they are published, and sources that read them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from tests.shared.data import chats
from tests.shared.data import vl_files as files

DOCVQA = {
    "questionId": 337,
    "question": "what is the date mentioned in this letter?",
    "question_types": ["handwritten", "form"],
    "image": "documents/xnbl0037_1.png",
    "docId": 279,
    "ucsf_document_id": "xnbl0037",
    "ucsf_document_page_no": "1",
    "answers": ["1/8/93", "1/8/1993"],
    "data_split": "train",
}
INFOGRAPHIC = {
    "questionId": 65718,
    "question": "Which platform?",
    "image_local_name": "30021.jpeg",
    "image_url": "https://example.org/a.jpeg",
    "ocr_output_file": "30021.json",
    "answers": ["facebook"],
    "answer_type": ["single span"],
    "evidence": ["textual"],
    "operation/reasoning": [],
    "data_split": "val",
}
STVQA = {
    "question": "What is the price?",
    "image_classes": ["bar"],
    "question_id": 14135,
    "file_path": "coco-text/COCO_train2014_000000000042.jpg",
    "file_name": "COCO_train2014_000000000042.jpg",
    "answers": ["2.99", "$2.99"],
    "set_name": "train",
    "dataset": "coco-text",
}
TEXTVQA = {
    "question": "what is the brand of this camera?",
    "image_id": "003a8ae2ef43b901",
    "image_classes": ["Cassette deck"],
    "flickr_original_url": "https://example.org/a.jpg",
    "image_width": 1024,
    "image_height": 664,
    "answers": ["Dakota"] * 4 + ["nous les gosses"] * 6,
    "question_id": 34602,
    "set_name": "val",
}
OCRBENCH = [
    {
        "dataset_name": "IIIT5K",
        "id": 0,
        "question": "what is written in the image?",
        "answers": ["CENTRE"],
        "type": "Regular Text Recognition",
        "image_path": "IIIT5K_Words/0.png",
    },
    {
        "dataset_name": "HME100k",
        "question": "Please write out the expression.",
        "answers": "x ^ { 2 }",
        "type": "Handwritten Mathematical Expression Recognition",
        "image_path": "HME/1.png",
    },
]
CHARTQA = [{"imgname": "41699051005347.png", "query": "How many food items?", "label": "14"}]
PLOTQA = {
    "image_index": 7,
    "qid": "0",
    "question_string": "What is the value?",
    "question_id": 11,
    "template": "data_retrieval",
    "answer": 28.9,
    "answer_bbox": [],
    "type": "bar",
}
POPE = [{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard?", "label": "yes"}]
SCIENCEQA = {
    "1": {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "split": "test",
        "lecture": "Maps.",
        "solution": "",
    },
    "2": {"question": "Which is right?", "choices": ["a", "b"], "hint": "Read.", "image": None, "split": "train"},
}
AOKVQA = {
    "split": "val",
    "image_id": 461751,
    "question_id": "22jbM6gDxdaMaunuzgrsBB",
    "question": "What is in the motorcyclist's mouth?",
    "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
    "correct_choice_idx": 3,
    "direct_answers": ["cigarette"] * 9 + ["Stick"],
    "difficult_direct_answer": False,
    "rationales": ["He is smoking."],
}
REFCOCO = {
    "image": "train2014/COCO_train2014_000000581857.jpg",
    "sent": "the lady with the blue shirt",
    "bbox": [103.0, 299.0, 238.0, 477.0],
    "height": 640,
    "width": 428,
}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def image(colour: str = "red") -> dict[str, Any]:
    return {"bytes": chats.image(colour), "path": None}


def mmmu(folder: Path) -> Path:
    row = {
        "id": "validation_Art_Theory_1",
        "question": "What is <image 1>?",
        "options": "['a fresco', \"it's an oil\"]",
        "explanation": "",
        "image_1": image(),
        "image_2": None,
        "answer": "B",
        "question_type": "multiple-choice",
    }
    words = {"id": "test_Math_2", "question": "How many?", "options": "[]", "answer": "['4', 'four']"}
    unknown = {"id": "test_Math_3", "question": "How many?", "options": "[]", "answer": "?"}
    rows = [row, row | words | {"image_2": image("blue")}, row | unknown]
    return parquet(folder / "validation-00000-of-00001.parquet", rows)


def ai2d(folder: Path) -> Path:
    rows = [{"question": "Which is a planet?", "options": ["a", "b", "c"], "answer": "2", "image": image()}]
    return parquet(folder / "test.parquet", rows)


def _data(row: dict[str, Any], name: str) -> Callable[[Path], Path]:
    content = {"dataset_name": "it", "dataset_version": "1.0", "data": [row]}
    return lambda folder: files.write_json(folder / name, content)


MAKERS: dict[str, tuple[str, Callable[[Path], Path]]] = {  # by suite: a format, and what writes its file
    "docvqa": ("docvqa", _data(DOCVQA, "val_v1.0_withQT.json")),
    "infographicvqa": ("docvqa", _data(INFOGRAPHIC, "infographicsVQA_val_v1.0.json")),
    "stvqa": ("stvqa", _data(STVQA, "train_task_3.json")),
    "textvqa": ("textvqa", _data(TEXTVQA, "TextVQA_0.5.1_val.json")),
    "ocrbench": ("ocrbench", lambda folder: files.write_json(folder / "OCRBench.json", OCRBENCH)),
    "chartqa": ("chartqa", lambda folder: files.write_json(folder / "test_human.json", CHARTQA)),
    "plotqa": ("plotqa", lambda folder: files.write_json(folder / "qa_pairs_V2.json", {"qa_pairs": [PLOTQA]})),
    "mmmu": ("mmmu", mmmu),
    "scienceqa": ("scienceqa", lambda folder: files.write_json(folder / "problems.json", SCIENCEQA)),
    "ai2d": ("ai2d", ai2d),
    "aokvqa": ("aokvqa", lambda folder: files.write_json(folder / "aokvqa_v1p0_val.json", [AOKVQA])),
    "aokvqa_direct": ("aokvqa_direct", lambda folder: files.write_json(folder / "aokvqa_v1p0_val.json", [AOKVQA])),
    "pope": ("pope", lambda folder: files.write_lines(folder / "coco_pope_adversarial.json", POPE)),
    "refcoco": ("refcoco", lambda folder: files.write_lines(folder / "refcoco_val.jsonl", [REFCOCO])),
}


REFS = [
    {
        "ann_id": 8,
        "category_id": 1,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "image_id": 581857,
        "ref_id": number,
        "sent_ids": [2 * number, 2 * number + 1],
        "sentences": [
            {"raw": text.upper(), "sent": text, "sent_id": 2 * number + place, "tokens": text.split()}
            for place, text in enumerate(("the lady", "lady with the blue shirt"))
        ],
        "split": split,
    }
    for number, split in enumerate(("train", "testA"))
]
INSTANCES = {
    "annotations": [{"area": 1.0, "bbox": [103.0, 299.0, 135.0, 178.0], "category_id": 1, "id": 8, "image_id": 581857}],
    "images": [
        {"file_name": "COCO_train2014_000000581857.jpg", "height": 640, "id": 581857, "license": 1, "width": 428}
    ],
}


def ai2d_questions(folder: Path, **settings: Any) -> SourceConfig:
    """A source of two diagrams of AI2D in the published folders: a question about texts, and one about letters."""
    for name in ("images", "questions", "annotations"):
        (folder / name).mkdir(exist_ok=True)
    for number, is_lettered in ((3, False), (10, True)):
        image = f"{number}.png"
        Image.new("RGB", (200, 100), "red").save(folder / "images" / image)
        about = {"abcLabel": is_lettered, "answerTexts": ["a", "b", "C", "d"], "correctAnswer": 2}
        questions = {"Which one is it?": about | {"questionId": f"{image}-0"}}
        files.write_json(folder / "questions" / f"{image}.json", {"imageName": image, "questions": questions})
        label = {"labelId": "T0", "rectangle": [[20, 30], [80, 70]], "replacementText": "C", "value": "sun"}
        content = {"text": {"T0": label}, "arrows": {}, "blobs": {}, "imageConsts": {}, "relationships": {}}
        files.write_json(folder / "annotations" / f"{image}.json", content)
    files.write_text(folder / "ai2d_test_ids.csv", "10\n11\n")
    return SourceConfig(format="ai2d_questions", file=str(folder / "questions"), **settings)


def refs(folder: Path, content: Any = REFS, protocol: int = 0) -> SourceConfig:
    """A source of the official files of RefCOCO, which Python 2 wrote by protocol 0."""
    path = folder / "refs(unc).p"
    path.write_bytes(pickle.dumps(content, protocol))
    instances = files.write_json(folder / "instances.json", INSTANCES)
    return SourceConfig(format="refcoco_refs", file=str(path), annotations=str(instances))


def source(suite: str, folder: Path, **settings: Any) -> SourceConfig:
    """A source of a suite's official file, by default of one row to three."""
    form, make = MAKERS[suite]
    return SourceConfig(format=form, file=str(make(folder)), **settings)
