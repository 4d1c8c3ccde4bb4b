"""Measures how long it takes until 440,000 questions are ready for training, and the memory that this needs.

    python tests/benchmarks/bench_vl_data.py [--questions N] [--repeats N] [--output FOLDER]

Files in the official layout of VQA v2 are made in a temporary folder, with an image (an empty file) for every six
questions. Each measurement runs in a separate process, from its start to the first batch of 300 examples:
    first: the files are read, checked, and saved as a table.
    again: the table exists already.
    shuffled: as first, but the annotations are in another order than the questions, so half of them are kept in memory.
"""

import argparse
import csv
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
from pathlib import Path

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
PER_IMAGE = 6
ABOUT = {"info": {"year": 2017}, "license": {"name": "none"}, "data_subtype": "train2014", "data_type": "mscoco"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=440_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "epyc_2_cores")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = run_cases(Path(folder), arguments.questions, arguments.repeats)
    with (arguments.output / "vl_data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print((arguments.output / "vl_data.csv").read_text())


def run_cases(folder: Path, num_questions: int, repeats: int) -> list[dict[str, object]]:
    rows = []
    for case in ("first", "again", "shuffled"):
        if case != "again":
            megabytes = write_files(folder, num_questions, shuffled=case == "shuffled")
        found = []
        for _ in range(repeats):
            if case != "again":
                shutil.rmtree(folder / "tables", ignore_errors=True)
            start = time.perf_counter()
            command = [sys.executable, __file__, "--measure", str(folder)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append((time.perf_counter() - start, float(result.stdout)))
            print(f"{case}: {found[-1][0]:.1f} s, {found[-1][1]:.0f} MB", flush=True)
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
        )
        for index, name in enumerate(("seconds to the first batch", "peak memory in MB")):
            values = [round(pair[index], 2) for pair in found]
            figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            about = {"case": case, "questions": num_questions, "megabytes of JSON": megabytes, "measure": name}
            rows.append(about | figures | {"repeats": repeats, "machine": machine})
    return rows


def measure(folder: Path) -> None:
    """Reads data up to the first batch, and prints the peak resident memory in MB."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from dora_mm.config.vl import SourceConfig
    from dora_mm.data.vl.mixing import TaskBatches
    from dora_mm.data.vl.tables import open_table

    source = SourceConfig(
        format="vqa_v2",
        file=str(folder / QUESTIONS),
        annotations=str(folder / ANNOTATIONS),
        images=str(folder / "images"),
    )
    table = open_table(source, folder / "tables", on_bad_data="stop")
    task, indices = TaskBatches({"vqa": len(table)}, {"vqa": 300}, seed=0)(0)
    batch = [table[index] for index in indices]
    assert task == "vqa"
    assert len(batch) == 300
    assert all(len(example.raw_answers) == 10 for example in batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def write_files(folder: Path, num_questions: int, *, shuffled: bool) -> int:
    """Writes the two files and their images; returns the size of the two files in MB."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    numbers = list(range(num_questions))
    write_list(folder / QUESTIONS, "questions", (question(number, rng, words) for number in numbers))
    if shuffled:
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


if __name__ == "__main__":
    main()
