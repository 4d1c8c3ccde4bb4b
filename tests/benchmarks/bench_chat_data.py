"""Measures how long it takes until 600,000 conversations are ready for training, and the memory that this needs.

    python tests/benchmarks/bench_chat_data.py [--rows N] [--repeats N] [--output FOLDER]

A file of the size of LLaVA's own (about 1.5 kB and ten turns a row) is made in a temporary folder, with an image (an
empty file) for every two rows, in five subfolders. Each measurement runs in a separate process, from its start to the
first batch of 32 examples:
    first: the file is read, checked, and saved as a table.
    again: the table exists already.
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

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
PER_IMAGE = 2
TEXT_ONLY = 16  # one row of so many has no image
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "epyc_2_cores")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = run_cases(Path(folder), arguments.rows, arguments.repeats)
    with (arguments.output / "chat_data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print((arguments.output / "chat_data.csv").read_text())


def run_cases(folder: Path, num_rows: int, repeats: int) -> list[dict[str, object]]:
    megabytes = write_files(folder, num_rows)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    rows = []
    for case in ("first", "again"):
        found = []
        for _ in range(repeats):
            if case == "first":
                shutil.rmtree(folder / "tables", ignore_errors=True)
            start = time.perf_counter()
            command = [sys.executable, __file__, "--measure", str(folder)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append((time.perf_counter() - start, float(result.stdout)))
            print(f"{case}: {found[-1][0]:.1f} s, {found[-1][1]:.0f} MB", flush=True)
        for index, name in enumerate(("seconds to the first batch", "peak memory in MB")):
            values = [round(pair[index], 2) for pair in found]
            figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            about = {"case": case, "rows": num_rows, "megabytes of JSON": megabytes, "measure": name}
            rows.append(about | figures | {"repeats": repeats, "machine": machine})
    return rows


def measure(folder: Path) -> None:
    """Reads data up to the first batch, and prints the peak resident memory in MB."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from dora_mm.config.vl_data import SourceConfig
    from dora_mm.data.vl.mixing import TaskBatches
    from dora_mm.data.vl.tables import open_table

    source = SourceConfig(format="chat", file=str(folder / "mix.json"), images=str(folder / "images"))
    table = open_table(source, folder / "tables", on_bad_data="stop")
    task, indices = TaskBatches({"chat": len(table)}, {"chat": BATCH}, seed=0)(0)
    batch = [table[index] for index in indices]
    assert task == "chat"
    assert len(batch) == BATCH
    assert all(example.turns[-1].loss for example in batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def write_files(folder: Path, num_rows: int) -> int:
    """Writes the file and its images; returns the size of the file in MB."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    questions = [f"{' '.join(rng.choices(words, k=8))}?" for _ in range(20_000)]
    answers = [f"{' '.join(rng.choices(words, k=rng.choice((1, 3, 12, 60))))}." for _ in range(20_000)]
    for name in FOLDERS:
        (folder / "images" / name).mkdir(parents=True)
    path = folder / "mix.json"
    with path.open("w") as file:
        for number in range(num_rows):
            file.write("[" if number == 0 else ", ")
            file.write(json.dumps(row(number, rng, questions, answers)))
        file.write("]")
    for number in range(0, num_rows, PER_IMAGE):
        (folder / "images" / image_name(number)).touch()
    return round(path.stat().st_size / 1e6)


def image_name(number: int) -> str:
    index = number // PER_IMAGE
    return f"{FOLDERS[index % len(FOLDERS)]}/{index:012d}.jpg"


def row(number: int, rng: random.Random, questions: list[str], answers: list[str]) -> dict:
    """A conversation of one to nine rounds; as in LLaVA's file, rows about one image share an id."""
    conversation = []
    for _ in range(rng.randint(1, 9)):
        conversation.append({"from": "human", "value": rng.choice(questions)})
        conversation.append({"from": "gpt", "value": rng.choice(answers)})
    if number % TEXT_ONLY == TEXT_ONLY - 1:
        return {"id": f"text{number}", "model": "", "conversations": conversation}
    conversation[0]["value"] = f"<image>\n{conversation[0]['value']}"
    return {"id": f"{number // PER_IMAGE:012d}", "image": image_name(number), "conversations": conversation}


if __name__ == "__main__":
    main()
