"""PEFT's module patterns: what PEFT itself finds, and no pattern that takes long."""

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from dora_mm.formats.tools.patterns import matching_key

PATHS = ["to_q", "blocks.0.attn.to_q", "blocks.10.attn.to_q", "blocks.0.attn.to_out.0", "model.decoder.layers.3.fc1"]
PATTERNS = [
    "to_q",
    "attn.to_q",
    "o_q",
    "0",
    "^to_q",
    "^blocks.0.attn.to_q",
    "^attn.to_q",
    r"blocks\.0\.attn\.to_q",
    r"blocks.0.*",
    r"^blocks.*\.to_q$",
    r".*\.to_q",
    r".*_q$",
    "^blocks.*",
    "^locks.*",
    "b.*0.*q",
    ".*",
]
REFUSED = [r"blocks\.\d+\.attn", "blocks.[0-4].*", "(fc1|fc2)", "a*t+n.to_q", "bl?ocks", "a**"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", PATHS)
def test_what_peft_finds(pattern, path):
    theirs = get_pattern_key([pattern], path)
    expected = pattern if re.match(rf"(.*\.)?({pattern})$", path) else None
    assert theirs == (expected or path)
    assert matching_key({pattern: 1}, path) == expected


PIECES = st.lists(st.sampled_from(["a", "b", "\\.", ".*"]), min_size=1, max_size=6)


@given(PIECES, st.booleans(), st.booleans(), st.text("ab.", max_size=8))
def test_the_same_as_regular_expressions(pieces, whole, ends, path):
    pattern = "^" * whole + "".join(pieces) + "$" * ends
    assert (matching_key({pattern: 1}, path) is not None) == (re.match(rf"(.*\.)?({pattern})$", path) is not None)


@pytest.mark.parametrize("pattern", REFUSED)
def test_other_regular_expressions_are_refused(pattern):
    with pytest.raises(ValueError, match="is not supported: write the ends of modules' paths"):
        matching_key({pattern: 1}, "to_q")


def test_the_first_one_wins():
    assert matching_key({"to_k": 1, ".*to_q": 2, "attn.to_q": 3}, "attn.to_q") == ".*to_q"
    assert matching_key({}, "to_q") is None


HOSTILE = [
    "(a+)+$",
    "a{99999999999999}",
    "(" * 5000 + "a" + ")" * 5000,
    "(a|a)*" * 33 + "$",
    ".*" * 100,
    ".*a" * 66,
    "a" * 10**6 + ".*",
    "(.*)*b",
    "[z-a]",
    "\\",
    "(?P<x>a)(?P=x)",
    "",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_are_refused_or_matched_quickly(pattern):
    start = time.monotonic()
    with contextlib.suppress(ValueError):
        matching_key({pattern: 1}, "a" * 5000)
    assert time.monotonic() - start < 30  # one that hangs takes for ever


def test_many_patterns_with_wildcards_are_refused():
    with pytest.raises(ValueError, match="more than 100 patterns with wildcards"):
        matching_key({f"x{i}.*": 1 for i in range(101)}, "a")


def test_thousands_of_plain_patterns_take_no_time():
    patterns = {f"^blocks.{i}.attn": i for i in range(1000)}
    start = time.monotonic()
    assert [patterns[matching_key(patterns, f"blocks.{i}.attn") or ""] for i in range(1000)] == list(range(1000))
    assert time.monotonic() - start < 5
