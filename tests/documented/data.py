"""Small data in the documented layouts: files of every format that configs name, images and features."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import stem
from tests.shared.data.text_rows import write_commonsense
from tests.shared.data.vl_files import vqa_annotation, write_json, write_lines
from tests.shared.data.vlm_rows import save_noise

NUM_ROWS = 24  # of a file
ANSWERS = ("red", "yes", "2")


def write_source(source: SourceConfig) -> None:
    """Writes the files of a source, relative to the current directory, as far as they are missing; and its images."""
    file = Path(source.file)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[source.format](file)
    if source.annotations and not Path(source.annotations).exists():
        karpathy = source.format == "vqa_karpathy"  # its splits share a file
        files = [file.with_name(f"karpathy_{split}.json") for split in ("val", "test")] if karpathy else [file]
        rows = [_annotation(each, number) for each in files for number in range(NUM_ROWS)]
        write_json(Path(source.annotations), {"annotations": rows})
    if source.subtitles and not Path(source.subtitles).exists():
        rows = [{"vid_name": _clip(n), "sub": [{"text": "Hi, you."}]} for n in range(NUM_ROWS // 2)]
        write_lines(Path(source.subtitles), rows)


def write_texts(path: Path) -> None:
    """Writes questions without images, if they are missing."""
    if not path.exists():
        rows = [{"instruction": f"What is {number} + 1?", "output": str(number + 1)} for number in range(30)]
        write_json(path, rows)


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Writes images of noise, as far as they are missing."""
    for number, name in enumerate(names):
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            assert path.resolve().is_relative_to(Path.cwd())  # not through a link to the samples
            save_noise(path, number, 48, 64)


def write_features(folder: Path, images: Iterable[str], dim: int) -> None:
    """Writes random features, a file of 9 tokens for each image or clip."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(images):
        values = np.random.default_rng(number).normal(size=(9, dim)).astype(np.float32)
        np.savez(folder / f"{stem(name)}.npz", features=values)


def write_captioned(folder: Path) -> None:
    """Writes twenty images, half of them with captions in `metadata.jsonl`, and half in text files."""
    names = [f"{number:02}.png" for number in range(20)]
    write_images(folder, names)
    rows = [{"file_name": name, "text": f"a TOK icon of thing {name[:2]}"} for name in names[:10]]
    write_lines(folder / "metadata.jsonl", rows)
    for name in names[10:]:
        (folder / name).with_suffix(".txt").write_text(f"a TOK icon of thing {name[:2]}")


def write_pairs_of_parquet(folder: Path) -> None:
    """Writes a file of a data set of edits, as the hub has them."""
    write_images(folder, ["noise.png"])
    image = {"bytes": (folder / "noise.png").read_bytes(), "path": None}
    columns = {"source_image": [image] * 4, "edit_prompt": ["make it red"] * 4, "edited_image": [image] * 4}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")


# --- files by format -------------------------------------------------------------------------------------------------


def _split(file: str | Path) -> str:
    """COCO's split, whose images a file is about."""
    return "train" if "train" in Path(file).name else "val"


def _coco_id(file: str | Path, number: int) -> int:
    """The image of a question or caption; splits of one task have different images."""
    name = Path(file).name
    start = 100 if "train" in name else 300 if "test" in name else 200
    return start + number


def _coco_name(file: str | Path, number: int) -> str:
    return f"COCO_{_split(file)}2014_{_coco_id(file, number):012d}"


def _clip(number: int) -> str:
    return f"clip_{number:02}"


def _annotation(questions: str | Path, number: int) -> dict[str, Any]:
    about = {"question_id": _question_id(questions, number), "image_id": _coco_id(questions, number)}
    return vqa_annotation(number, (ANSWERS[number % 3],) * 10, **about)


def _question_id(file: str | Path, number: int) -> int:
    return 1000 * _coco_id(file, 0) + number


def _chat(file: Path) -> None:
    """Conversations in LLaVA's shape, two about each image."""
    rows = [
        {
            "id": str(number),
            "image": f"{number // 2}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": ANSWERS[number % 3]},
            ],
        }
        for number in range(NUM_ROWS)
    ]
    write_json(file, rows)


def _preferences(file: Path) -> None:
    """Pairs of answers in TRL's shape, two about each image."""
    rows = [
        {
            "images": [f"{number // 2}.png"],
            "prompt": "What is it?",
            "chosen": ANSWERS[number % 3],
            "rejected": ANSWERS[(number + 1) % 3],
        }
        for number in range(NUM_ROWS)
    ]
    write_lines(file, rows)


def _vqa_v2(file: Path) -> None:
    rows = [
        {"image_id": _coco_id(file, n), "question": f"What is {n}?", "question_id": _question_id(file, n)}
        for n in range(NUM_ROWS)
    ]
    write_json(file, {"questions": rows, "data_subtype": f"{_split(file)}2014"})


def _vqa_karpathy(file: Path) -> None:
    rows = [
        {
            "question_id": _question_id(file, number),
            "img_id": _coco_name(file, number),
            "sent": f"What is {number}?",
            "label": {ANSWERS[number % 3]: 1.0},
        }
        for number in range(NUM_ROWS)
    ]
    write_json(file, rows)


def _gqa(file: Path) -> None:
    start = _coco_id(file, 0)
    rows = {
        f"{start}{number:03}": {
            "question": "Is it dark?",
            "imageId": f"{2_000_000 + start + number // 2}",
            "answer": ("yes", "no")[number % 2],
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        }
        for number in range(NUM_ROWS)
    }
    write_json(file, rows)


def _nlvr2(file: Path) -> None:
    rows = [
        {
            "identifier": f"{file.stem}-{number // 2}-0-{number % 2}",
            "sentence": "There are no dogs.",
            "label": ("True", "False")[number % 2],
        }
        for number in range(NUM_ROWS)
    ]
    write_lines(file, rows)


def _coco_captions(file: Path) -> None:
    numbers = range(NUM_ROWS)
    images = [{"file_name": f"{_coco_name(file, n)}.jpg", "id": _coco_id(file, n)} for n in numbers]
    captions = [{"image_id": image["id"], "id": n, "caption": "A red bus."} for n, image in enumerate(images)]
    write_json(file, {"images": images, "annotations": captions})


def _coco_karpathy(file: Path) -> None:
    rows = [
        {
            "filename": f"{_coco_name(split, number)}.jpg",
            "cocoid": _coco_id(split, number),
            "split": split,
            "sentences": [{"raw": "A red bus."}, {"raw": "A bus."}],
        }
        for split in ("train", "val", "test")
        for number in range(NUM_ROWS)
    ]
    write_json(file, {"images": rows})


def _video_qa(file: Path) -> None:
    """Questions about clips, which a test split has without answers."""
    answer = {} if "test" in file.name else {"answer_idx": 1}
    choices = {f"a{choice}": f"thing {choice}" for choice in range(4)}
    rows = [
        {"qid": number, "q": "What is it?", "ts": "1.0-2.5", "vid_name": _clip(number // 2), **choices, **answer}
        for number in range(NUM_ROWS)
    ]
    write_lines(file, rows)


def _video_captions(file: Path) -> None:
    """Clips with descriptions, which a test split lacks."""
    answer = {} if "test" in file.name else {"descs": [{"desc": "They wave.", "type": "v"}, {"desc": "They talk."}]}
    rows = [{"clip_id": number, "vid_name": _clip(number), "ts": [1, 2.5], **answer} for number in range(NUM_ROWS // 2)]
    write_lines(file, rows)


def _commonsense(file: Path) -> None:
    write_commonsense(file, NUM_ROWS)


def _docvqa(file: Path) -> None:
    rows = [
        {"questionId": number, "question": "What is it?", "image": f"documents/{number // 2}.png", "docId": number // 4}
        | {"answers": [ANSWERS[number % 3]]}
        for number in range(NUM_ROWS)
    ]
    write_json(file, {"data": rows})


WRITERS: dict[str, Callable[[Path], None]] = {
    "chat": _chat,
    "preferences": _preferences,
    "vqa_v2": _vqa_v2,
    "vqa_karpathy": _vqa_karpathy,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "coco_captions": _coco_captions,
    "coco_karpathy": _coco_karpathy,
    "video_qa": _video_qa,
    "video_captions": _video_captions,
    "commonsense": _commonsense,
    "docvqa": _docvqa,
}
