"""Measures how long it takes until large files are ready for training, and the memory that this needs.

    python -m tests.benchmarks.bench_vl_data [vqa|chat] [--rows N] [--repeats N] [--output FOLDER]

The files are made in a temporary folder, and their images are empty files: 440,000 questions in the official layout of
VQA v2, six about an image; or 600,000 conversations as large as LLaVA's own (about 1.5 kB and ten turns), two about an
image. Each measurement runs in a separate process, from its start to the first batch:
    first: the files are read, checked, and saved as a table.
    again: the table exists already.
    shuffled (vqa): as first, but the annotations are in another order than the questions, so half of them are kept in
        memory.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.results_table import write_rows

ABOUT = {"info": {"year": 2017}, "license": {"name": "none"}, "data_subtype": "train2014", "data_type": "mscoco"}
FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
PER_IMAGE = 6
PER_CHAT_IMAGE = 2
TEXT_ONLY = 16  # one conversation of so many has no image


@dataclass(frozen=True)
class Files:
    """Large files of one format.

    Attributes:
        name: That of the CSV file.
        rows: What a row is called, and how many there are by default.
        cases: What is measured.
        batch: Rows in a batch.
        format: That of the config.
        source: Keys of the config, with the names of the files.
        write: Writes the files and their images to a folder; returns the size of the files in MB.
        is_right: Whether an example was read as it should.
    """

    name: str
    rows: tuple[str, int]
    cases: tuple[str, ...]
    batch: int
    format: str
    source: dict[str, str]
    write: Callable[[Path, int, str], int]
    is_right: Callable[[Any], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=tuple(FILES), default="vqa")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "epyc_2_cores")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.task, arguments.measure)
        return
    files = FILES[arguments.task]
    with tempfile.TemporaryDirectory() as folder:
        rows = run_cases(arguments.task, Path(folder), arguments.rows or files.rows[1], arguments.repeats)
    write_rows(arguments.output / files.name, rows)
    print((arguments.output / files.name).read_text())


def run_cases(task: str, folder: Path, num_rows: int, repeats: int) -> list[dict[str, object]]:
    files, rows = FILES[task], []
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    for case in files.cases:
        if case != "again":
            megabytes = files.write(folder, num_rows, case)
        found = []
        for _ in range(repeats):
            if case != "again":
                shutil.rmtree(folder / "tables", ignore_errors=True)
            start = time.perf_counter()
            command = [sys.executable, "-m", "tests.benchmarks.bench_vl_data", task, "--measure", str(folder)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append((time.perf_counter() - start, float(result.stdout)))
            print(f"{case}: {found[-1][0]:.1f} s, {found[-1][1]:.0f} MB", flush=True)
        for index, name in enumerate(("seconds to the first batch", "peak memory in MB")):
            values = [round(pair[index], 2) for pair in found]
            figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            about = {"case": case, files.rows[0]: num_rows, "megabytes of JSON": megabytes, "measure": name}
            rows.append(about | figures | {"repeats": repeats, "machine": machine})
    return rows


def measure(task: str, folder: Path) -> None:
    """Reads data up to the first batch, and prints the peak resident memory in MB."""
    from dora_mm.config.vl_data import SourceConfig
    from dora_mm.data.vl.mixing import TaskBatches
    from dora_mm.data.vl.tables import open_table

    files = FILES[task]
    paths = {key: str(folder / name) for key, name in files.source.items()}
    source = SourceConfig.model_validate({"format": files.format, "images": str(folder / "images"), **paths})
    table = open_table(source, folder / "tables", on_bad_data="stop")
    found, indices = TaskBatches({task: len(table)}, {task: files.batch}, seed=0)(0)
    batch = [table[index] for index in indices]
    assert found == task
    assert len(batch) == files.batch
    assert all(map(files.is_right, batch))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


# --- VQA v2 ----------------------------------------------------------------------------------------------------------

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


def write_questions(folder: Path, num_questions: int, case: str) -> int:
    """Writes the two files and their images; returns the size of the two files in MB."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    numbers = list(range(num_questions))
    write_list(folder / QUESTIONS, "questions", (question(number, rng, words) for number in numbers))
    if case == "shuffled":
        rng.shuffle(numbers)
    write_list(folder / ANNOTATIONS, "annotations", (annotation(number, rng, words) for number in numbers))
    (folder / "images").mkdir(exist_ok=True)
    for number in range(0, num_questions, PER_IMAGE):
        (folder / "images" / f"COCO_train2014_{image_id(number):012d}.jpg").touch()
    return round(sum((folder / name).stat().st_size for name in (QUESTIONS, ANNOTATIONS)) / 1e6)


def write_list(path: Path, key: str, rows) -> None:
    with path.open("w") as file:
        file.write(json.dumps(ABOUT)[:-1] + f', "{key}": [')
        for index, row in enumerate(rows):
            file.write((", " if index else "") + json.dumps(row))
        file.write("]}")


def image_id(number: int) -> int:
    return 9 + number // PER_IMAGE * 7


def question(number: int, rng: random.Random, words: list[str]) -> dict:
    text = f"what is the {' '.join(rng.choices(words, k=4))}?"
    return {"image_id": image_id(number), "question": text, "question_id": 1000 * image_id(number) + number % PER_IMAGE}


def annotation(number: int, rng: random.Random, words: list[str]) -> dict:
    """Ten answers out of three; the question type decides whether they are words, numbers, or yes and no."""
    kind = ("yes/no", "number", "other")[number % 3]
    pool = {"yes/no": ["yes", "no", "maybe"], "number": ["1", "two", "3"], "other": rng.choices(words, k=3)}[kind]
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": index}
        for index, answer in enumerate(rng.choices(pool, k=10), 1)
    ]
    return {
        "question_type": "what is the",
        "multiple_choice_answer": answers[0]["answer"],
        "answers": answers,
        "image_id": image_id(number),
        "answer_type": kind,
        "question_id": 1000 * image_id(number) + number % PER_IMAGE,
    }


# --- conversations ---------------------------------------------------------------------------------------------------

CHAT = "mix.json"


def write_conversations(folder: Path, num_rows: int, case: str) -> int:
    """Writes the file and its images; returns the size of the file in MB."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    questions = [f"{' '.join(rng.choices(words, k=8))}?" for _ in range(20_000)]
    answers = [f"{' '.join(rng.choices(words, k=rng.choice((1, 3, 12, 60))))}." for _ in range(20_000)]
    for name in FOLDERS:
        (folder / "images" / name).mkdir(parents=True)
    path = folder / CHAT
    with path.open("w") as file:
        for number in range(num_rows):
            file.write("[" if number == 0 else ", ")
            file.write(json.dumps(conversation(number, rng, questions, answers)))
        file.write("]")
    for number in range(0, num_rows, PER_CHAT_IMAGE):
        (folder / "images" / image_name(number)).touch()
    return round(path.stat().st_size / 1e6)


def image_name(number: int) -> str:
    index = number // PER_CHAT_IMAGE
    return f"{FOLDERS[index % len(FOLDERS)]}/{index:012d}.jpg"


def conversation(number: int, rng: random.Random, questions: list[str], answers: list[str]) -> dict:
    """A conversation of one to nine rounds; as in LLaVA's file, rows about one image share an id."""
    turns = []
    for _ in range(rng.randint(1, 9)):
        turns.append({"from": "human", "value": rng.choice(questions)})
        turns.append({"from": "gpt", "value": rng.choice(answers)})
    if number % TEXT_ONLY == TEXT_ONLY - 1:
        return {"id": f"text{number}", "model": "", "conversations": turns}
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"{number // PER_CHAT_IMAGE:012d}", "image": image_name(number), "conversations": turns}


FILES = {
    "vqa": Files(
        name="vl_data.csv",
        rows=("questions", 440_000),
        cases=("first", "again", "shuffled"),
        batch=300,
        format="vqa_v2",
        source={"file": QUESTIONS, "annotations": ANNOTATIONS},
        write=write_questions,
        is_right=lambda example: len(example.raw_answers) == 10,
    ),
    "chat": Files(
        name="chat_data.csv",
        rows=("rows", 600_000),
        cases=("first", "again"),
        batch=32,
        format="chat",
        source={"file": CHAT},
        write=write_conversations,
        is_right=lambda example: example.turns[-1].loss,
    ),
}

if __name__ == "__main__":
    main()
