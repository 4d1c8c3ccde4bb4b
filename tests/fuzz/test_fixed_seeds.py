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
    "checkpoint": (65, 75, 1796300130),  # a header that is no JSON; a schedule of another name
    "model configs": (
        15,
        17,
        1091,
        1796301487,
    ),  # a token's number that is a text, an object, or of 25 digits; patches of 0 pixels
    "tokenizer of texts": (49,),  # no token of a text
    "predictions ours.jsonl": (23, 65, 80),  # values of other types
    "predictions batch.jsonl": (1796301972,),  # a row without the key of the first one
    "hub Parquet": (1796300928,),  # a pattern of 100,000 brackets
    "suites' Parquet": (1796284115, 1796285237),  # the number of an option that is an object, or infinite
    "suite": (9,),  # a reader that is a list
}
FAULTS = (  # of `tests.fuzz.faults`
    "a pattern that divides texts",
    "a pattern that is replaced",
    "a damaged map of characters",
    "texts of six tokens",
    "a template that keeps gigabytes",
    "a template of slow calls",
    "code of _attn_implementation",
    "code of attn_implementation",
    "brackets in an answer",
    "brackets in the name of an image",
    "long answers",
)


def fuzzed(*arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a process that imports all readers, and has one thread: not pytest's."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert " cases from seed " in done.stdout, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_fixed_seeds():
    code, lines = fuzzed(
        "--cases", "82", "--seed", "11", "--also", *(f"{d}:{seed}" for d in FOUND for seed in FOUND[d])
    )
    assert code == 0, "\n".join(lines)


@pytest.fixture(scope="module")
def not_mended():
    """The lines of the faults that end otherwise than they should, by their names."""
    _, lines = fuzzed("--cases", "0", "--faults", *FAULTS)
    return {name: line for name in FAULTS for line in lines if f" {name}: " in line}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_was_found_from_outside(not_mended, name):
    assert name not in not_mended, not_mended[name]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.safetensors", "a.npz", "a.gz", "a.tsv", "a.txt"])
def test_a_seed_is_always_the_same_file(name):
    first, again, other = (mutated(name, b'{"a": [1, "b"]}\n' * 3, Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
