"""Mutated files through every door, in forked children: `make fuzz`, or python -m tests.fuzz --cases 500 --seed 3."""

import os

os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # before they are loaded
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the second thread of a process that imports pyarrow

import argparse
import csv
import logging
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

from tests.fuzz.door import Door
from tests.fuzz.doors import DOORS, check_doors
from tests.fuzz.faults import FAULTS
from tests.fuzz.forked import BATCH, FINE, outcomes
from tests.fuzz.mutations import mutated

Contents = dict[str, dict[str, bytes]]  # of the files of each door
Seed = int | str  # the name of a fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="the time after which no batch begins")
    parser.add_argument("--cases", type=int, default=100_000, help="how many, of all doors together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each door; they count up")
    parser.add_argument("--doors", nargs="*", help="only these")
    parser.add_argument("--also", nargs="*", default=[], metavar="DOOR:SEED", help="these cases before all others")
    parser.add_argument("--faults", nargs="*", default=[], choices=FAULTS, metavar="NAME", help="and these, with names")
    parser.add_argument("--output", type=Path, help="a CSV file: what became of the cases, by door")
    given = parser.parse_args()
    doors = [door for door in DOORS if door.name in (given.doors or door.name)]
    also: list[tuple[str, Seed]] = [(FAULTS[name].door, name) for name in given.faults]
    also += [(door, int(seed)) for door, _, seed in (text.partition(":") for text in given.also)]
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        batches = in_batches([door.name for door in doors], given.seed, given.cases // len(doors), also)
        counts, bad = run(batches, Path(name), time.monotonic() + given.seconds)
    for line in bad:
        print(line)
    if given.output:
        write(given.output, counts, given.seed)
    total = Counter[str]()
    for count in counts.values():
        total += count
    print(
        f"{sum(total.values())} cases from seed {given.seed}: " + ", ".join(f"{n} {kind}" for kind, n in total.items())
    )
    return 1 if bad else 0


def in_batches(
    doors: list[str], seed: int, cases: int, also: list[tuple[str, Seed]]
) -> Iterator[tuple[str, list[Seed]]]:
    """The seeds of each door, some doors' own first, then those of all in turn."""
    for door in dict.fromkeys(door for door, _ in also):
        yield door, [number for name, number in also if name == door]
    for first in range(seed, seed + cases, BATCH):
        for door in doors:
            yield door, list(range(first, min(first + BATCH, seed + cases)))


def run(batches: Iterable[tuple[str, list[Seed]]], root: Path, end: float) -> tuple[dict[str, Counter[str]], list[str]]:
    """The kinds of outcomes by door, and a line for each that must not be."""
    doors, contents = {door.name: door for door in DOORS}, made(root)
    counts, bad = defaultdict[str, Counter[str]](Counter), []
    for name, seeds in batches:
        if time.monotonic() > end:
            break
        cases = [case(doors[name], contents[name], root / name, seed) for seed in seeds]
        for seed, outcome in zip(seeds, outcomes(cases, [root]), strict=True):
            counts[name][outcome.kind] += 1
            if not (FAULTS[seed].is_mended(outcome) if isinstance(seed, str) else outcome.kind in FINE):
                bad.append(
                    f"{name}, {'seed' if isinstance(seed, int) else 'fault'} {seed}: {outcome.kind}: {outcome.text}"
                )
    return counts, bad


def made(root: Path) -> Contents:
    """The files of all doors, which a child computes."""
    kept = root / "contents"
    if not (child := os.fork()):
        code = 1
        try:
            kept.write_bytes(pickle.dumps(check_doors(root / "made")))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "a door does not read its own files"
    return pickle.loads(kept.read_bytes())


def case(door: Door, contents: dict[str, bytes], folder: Path, seed: Seed) -> Callable[[], object]:
    """Changes a file of a door's folder, and reads it; what is refused leaves no other file."""

    def read() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in (contents | changed(door, contents, seed)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        before = set(folder.rglob("*"))
        try:
            door.read(folder)
        except ValueError:
            if left := sorted(path.name for path in set(folder.rglob("*")) - before):
                raise AssertionError(f"a refusal left {left}") from None
            raise

    return read


def changed(door: Door, contents: dict[str, bytes], seed: Seed) -> dict[str, bytes]:
    """The files that a seed or a fault makes others."""
    if isinstance(seed, str):
        return {name: change(contents[name]) for name, change in FAULTS[seed].changes.items()}
    random = Random(f"{door.name} {seed}")
    name = random.choice(door.files)
    return {name: mutated(name, contents[name], random, door.changes)}


def write(file: Path, counts: dict[str, Counter[str]], seed: int) -> None:
    kinds = sorted({"read", "refused"} | {kind for count in counts.values() for kind in count})
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened, lineterminator="\n")
        rows.writerow(["door", "first seed", *kinds])
        rows.writerows([name, seed, *(count[kind] for kind in kinds)] for name, count in counts.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.exit(main())
