"""Weights, BREAK and alternatives, as A1111 reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.syntax import alternatives, problem_of, syntax_in, weighted


@pytest.mark.parametrize(
    ("text", "pieces"),
    [  # what parse_prompt_attention of A1111 1.10 returns, from its own docstring and by hand
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("a: b", [("a: b", 1.0)]),
        ("", [("", 1.0)]),
    ],
)  # fmt: skip
def test_weights(text, pieces):
    (chunk,) = weighted(text)
    assert [(piece, round(weight, 6)) for piece, weight in chunk] == pieces


def test_breaks_part_a_prompt_and_are_words():
    assert weighted("a BREAK (b\nBREAK c:1.2) BREAKFAST BREAK ") == (
        (("a", 1.0),),
        (("b", 1.2),),
        (("c", 1.2), (" BREAKFAST", 1.0)),
    )


def test_alternatives_are_a_pure_function_of_text_and_seed():
    text = "{a|b|c} {x|{y|z}} {one} {|d}"
    found = {alternatives(text, seed) for seed in range(400)}
    assert found == {f"{a} {x} {{one}} {d}" for a in "abc" for x in "xyz" for d in ("", "d")}
    assert alternatives(text, 5) == alternatives(text, 5)
    assert len({alternatives("{a|b} {a|b}", seed) for seed in range(50)}) == 4
    counts = [alternatives("{a|b}", seed) for seed in range(1000)].count("a")
    assert 430 < counts < 570
    assert alternatives(r"\{a|b}", 0) == r"\{a|b}"


@given(st.text(alphabet="ab{}|()[]:\\1. ", max_size=40), st.integers(0, 3))
def test_any_text_is_read(text, seed):
    assert alternatives(text, seed) == alternatives(text, seed)
    assert all(chunk for chunk in weighted(text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(word:1.3)", ["(word:1.3)"]),
        ("((word))", ["(word:1.3)"]),
        ("{a|b} BREAK", ["{a|b}", "BREAK"]),
        ("<lora:x:0.8>", ["<lora:...>"]),
        ("__wild__", ["__name__"]),
        ("a bus (red), 3:4 {x} snake_case a__b__c", []),
    ],
)
def test_what_looks_like_syntax(text, found):
    assert syntax_in(text) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<lora:x:0.8>", "put x:0.8 (its path) in the column adapter"),
        ("a __colours__ bus", "__colours__ is a wildcard of a file"),
        ("[cat:dog:0.5]", "changes the prompt from step to step"),
        ("[cat|dog]", "changes the prompt from step to step"),
        ("a cat AND a dog", "changes the prompt from step to step"),
        ("{2$$a|b}", "has a number of alternatives"),
    ],
)
def test_what_is_not_read(text, problem):
    assert problem in problem_of(text)


def test_what_is_read_has_no_problem():
    assert problem_of("an [old] (red:1.2) {bus|car}, BREAK in the style of TOK (SAND)") is None
