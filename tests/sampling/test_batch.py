"""Job files: every column is honoured, and what cannot be is named."""

import datetime
import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.sampling.batch.prompt_row import PromptRow, adapters_text, parse_adapters
from dora_mm.sampling.batch.prompts import with_alternatives
from dora_mm.sampling.batch.reading import read_prompts_file
from dora_mm.sampling.batch.requests import ImageRequest, batches, expand, file_names
from dora_mm.sampling.strengths import as_strength

TEMPLATE = ImageRequest(0, "", None, 0, 25, 5.0, None, None, None, (("a.safetensors", 0.8),), 1.0)


def write(tmp_path, text, name="jobs.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_column_of_a_table_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "xy":
        (tmp_path / name).touch()
    path = write(
        tmp_path,
        "prompt,negative_prompt,seed,steps,guidance,width,height,scheduler,adapter,strength\n"
        '"a bus, red",blurry,1-3,30,4.5,832,1216,dpmpp_2m_karras,x:0.7+y:0.3,0.5\n'
        "a cat,,,,,,,,,\n",
    )
    first, second = read_prompts_file(path)
    assert first == PromptRow(
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
    assert second == PromptRow(prompt="a cat")
    images = expand([first, second], TEMPLATE, seeds=(0, 9), strengths=(0.0, 1.0))
    assert [(p.row, p.seed, p.strength) for p in images] == [
        (1, 1, 0.5), (1, 2, 0.5), (1, 3, 0.5), (2, 0, 0.0), (2, 0, 1.0), (2, 9, 0.0), (2, 9, 1.0)
    ]  # fmt: skip
    assert images[0].active_adapters == (("x", 0.35), ("y", 0.15))
    assert images[3].active_adapters == ()
    assert images[4].active_adapters == (("a.safetensors", 0.8),)
    assert (images[3].steps, images[3].guidance, images[3].width) == (25, 5.0, None)
    assert file_names(images)[:4] == [
        "0001-seed1.png", "0001-seed2.png", "0001-seed3.png", "0002-seed0-strength0.png"
    ]  # fmt: skip


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_delimiters_are_told_apart(tmp_path, delimiter, mark, newline):
    lines = [delimiter.join(("seed", "prompt")), delimiter.join(("7", '"a, b; c"'))]
    path = tmp_path / "jobs.csv"
    path.write_bytes((mark + newline.join(lines)).encode())
    assert read_prompts_file(path) == [PromptRow(prompt="a, b; c", seed=(7,))]


def test_text_files_have_comments_and_blank_lines(tmp_path):
    path = write(tmp_path, "# what to generate\na bus\n\n   # another\n  a cat, #1  \n", "jobs.txt")
    assert [row.prompt for row in read_prompts_file(path)] == ["a bus", "a cat, #1"]


def test_json_lines(tmp_path):
    rows = [{"prompt": "a bus", "seed": [3, 4], "width": 64}, {"prompt": "é", "seed": 7, "strength": 1}]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "jobs.jsonl")
    assert read_prompts_file(path) == [
        PromptRow(prompt="a bus", seed=(3, 4), width=64),
        PromptRow(prompt="é", seed=(7,), strength=1.0),
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
        ("prompt,width\na,65\n", "line 2: width must be a multiple of 8 from 16 to 8192, got 65"),
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
        read_prompts_file(path)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "steps": -1}\n[1]\n{"sed": 3, "prompt": "b"}\nnot JSON\n', "jobs.jsonl")
    with pytest.raises(ValueError, match="problems") as caught:
        read_prompts_file(path)
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
        read_prompts_file(write(tmp_path, "a", "jobs.ods"))
    latin = tmp_path / "jobs.txt"
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: byte 0"):
        read_prompts_file(latin)
    surrogate = write(tmp_path, '{"prompt": "\\ud800"}', "jobs.jsonl")
    with pytest.raises(ValueError, match="line 1: prompt"):
        read_prompts_file(surrogate)
    with pytest.raises(ValueError, match="line 1: prompt contains a NUL character"):
        read_prompts_file(write(tmp_path, '{"prompt": "a\\u0000b"}', "jobs.jsonl"))


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
            PromptRow,
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
def test_batches_hold_every_image_once_and_share_their_settings(rows, size):
    images = expand(rows, TEMPLATE, seeds=(0, 1), strengths=(0.5, 1.0))
    names = file_names(images)
    assert len(set(names)) == len(names)
    found = batches(images, size, lambda image: len(image.prompt) // 75 + 1)
    assert sorted(index for batch in found for index in batch) == list(range(len(images)))
    for batch in found:
        assert len(batch) <= size
        assert (
            len({(images[i].active_adapters, *images[i].settings.values(), len(images[i].prompt) // 75) for i in batch})
            == 1
        )
    weights = [images[batch[0]].active_adapters for batch in found]
    changes = sum(one != other for one, other in pairwise(weights))
    assert changes == len(set(weights)) - 1


NAMES = st.sampled_from(["", "unet", "unet.down", "text_encoder", "unet.up.1"])
BY_PART = st.dictionaries(NAMES, st.floats(-4, 4).map(lambda value: round(value, 3)), min_size=1)


@given(BY_PART)
def test_strengths_by_part_are_written_as_they_are_read(strength):
    adapters = (("a/b", as_strength(strength)), ("c", 0.5))
    assert parse_adapters(adapters_text(adapters)) == adapters


def test_the_strength_of_a_image_multiplies_those_of_parts_and_of_all_else():
    (image,) = expand(
        [PromptRow(prompt="a", adapter=(("x", (("unet.down", 0.5),)),))], TEMPLATE, seeds=(0,), strengths=(0.5,)
    )
    assert image.active_adapters == (("x", (("", 0.5), ("unet.down", 0.25))),)
    assert replace(image, strength=0.0).active_adapters == ()


# --- contact sheets as people have them
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_german_excel_sheet_with_columns_of_another_program(tmp_path, encoding):
    """Semicolons, commas in numbers, empty columns at the end, and names in any case."""
    path = tmp_path / "jobs.csv"
    rows = [
        "Prompt;Negative Prompt;CFG Scale;Sampler;Schedule type;Size;Seed;LoRA Strength;;",
        "Rose, größer;blurry;4,5;DPM++ 2M;Karras;832x1216;7;;;",
        "bus;;7;euler A;;;1-2;0,0;;",
        ";;;;;;;;;",
    ]
    path.write_bytes("".join(row + "\r\n" for row in rows).encode(encoding))
    first, second = read_prompts_file(path)
    assert first == PromptRow(
        prompt="Rose, größer",
        negative_prompt="blurry",
        guidance=4.5,
        scheduler="dpmpp_2m_karras",
        width=832,
        height=1216,
        seed=(7,),
    )
    assert second == PromptRow(prompt="bus", guidance=7.0, scheduler="euler_a", seed=(1, 2), strength=0.0)


def test_plain_csv_of_excel_is_named_with_what_to_save_it_as(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_bytes("prompt\na café\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"line 2 would be 'a café' in Windows' own encoding.*in Excel as 'CSV UTF-8'"):
        read_prompts_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,CFG,cfg scale\na,1,2\n", "line 1 names a column twice: guidance"),
        ("prompt,size,width\na,8x8,8\n", "line 2: size must be such as 832x1216, without width and height"),
        ("prompt,Sampler\na,DPM++ 3M\n", "line 2: scheduler must be 'euler'"),
        ("prompt,sampler,schedule type\na,DPM++ 2M SDE,Automatic\n", "got 'DPM++ 2M SDE Exponential'"),
        ("prompt,file\na,../x\n", "line 2: file must be a name without"),
        ("prompt,file\na,x.jpg\n", "line 2: file must be a name without"),
        ("prompt,folder\na,b/../..\n", "line 2: folder must be names without"),
        ("prompt,adapter\na,none\nb,nosuch\n", "line 3: adapter: nosuch does not exist"),
    ],
)
def test_what_is_wrong_in_such_a_sheet_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts_file(write(tmp_path, text))


def test_lines_of_kohyas_scripts(tmp_path):
    text = "# a comment\na -- b cat --n blurry, grey --w 832 --h 1216 --d 7 --l 4.5 --s 20\na cat -- really\n"
    assert read_prompts_file(write(tmp_path, text, "prompts.txt")) == [
        PromptRow(
            prompt="a -- b cat",
            negative_prompt="blurry, grey",
            width=832,
            height=1216,
            seed=(7,),
            guidance=4.5,
            steps=20,
        ),
        PromptRow(prompt="a cat -- really"),
    ]
    with pytest.raises(ValueError, match="line 1 has --ar: the flags of a line are --n \\(negative_prompt"):
        read_prompts_file(write(tmp_path, "a cat --ar 16:9\n", "prompts.txt"))


def test_files_and_folders_with_names_of_their_own(tmp_path):
    rows = read_prompts_file(
        write(tmp_path, "prompt,file,folder,seed\na,rose.png,flowers/red,7\nb,bus,,1-2\nc,,cars,3\n")
    )
    images = expand(rows, TEMPLATE, seeds=(0,), strengths=(1.0,))
    assert file_names(images) == ["flowers/red/rose.png", "bus-seed1.png", "bus-seed2.png", "cars/0003-seed3.png"]
    with pytest.raises(ValueError, match=r"rows 1 and 2 have the same file ROSE\.png"):
        file_names([replace(TEMPLATE, row=row, file=name) for row, name in ((1, "rose"), (2, "ROSE"))])


def test_an_excel_file(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["Prompt", "Seed", "CFG Scale", None], [None], ["a bus", 7, 4.5, None], [1990, "1-3", 5.0]):
        book.active.append(row)
    book.create_sheet("other").append(["not read"])
    book.save(tmp_path / "jobs.xlsx")
    assert read_prompts_file(tmp_path / "jobs.xlsx") == [
        PromptRow(prompt="a bus", seed=(7,), guidance=4.5),
        PromptRow(prompt="1990", seed=(1, 2, 3), guidance=5.0),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            datetime.date(2026, 8, 1),
            "cell B2 is a date, which Excel makes of texts such as 1-8: format the column as text",
        ),
        ("=1+1", "cell B2 is a formula without a saved value"),
        ("x", "line 2: seed must be seeds such as"),
    ],
)
def test_quirks_of_excel_are_named(tmp_path, value, message):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["prompt", "seed"])
    book.active.append(["a", value])
    book.save(tmp_path / "jobs.xlsx")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts_file(tmp_path / "jobs.xlsx")


def test_a_job_has_bounds(tmp_path, monkeypatch):
    """They were read into memory, and beyond it."""
    openpyxl = pytest.importorskip("openpyxl")
    seeds = tmp_path / "seeds.csv"
    seeds.write_text("prompt,seeds\n" + "a,0-9999\n" * 5000)
    with pytest.raises(ValueError, match="above 200,000 images"):
        read_prompts_file(seeds)
    seeds.write_text("prompt,seeds\na," + "0-9999 " * 5000)
    with pytest.raises(ValueError, match="at most 10000 seeds"):
        read_prompts_file(seeds)
    steps = tmp_path / "steps.jsonl"
    steps.write_text('{"prompt": "a", "steps": ' + "1" * 4000 + "}\n")
    with pytest.raises(ValueError, match="less than or equal to 10000"):
        read_prompts_file(steps)
    book = openpyxl.Workbook()
    book.active["A1"], book.active["A2"], book.active["XFD1048576"] = "prompt", "a cup", "far away"
    book.save(tmp_path / "far.xlsx")
    with pytest.raises(ValueError, match="line 1048576: unknown column"):
        read_prompts_file(tmp_path / "far.xlsx")
    book = openpyxl.Workbook()
    book.active["A1"], book.active["A2"] = "prompt", "a" * 30_000
    book.save(tmp_path / "large.xlsx")
    monkeypatch.setattr("dora_mm.utils.spreadsheets.MOST_BYTES", 20_000)
    with pytest.raises(ValueError, match="at most 0 are read"):
        read_prompts_file(tmp_path / "large.xlsx")


def test_an_excel_file_without_its_package_or_of_another_kind(tmp_path, monkeypatch):
    path = write(tmp_path, "not a zip", "jobs.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"needs the package openpyxl: pip install 'dora_mm\[sheets\]'"):
        read_prompts_file(path)
    monkeypatch.undo()
    pytest.importorskip("openpyxl")
    with pytest.raises(ValueError, match="cannot be read as an Excel file"):
        read_prompts_file(path)


# --- prompts with weights --------------------------------------------------------------------------------------------


def test_alternatives_are_chosen_by_the_seed_and_weights_stay(caplog):
    text = "a {red|blue} bus, (big:1.2)"
    images = [replace(TEMPLATE, prompt=text, seed=seed, prompt_syntax="a1111") for seed in range(8)]
    found = {image.prompt for image in with_alternatives(images)}
    assert found == {"a red bus, (big:1.2)", "a blue bus, (big:1.2)"}
    assert caplog.text == ""
    plain = [replace(image, prompt_syntax="plain") for image in images]
    assert with_alternatives(plain) == plain
    assert "1 prompts have (word:1.3), {a|b}, generated as plain text; prompt_syntax=a1111 reads weights" in caplog.text


def test_a_tag_of_an_adapter_is_refused_with_the_column():
    image = replace(TEMPLATE, row=3, prompt="a bus <lora:style:0.8>", prompt_syntax="a1111")
    with pytest.raises(ValueError, match=r"row 3: prompt: <lora:style:0\.8> names an adapter.*in the column adapter"):
        with_alternatives([image])
