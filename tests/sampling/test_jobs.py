"""Job files: every column is honoured, and what cannot be is named."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.sampling.jobs.picture import Picture, batches, expand, file_names
from dora_mm.sampling.jobs.reading import read_job
from dora_mm.sampling.jobs.rows import JobRow, adapters_text, parse_adapters
from dora_mm.sampling.strengths import as_strength

TEMPLATE = Picture(0, "", None, 0, 25, 5.0, None, None, None, (("a.safetensors", 0.8),), 1.0)


def write(tmp_path, text, name="jobs.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_column_of_a_table_is_read(tmp_path):
    path = write(
        tmp_path,
        "prompt,negative_prompt,seed,steps,guidance,width,height,scheduler,adapter,strength\n"
        '"a bus, red",blurry,1-3,30,4.5,832,1216,dpmpp_2m_karras,x:0.7+y:0.3,0.5\n'
        "a cat,,,,,,,,,\n",
    )
    first, second = read_job(path)
    assert first == JobRow(
        prompt="a bus, red",
        negative_prompt="blurry",
        seed=(1, 2, 3),
        steps=30,
        guidance=4.5,
        width=832,
        height=1216,
        scheduler="dpmpp_2m_karras",
        adapter=(("x", 0.7), ("y", 0.3)),
        strength=0.5,
    )
    assert second == JobRow(prompt="a cat")
    pictures = expand([first, second], TEMPLATE, seeds=(0, 9), strengths=(0.0, 1.0))
    assert [(p.row, p.seed, p.strength) for p in pictures] == [
        (1, 1, 0.5), (1, 2, 0.5), (1, 3, 0.5), (2, 0, 0.0), (2, 0, 1.0), (2, 9, 0.0), (2, 9, 1.0)
    ]  # fmt: skip
    assert pictures[0].weights == (("x", 0.35), ("y", 0.15))
    assert pictures[3].weights == ()
    assert pictures[4].weights == (("a.safetensors", 0.8),)
    assert (pictures[3].steps, pictures[3].guidance, pictures[3].width) == (25, 5.0, None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_delimiters_are_told_apart(tmp_path, delimiter, mark, newline):
    lines = [delimiter.join(("seed", "prompt")), delimiter.join(("7", '"a, b; c"'))]
    path = tmp_path / "jobs.csv"
    path.write_bytes((mark + newline.join(lines)).encode())
    assert read_job(path) == [JobRow(prompt="a, b; c", seed=(7,))]


def test_text_files_have_comments_and_blank_lines(tmp_path):
    path = write(tmp_path, "# what to draw\na bus\n\n   # another\n  a cat, #1  \n", "jobs.txt")
    assert [row.prompt for row in read_job(path)] == ["a bus", "a cat, #1"]


def test_json_lines(tmp_path):
    rows = [{"prompt": "a bus", "seed": [3, 4], "width": 64}, {"prompt": "é", "seed": 7, "strength": 1}]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "jobs.jsonl")
    assert read_job(path) == [
        JobRow(prompt="a bus", seed=(3, 4), width=64),
        JobRow(prompt="é", seed=(7,), strength=1.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,sed\na,1\n", "line 1: unknown column 'sed', did you mean 'seed'?"),
        ("prompt,foo\na,1\n", "unknown column 'foo', the columns are prompt, negative_prompt"),
        ("prompt,seed\na,x\n", "line 2: seed must be seeds such as 7, 1-8 or 1 5 9, got 'x'"),
        ("prompt,seed\na,8-1\n", "must go up"),
        ("prompt,seed\na,0-99999999999\n", "at most 10000 seeds"),
        ("prompt,steps\na,0\n", "line 2: steps must be greater than 0, got '0'"),
        ("prompt,steps\na,2.5\n", "line 2: steps"),
        ("prompt,width\na,65\n", "line 2: width must be a multiple of 8, got '65'"),
        ("prompt,scheduler\na,eulr\n", "line 2: scheduler must be 'euler'"),
        ("prompt,strength\na,nan\n", "line 2: strength must be a finite number"),
        ("prompt,seed\n,1\n", "line 2: has no prompt"),
        ("seed\n1\n", "line 2: has no prompt"),
        ("prompt\na bus, red\n", "line 2 has 2 cells for 1 columns: put quotation marks around text with ,"),
        ("prompt,prompt\na,b\n", "names a column twice"),
        ("prompt\n", "has no prompts"),
        ("", "has no prompts"),
        ('prompt\n"open\n', "line 2 cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_says_where(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        read_job(path)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "steps": -1}\n[1]\n{"sed": 3, "prompt": "b"}\nnot JSON\n', "jobs.jsonl")
    with pytest.raises(ValueError, match="problems") as caught:
        read_job(path)
    first, *problems = str(caught.value).split("\n  ")
    assert first.endswith("4 problems")
    assert sorted(problem.split(":")[0].split(" is")[0] for problem in problems) == [
        "line 1",
        "line 2",
        "line 3",
        "line 4",
    ]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        read_job(write(tmp_path, "a", "jobs.xlsx"))
    latin = tmp_path / "jobs.txt"
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: byte 0"):
        read_job(latin)
    surrogate = write(tmp_path, '{"prompt": "\\ud800"}', "jobs.jsonl")
    with pytest.raises(ValueError, match="line 1: prompt"):
        read_job(surrogate)
    with pytest.raises(ValueError, match="line 1: prompt contains a NUL character"):
        read_job(write(tmp_path, '{"prompt": "a\\u0000b"}', "jobs.jsonl"))


def test_adapters_and_their_strengths(tmp_path):
    assert parse_adapters("runs/a/001") == (("runs/a/001", 1.0),)
    assert parse_adapters("runs/a/001:0.7") == (("runs/a/001", 0.7),)
    assert parse_adapters("a:0.7 + b:-.3") == (("a", 0.7), ("b", -0.3))
    assert parse_adapters("C:\\loras\\a.safetensors") == (("C:\\loras\\a.safetensors", 1.0),)
    assert parse_adapters("none") == ()
    assert parse_adapters("a:1e-05") == (("a", 1e-05),)
    assert parse_adapters("~nobody-at-all/a:0.5") == (("~nobody-at-all/a", 0.5),)
    for strength in (1e-05, 0.123456789):
        assert parse_adapters(adapters_text((("a", strength),))) == (("a", strength),)
    odd = tmp_path / "a+b:2"
    odd.mkdir()
    assert parse_adapters(str(odd)) == ((str(odd), 1.0),)
    assert parse_adapters(f"{odd}:0.5") == ((str(odd), 0.5),)


@given(
    st.lists(
        st.builds(
            JobRow,
            prompt=st.sampled_from(["a", "b", "c " * 100]),
            seed=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
            width=st.none() | st.sampled_from([64, 128]),
            adapter=st.none() | st.sampled_from([(), (("x", 1.0),), (("y", 0.5),)]),
            strength=st.none() | st.sampled_from([0.0, 0.5, 1.0]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_batches_hold_every_picture_once_and_share_their_settings(rows, size):
    pictures = expand(rows, TEMPLATE, seeds=(0, 1), strengths=(0.5, 1.0))
    names = file_names(pictures)
    assert len(set(names)) == len(names)
    found = batches(pictures, size, lambda picture: len(picture.prompt) // 75 + 1)
    assert sorted(index for batch in found for index in batch) == list(range(len(pictures)))
    for batch in found:
        assert len(batch) <= size
        assert (
            len({(pictures[i].weights, *pictures[i].settings.values(), len(pictures[i].prompt) // 75) for i in batch})
            == 1
        )
    weights = [pictures[batch[0]].weights for batch in found]
    changes = sum(one != other for one, other in pairwise(weights))
    assert changes == len(set(weights)) - 1


NAMES = st.sampled_from(["", "unet", "unet.down", "text_encoder", "unet.up.1"])
BY_PART = st.dictionaries(NAMES, st.floats(-4, 4).map(lambda value: round(value, 3)), min_size=1)


@given(BY_PART)
def test_strengths_by_part_are_written_as_they_are_read(strength):
    adapters = (("a/b", as_strength(strength)), ("c", 0.5))
    assert parse_adapters(adapters_text(adapters)) == adapters


def test_the_strength_of_a_picture_multiplies_those_of_parts_and_of_all_else():
    (picture,) = expand(
        [JobRow(prompt="a", adapter=(("x", (("unet.down", 0.5),)),))], TEMPLATE, seeds=(0,), strengths=(0.5,)
    )
    assert picture.weights == (("x", (("", 0.5), ("unet.down", 0.25))),)
    assert replace(picture, strength=0.0).weights == ()
