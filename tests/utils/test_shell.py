"""What a person is told to copy is run by a real shell, in which hostile names stay what they are."""

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dora_mm.config.commands import resuming
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.sampling.next_steps import asking_command, sampling_command, scoring_command
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.shell import command_line, comment, fenced, quoted

NAMES = (
    "$(touch x)",
    "`touch x`",
    "a; touch x #",
    "a && touch x",
    "a\ntouch x\n",
    "'; touch x; '",
    '"; touch x; "',
    'it\'s "both" $HOME \\n %s',
    "a\r\x1b[2Jtouch x",
    "\u202etouch x",
    "-rf",
    "~root",
    "!!",
    "*",
    "\udcff.png",
    "",
)


@pytest.fixture
def shell(tmp_path):
    """Runs a line in `sh`, with a `dora-mm` that reports its arguments; returns these."""
    stub = tmp_path / "bin" / "dora-mm"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    stub.chmod(0o755)
    (work := tmp_path / "work").mkdir()

    def run(line: str) -> list[str]:
        environment = {"PATH": f"{stub.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["sh", "-c", os.fsencode(line)], cwd=work, env=environment, capture_output=True, check=True
        )
        assert not any(work.iterdir())  # nothing was touched
        return os.fsdecode(done.stdout).split("\0")[:-1]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_name_arrives_as_it_is(shell, name):
    line = command_line("dora-mm", "eval", "--set", f"adapter.path={name}", name, "end")
    assert shell(line) == ["eval", "--set", f"adapter.path={name}", name, "end"]
    assert "\x1b" not in line
    assert "\u202e" not in line
    if not name.endswith("\n"):
        assert len(line.splitlines()) == 1


def test_a_path_is_no_option(shell):
    assert shell(command_line("dora-mm", Path("--out=x"), Path("a/-b"))) == ["./--out=x", "a/-b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_comment_does_not_end_early(name):
    text = f"{comment(f'dora-mm train {quoted(name)}')}\n{comment(name)}\na: 1\n"
    assert yaml.safe_load(text.encode("utf-8", "replace").decode()) == {"a": 1}


def test_a_block_does_not_end_early():
    text = "a: 1\n```\n<script>\n````\n"
    block = fenced(text, "yaml").split("\n")
    assert block[0] == "`````yaml"
    assert block.index("`````") == len(block) - 1


# --- printed lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["$(touch x)", "`touch x`", "a\ntouch x\nb", "'\"; touch x; \"'", "\x1b[2Ja"])
def test_what_a_training_prints_next(shell, name, tmp_path):
    """The prompt comes from a data set, and folders may be unpacked ones."""
    run = RunDirectory(tmp_path / "runs" / name)
    config = TrainDiffusionConfig.model_validate(
        {
            "pipeline": "train_diffusion",
            "name": "style",
            "model": {"path": name},
            "adapter": {"rank": 4, "parts": ["unet.attn"]},
            "data": {"folder": "images", "resolution": 64, "instance_prompt": name},
            "optimizer": {"lr": 0.01},
            "train": {"steps": 4, "batch_size": 2},
            "sample": {"prompts": [name], "steps": 2},
        }
    )
    generating = shell(sampling_command(config, run))
    assert generating[:3] == ["sample", "--set", f"adapter.path={run.path}"]
    assert yaml.safe_load(generating[3].removeprefix("prompts=")) == [name]
    assert shell(scoring_command(run))[-1] == f"adapter.path={run.path}"
    assert shell(asking_command(config, run))[-1] == str(run.path)
    assert shell(resuming(run)) == ["train", "--resume", str(run.path)]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("name", ["$(touch x)", "`touch x`", "it's; touch x #", "a\ntouch x\nb", "--out=x", "\u202ea"])
def test_the_command_of_an_image_on_a_page(shell, name):
    """The script of galleries quotes on its own."""
    script = (Path(__file__).parents[2] / "dora_mm/sampling/gallery/favourites.js").read_text(encoding="utf-8")
    (line,) = (line for line in script.split("\n") if line.startswith("const quoted = "))
    program = f"{line}\nprocess.stdout.write(quoted({json.dumps(name)}))"
    word = subprocess.run(["node", "-e", program], capture_output=True, check=True, text=True).stdout
    assert shell(f"dora-mm sample --replay {word}") == ["sample", "--replay", name]


# --- everywhere -------------------------------------------------------------------------------------------------------

# What ends a text in front of a value that a person would copy as part of a command
COMMAND = re.compile(
    r"(?:dora-mm [a-z]+|hf download|(?<!\()--(?:set|resume|images|references|adapter|base)|touch)(?: [\w./=<>X'-]+)* $"
)
QUOTED = re.compile(r"^(?:shell\.)?(?:quoted|command_line|resuming)\(")
# Values that are not out of files: numbers, names of registries, and what the person has typed in this very command
OURS = {
    "request",
    "cure",
    "found",
    "cause",
    "', '.join(known)",
    "', '.join(changeable)",
    "twice_as_long(config, done)",
    "lower_rate(config)",
}


def texts_before_values(tree):
    """The text in front of each value of each f-string, and the value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    text += str(part.value)
                else:
                    assert isinstance(part, ast.FormattedValue)
                    yield node.lineno, text, ast.unparse(part.value)
                    text += "X"


def test_every_printed_command_quotes_its_words():
    found = []
    root = Path(__file__).parents[2]
    for file in sorted([*(root / "dora_mm").rglob("*.py"), *(root / "pipelines").rglob("*.py")]):
        tree = ast.parse(source := file.read_text(encoding="utf-8"))
        if "import shlex" in source and file.name != "shell.py":
            found.append(f"{file.relative_to(root)}: shlex, and not utils/shell.py")
        for line, text, value in texts_before_values(tree):
            if COMMAND.search(text) and not QUOTED.match(value) and value not in OURS:
                found.append(f"{file.relative_to(root)}:{line}: {text[-40:]!r} {value}")
    assert found == []
