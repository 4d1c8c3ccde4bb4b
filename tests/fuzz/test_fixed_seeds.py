"""Every door reads its own files as they are, and mutated ones of fixed seeds end in a result or in one sentence."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutations import mutated

ROOT = Path(__file__).parents[2]
FOUND = {  # by doors: seeds that ended in a traceback once
    "gallery": (1132, 101592),  # half a surrogate pair in the name of a file; an image of a gigabyte
    "job jsonl": (101471,),  # a row that is wrong as a whole
    "peft_dora": (1006, 1036, 1297),  # an alpha that is no number
    "rows parquet": (1796060437,),  # damaged statistics, at which pyarrow ended the process
    "run": (1796060711,),  # an answer that is nested 100,000 deep
    "features": (1119,),  # the name of an image that is an object
    "features npz": (5, 15, 35),  # TokenError, and bytes in place of an array
    "features h5": (4, 5, 108),  # KeyError and RuntimeError of HDF5's
}


def test_fixed_seeds():
    """The process imports all readers, and has one thread: not pytest's."""
    seeds = [f"{door}:{seed}" for door, found in FOUND.items() for seed in found]
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "96", "--seed", "11", "--also", *seeds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from seed 11" in done.stdout


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.safetensors", "a.npz", "a.gz", "a.txt"])
def test_a_seed_is_always_the_same_file(name):
    first, again, other = (mutated(name, b'{"a": [1, "b"]}\n' * 3, Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
