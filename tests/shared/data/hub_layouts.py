"""Small Parquet files of benchmarks with the columns that repositories of the hub publish, and their types.

`card`: the types are those of the repository's own card (`dataset_info`), or of the script that made it. `read`: they
follow what lmms-eval 0.7.3 does with the columns (`lmms_eval/tasks/<task>`), since nobody here has seen the file.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # as the library `datasets` writes images
TEXT, TEXTS, INT, BYTE = pa.string(), pa.list_(pa.string()), pa.int64(), pa.int8()
ANSWERS = pa.list_(pa.struct({"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT}))
FLOATS = pa.list_(pa.float32())


def image(colour: str = "red") -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (16, 8), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


class Published(NamedTuple):
    """A file of a repository.

    Attributes:
        suite: The suite or task that it is of.
        types: Its columns with their types.
        rows: Its rows.
        expected: Id, text, answers, kinds and number of images of each example.
        source: Where its columns are from: "card" or "read", and the place in lmms-eval 0.7.3.
        name: The name of the file.
    """

    suite: str
    types: dict[str, pa.DataType]
    rows: list[dict[str, Any]]
    expected: list[tuple]
    source: str
    name: str = "validation-00000-of-00001.parquet"


DOCUMENTS = Published(
    "docvqa",
    {
        "questionId": TEXT,
        "question": TEXT,
        "question_types": TEXTS,
        "image": IMAGE,
        "docId": INT,
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": TEXTS,
        "data_split": TEXT,
    },
    [
        {
            "questionId": "49153",
            "question": "What is the actual value per 1000?",
            "question_types": ["figure/diagram", "form"],
            "image": image(),
            "docId": 14465,
            "answers": ["0.28", ".28"],
        }
    ],
    [("49153", "What is the actual value per 1000?", ("0.28", ".28"), ("figure/diagram", "form"), 1)],
    "card: lmms-lab/DocVQA, config DocVQA; docvqa/utils.py",
)
INFOGRAPHICS = Published(
    "infographicvqa",
    {
        "questionId": TEXT,
        "question": TEXT,
        "answers": TEXTS,
        "answer_type": TEXTS,
        "image": IMAGE,
        "image_url": TEXT,
        "operation/reasoning": TEXTS,
        "ocr": TEXT,
        "data_split": TEXT,
    },
    [{"questionId": "98313", "question": "Which?", "answers": ["facebook"], "answer_type": ["single span"]}],
    [("98313", "Which?", ("facebook",), ("single span",), 1)],
    "read: lmms-lab/DocVQA, config InfographicVQA; infovqa/utils.py",
)
SCENES = Published(
    "stvqa",
    {"question_id": TEXT, "question": TEXT, "image": IMAGE},
    [{"question_id": "1", "question": "What is the price?"}],
    [("1", "What is the price?", (), (), 1)],  # it has a test split alone
    "read: lmms-lab/ST-VQA; stvqa/utils.py",
)
CHARTS = Published(
    "chartqa",
    {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
    [
        {"type": "human_test", "question": "How many?", "answer": "14"},
        {"type": "augmented_test", "question": "Which year?", "answer": "[2010]"},
    ],
    [("0", "How many?", ("14",), ("human",), 1), ("1", "Which year?", ("[2010]",), ("augmented",), 1)],
    "card: chartqa/upload_chartqa.py, lmms-lab/ChartQA",
)
CHARTS_OF_M4 = Published(
    "chartqa",
    {"image": IMAGE, "query": TEXT, "label": TEXTS, "human_or_machine": INT},
    [
        {"query": "How many?", "label": ["14"], "human_or_machine": 0},
        {"query": "Which?", "label": ["a", "b"], "human_or_machine": 1},
    ],
    [("0", "How many?", ("14",), ("human",), 1), ("1", "Which?", ("a", "b"), ("augmented",), 1)],
    "card: HuggingFaceM4/ChartQA, which lmms-eval does not read",
)
PHOTOGRAPHS = Published(
    "textvqa",
    {
        "image_id": TEXT,
        "question_id": pa.int32(),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": IMAGE,
        "image_width": pa.int32(),
        "image_height": pa.int32(),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    },
    [
        {"question_id": 34602, "question": "what brand?", "answers": ["Dakota"] * 6 + ["nous"] * 4},
        {"question_id": 34603, "question": "what text?", "answers": [""] * 10},  # of the test split
    ],
    [("34602", "what brand?", ("dakota", "nous"), (), 1), ("34603", "what text?", (), (), 1)],
    "card: lmms-lab/textvqa; textvqa/utils.py",
)
RECOGNITION = Published(
    "ocrbench",
    {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": IMAGE},
    [
        {
            "dataset": "HME100k",
            "question": "Write it.",
            "question_type": "Handwritten Mathematical Expression Recognition",
            "answer": ["x ^ { 2 }"],
        }
    ],
    [("0", "Write it.", ("x ^ { 2 }",), ("Handwritten Mathematical Expression Recognition", "HME100k"), 1)],
    "card: echo840/OCRBench; ocrbench/upload_ocrbench.py",
)
LESSON_TEXTS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
LESSONS = Published(
    "scienceqa",
    {"image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": BYTE} | dict.fromkeys(LESSON_TEXTS, TEXT),
    [
        {"question": "Which is north?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "s", "grade": "g"},
        {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "Read.", "image": None},
    ],
    [
        ("0", "Which is north?\nA. a\nB. b", ("B",), ("s", "image", "g"), 1),
        ("1", "Read.\nWhich?\nA. a\nB. b", ("A",), ("", "text", ""), 0),
    ],
    "card: lmms-lab/ScienceQA, derek-thomas/ScienceQA; scienceqa/utils.py",
)
QUESTIONS = Published(
    "vqa",
    {
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": ANSWERS,
        "image_id": INT,
        "answer_type": TEXT,
        "question_id": INT,
        "question": TEXT,
        "image": IMAGE,
    },
    [
        {
            "question_type": "what is",
            "answers": [{"answer": "net", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
            "answer_type": "other",
            "question_id": 262148000,
            "question": "What is it?",
        },
        {"question_id": 262148001, "question": "Who?", "answers": None},
    ],
    [("262148000", "What is it?", ("net",), ("other", "what is"), 1), ("262148001", "Who?", (), (), 1)],
    "card: lmms-lab/VQAv2; vqav2/utils.py",
)
KNOWLEDGE = Published(
    "vqa",
    {
        "question_id": TEXT,
        "image": IMAGE,
        "question": TEXT,
        "answers": TEXTS,
        "question_type": TEXT,
        "answer_type": TEXT,
    },
    [{"question_id": "2971475", "question": "What sport?", "answers": ["race"] * 4 + ["motocross"] * 6}],
    [("2971475", "What sport?", ("motocross", "race"), (), 1)],
    "card: lmms-lab/OK-VQA; ok_vqa/utils.py",
)
POLLING = Published(
    "pope",
    dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), TEXT)
    | {"image": IMAGE, "category": TEXT},
    [
        {"question_id": "1", "question": "Is there a dog?", "answer": "yes", "category": "adversarial"},
        {"question_id": "1", "question": "Is there a cat?", "answer": "no", "category": "random"},
    ],
    [
        ("adversarial_1", "Is there a dog?", ("yes",), ("adversarial",), 1),
        ("random_1", "Is there a cat?", ("no",), ("random",), 1),
    ],
    "card: lmms-lab/POPE (of a copy); pope/utils.py",
)
AOKVQA_TYPES = {
    "image": IMAGE,
    "question_id": TEXT,
    "question": TEXT,
    "choices": TEXTS,
    "correct_choice_idx": BYTE,
    "direct_answers": TEXT,
    "difficult_direct_answer": pa.bool_(),
    "rationales": TEXTS,
}
AOKVQA_ROWS = [
    {
        "question_id": "22jbM",
        "question": "What is it?",
        "choices": ["food", "cigarette"],
        "correct_choice_idx": 1,
        "direct_answers": repr(["cigarette"] * 9 + ["it's a stick"]),
        "difficult_direct_answer": False,
    },
    {
        "question_id": "2Xxyz",
        "question": "How many?",
        "choices": ["1", "2"],
        "correct_choice_idx": None,
        "direct_answers": None,
        "difficult_direct_answer": True,
    },
]
AOKVQA = Published(
    "aokvqa",
    AOKVQA_TYPES,
    AOKVQA_ROWS,
    [
        ("22jbM", "What is it?\nA. food\nB. cigarette", ("B",), (), 1),
        ("2Xxyz", "How many?\nA. 1\nB. 2", (), (), 1),
    ],
    "read: HuggingFaceM4/A-OKVQA, which lmms-eval does not read",
)
AOKVQA_DIRECT = Published(
    "aokvqa_direct",
    AOKVQA_TYPES,
    AOKVQA_ROWS,
    [("22jbM", "What is it?", ("cigarette", "it's stick"), (), 1)],
    AOKVQA.source,
)
MMBENCH_TEXTS = ("question", "hint", "answer", "A", "B", "C", "D", "category")
MMBENCH = Published(
    "mmbench",
    {"index": INT}
    | dict.fromkeys(MMBENCH_TEXTS, TEXT)
    | {"image": IMAGE}
    | dict.fromkeys(("source", "L2-category", "comment", "split"), TEXT),
    [
        {
            "index": 241,
            "question": "Which?",
            "hint": "nan",
            "answer": "B",
            "A": "x",
            "B": "y",
            "C": "nan",
            "D": "nan",
            "category": "logic",
            "split": "dev",
        }
    ],
    [("241", "Which?\nA. x\nB. y", ("B",), ("logic",), 1)],
    "card: lmms-lab/MMBench, configs cn and en; mmbench/en_utils.py",
)
SEEDBENCH = Published(
    "choice",
    dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type", "question"), TEXT)
    | {"question_id": TEXT, "question_type_id": INT, "image": pa.list_(IMAGE), "segment": pa.list_(INT)},
    [
        {
            "question_id": "101",
            "question": "Where?",
            "choice_a": "a",
            "choice_b": "b",
            "choice_c": "c",
            "choice_d": "d",
            "answer": "C",
            "data_type": "image",
            "image": [image("red"), image("blue")],
        }
    ],
    [("101", "Where?\nA. a\nB. b\nC. c\nD. d", ("C",), ("image",), 2)],
    "read: lmms-lab/SEED-Bench; seedbench/utils.py",
)
REF_TYPES = {
    "question_id": TEXT,
    "image": IMAGE,
    "question": TEXT,
    "answer": TEXTS,
    "segmentation": FLOATS,
    "bbox": FLOATS,
    "iscrowd": BYTE,
    "file_name": TEXT,
}
REFCOCO = Published(
    "refcoco",
    REF_TYPES,
    [
        {"question_id": "8", "answer": ["the lady", "lady in blue"], "bbox": [2.0, 1.0, 4.0, 3.5], "question": "Q"},
        {"question_id": "9", "answer": ["the man"], "bbox": [0.0, 0.0, 16.0, 8.0], "question": "Q"},
    ],
    [
        ("8", "the lady", ("[0.125, 0.125, 0.375, 0.562]",), (), 1),
        ("8 (row 1)", "lady in blue", ("[0.125, 0.125, 0.375, 0.562]",), (), 1),
        ("9", "the man", ("[0.000, 0.000, 1.000, 1.000]",), (), 1),
    ],
    "card: lmms-lab/RefCOCO; refcoco/utils_rec.py",
)
REFCOCOG = REFCOCO._replace(
    source="card: lmms-lab/RefCOCOg and RefCOCOplus; refcocog/utils_rec.py", name="test.parquet"
)
DIAGRAMS = Published(
    "ai2d",
    {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": IMAGE},
    [{"question": "Which is a planet?", "options": ["a", "b", "c"], "answer": "2"}],
    [("0", "Which is a planet?\nA. a\nB. b\nC. c", ("C",), (), 1)],
    "card: ai2d/upload_ai2d.py, lmms-lab/ai2d",
)
GQA = Published(
    "gqa",
    dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT)
    | {"isBalanced": pa.bool_(), "types": pa.struct(dict.fromkeys(("detailed", "semantic", "structural"), TEXT))},
    [
        {
            "id": "201307251",
            "imageId": "n161313",
            "question": "Is it sunny?",
            "answer": "yes",
            "types": {"detailed": "d", "semantic": "global", "structural": "verify"},
        }
    ],
    [("201307251", "Is it sunny?", ("yes",), ("verify", "global"), 1)],
    "read: lmms-lab/GQA, config testdev_balanced_instructions; gqa/utils.py",
)
MEDICINE = Published(
    "short_answers",
    {"image": IMAGE, "question": TEXT, "answer": TEXT},
    [{"question": "is there a fracture?", "answer": "no"}],
    [("0", "is there a fracture?", ("no",), (), 1)],
    "read: flaviagiammarino/vqa-rad, which lmms-eval does not read",
)
TEXTCAPS = Published(
    "caption",
    {"image_id": TEXT, "image": IMAGE, "question": TEXT, "caption_str": TEXTS, "reference_strs": TEXTS},
    [{"image_id": "a1", "question": "Describe.", "caption_str": ["A can.", "A red can."], "reference_strs": ["x"]}],
    [("a1", "", ("A can.", "A red can."), (), 1)],
    "read: lmms-lab/TextCaps; textcaps/utils.py",
)
NOCAPS = TEXTCAPS._replace(
    types={"image": IMAGE, "image_id": INT, "annotations_captions": TEXTS},
    rows=[{"image_id": 7, "annotations_captions": ["A can.", "A red can."]}],
    expected=[("7", "", ("A can.", "A red can."), (), 1)],
    source="read: lmms-lab/NoCaps; nocaps/utils.py",
)
FLICKR = TEXTCAPS._replace(
    types={"image": IMAGE, "caption": TEXTS, "sentids": TEXTS, "img_id": TEXT, "filename": TEXT},
    rows=[{"img_id": "5", "caption": ["A can.", "A red can."]}],
    expected=[("5", "", ("A can.", "A red can."), (), 1)],
    source="read: lmms-lab/flickr30k; flickr30k/utils.py",
)
COCO = TEXTCAPS._replace(
    types={"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXTS, "id": INT, "file_name": TEXT},
    rows=[{"question_id": "COCO_1.jpg", "question": "Describe.", "answer": ["A can.", "A red can."]}],
    expected=[("COCO_1.jpg", "", ("A can.", "A red can."), (), 1)],
    source="read: lmms-lab/COCO-Caption; coco_cap/utils.py",
)
LAYOUTS = {name.lower(): found for name, found in [*globals().items()] if isinstance(found, Published)}


def write(published: Published, folder: Path) -> Path:
    """The file, with an image in each row that does not say otherwise."""
    shown = {"image": image()} if published.types.get("image") == IMAGE else {}
    rows = [shown | row for row in published.rows]
    path = folder / published.name
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(published.types)), path)
    return path
