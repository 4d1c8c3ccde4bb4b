"""Draws a long job of pictures, on a tiny model with random weights, and kills it three times on the way.

    python -m tests.benchmarks.bench_long_generation [--prompts 20000] [--output FILE]

The command is a process of its own, ended with SIGKILL when a quarter, a half and three quarters of the pictures are
there, and repeated each time. Of each tenth of the pictures there is the moment at which most memory was resident, with
the number of open files. At the end the files are those of the same job that nothing has ended.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from dora_mm.utils.digest import file_digest

ROOT = Path(__file__).parents[2]
KILLS = (0.25, 0.5, 0.75)  # of the pictures
WITH_TIMES = ("versions.json", "inputs.json", "config.yaml")  # and paths: of the two folders


class Look(NamedTuple):
    """A job that has so many pictures, and was killed so often before; and what its process takes.

    Attributes:
        seconds: Since the begin of the process.
    """

    images: int
    kills: int
    seconds: int
    megabytes: int
    open_files: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    looks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.prompts)
        for kills in range(len(KILLS) + 1):
            for look in watched(folder, "killed", given.prompts, kills):
                print(*look, flush=True)
                looks.append(look)
        for _ in watched(folder, "whole", given.prompts, len(KILLS)):
            pass
        different = differences(folder / "killed", folder / "whole")
        print(f"{given.prompts} pictures, killed {len(KILLS)} times: {len(different)} files differ", *different[:20])
    if given.output and not different:
        with given.output.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Look._fields, *looks])
    sys.exit(bool(different))


def prepare(folder: Path, prompts: int) -> None:
    """Writes a model, and a job of so many prompts."""
    from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
    from tests.conftest import SIZES

    build_tiny_sdxl(**SIZES).pipeline().save_pretrained(folder / "model")
    job = {
        "pipeline": "sample",
        "model": {"path": str(folder / "model")},
        "prompts": [f"a drawing of thing {number}" for number in range(prompts)],
        "steps": 1,
        "width": 64,
        "height": 64,
    }
    (folder / "job.yaml").write_text(json.dumps(job))


def watched(folder: Path, output: str, prompts: int, kills: int) -> Iterator[Look]:
    """Runs the job until its next kill, or to its end.

    Yields:
        When it took most memory, in each tenth of its pictures, and behind the last one.

    Raises:
        RuntimeError: It fails, or ends before it is killed.
    """
    until = int(KILLS[kills] * prompts) if kills < len(KILLS) else None
    command = [sys.executable, "-m", "dora_mm", "sample", f"{folder}/job.yaml", "--set", f"output={folder}/{output}"]
    with (folder / "said").open("w") as said:
        process = psutil.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=said, stderr=said)
        begin, due, highest = time.monotonic(), 0, None
        while process.poll() is None:
            time.sleep(0.5)
            there = len(list((folder / output / "samples").glob("*.png")))
            due = due or (there // (prompts // 10) + 1) * (prompts // 10)
            with suppress(psutil.Error):  # it has ended since
                megabytes, open_files = process.memory_info().rss >> 20, process.num_fds()
                if highest is None or megabytes >= highest.megabytes:
                    highest = Look(there, kills, round(time.monotonic() - begin), megabytes, open_files)
            if highest and there >= min(due, until or due):
                yield highest
                due, highest = due + prompts // 10, None
            if until and there >= until:
                process.kill()
                process.wait()
                return
    if process.wait() or until:
        raise RuntimeError((folder / "said").read_text())
    if highest:
        yield highest  # of its sheets, behind the last picture


def differences(one: Path, other: Path) -> list[str]:
    """The names of files, hidden ones among them, that only one of two folders has, or that differ."""
    found, wanted = ({str(path.relative_to(root)): path for path in root.rglob("*")} for root in (one, other))
    both = [name for name in found.keys() & wanted.keys() if found[name].is_file() and name not in WITH_TIMES]
    return sorted([*(name for name in both if file_digest(found[name]) != file_digest(wanted[name])),
                   *(found.keys() ^ wanted.keys())])  # fmt: skip


if __name__ == "__main__":
    main()
