"""Every file that a resumed or repeated command reads is on the list of docs/reliability.md, or is named here."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.data.vlm_rows import write_images, write_questions
from tests.shared.vl.small_vl_bart import vl_bart

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
CHAPTER = "## What a resumed or repeated command reads"
_opened: list[set[str]] = []  # where there is one, what is opened to be read is put into it


def _note(event: str, arguments: tuple) -> None:
    if not _opened or event != "open" or isinstance(arguments[0], int):
        return
    if not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        _opened[-1].add(os.path.realpath(os.fsdecode(arguments[0])))


@pytest.fixture(scope="module")
def reads() -> Callable:
    """A context that gives the files that are opened in it; the hook stays, since Python removes none."""
    sys.addaudithook(_note)

    @contextmanager
    def reading() -> Iterator[set[str]]:
        _opened.append(set())
        try:
            yield _opened[-1]
        finally:
            _opened.pop()

    return reading


def listed() -> list[str]:
    """The patterns in the first column of the table: of paths behind a word for their folder, such as RUN/.lock."""
    chapter = PAGE.read_text().split(CHAPTER)[1].split("\n## ")[0]
    rows = [line.split("|") for line in chapter.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 and row[2].strip() for row in rows), "a file without a word on how a change is seen"
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row[1])]


def unlisted(opened: set[str], **places: Path) -> list[str]:
    """The files in these folders that no pattern of the list has, by the words for the folders."""
    named = [
        f"{word}/{Path(name).relative_to(folder.resolve())}"
        for name in sorted(opened)
        for word, folder in places.items()
        if Path(name).is_file() and Path(name).is_relative_to(folder.resolve())
    ]
    assert named, "nothing was read"
    return [name for name in named if not any(fnmatch(name, pattern) for pattern in listed())]


def written(path: Path, **values: object) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def again(run: Path) -> list[str]:
    """What goes on with a run as if it had been killed behind its second step."""
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "summary.json").unlink()
    return ["train", "--resume", str(run)]


@pytest.fixture
def images(tmp_path, tiny_folder, image_folder):
    """A training of images with all that it may read, and what it has left behind its second step."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    train = {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    values = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "adapter": {"rank": 2, "parts": ["unet.attn"]},
        "data": {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK", "valid": {"share": 0.4}},
        "optimizer": {"lr": 0.01},
        "sample": {"prompts": ["a TOK bus"], "steps": 1},
        "evaluate": {"every": 2},
    }
    first = written(tmp_path / "first.yaml", **values | {"train": train | {"steps": 1}, "output": str(tmp_path / "a")})
    assert main(["train", first]) == 0
    values["adapter"] = {**values["adapter"], "init_from": str(tmp_path / "a" / "adapter")}
    assert main(["train", written(tmp_path / "config.yaml", **values, train=train)]) == 0
    return {"RUN": tmp_path / "run", "DATA": image_folder, "MODEL": model, "ADAPTER": tmp_path / "a"}


def test_a_training_of_images(images, reads):
    """Another content of any file of others that it reads is refused, or makes no difference."""
    resume = again(images["RUN"])
    kept = {folder: shutil.copytree(folder, folder.with_name(f"kept {folder.name}")) for folder in images.values()}
    with reads() as opened:
        assert main(resume) == 0
    assert unlisted(opened, **images) == []
    result = images["RUN"] / "adapter" / "pytorch_lora_weights.safetensors"
    right, inputs = result.read_bytes(), [Path(name) for name in opened if "/run/" not in name]
    changed = [file for file in inputs if file.is_file() and any(file.is_relative_to(f.resolve()) for f in kept)]
    assert len(changed) > 10
    for file in changed:
        for folder, copy in kept.items():
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        code = main(resume)
        assert code == 2 or (code == 0 and result.read_bytes() == right), file


def test_a_job(tmp_path, tiny_folder, reads):
    job = tmp_path / "job.csv"
    job.write_text("prompt,seed\na bus,0-1\n")
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    sets = [f"output={tmp_path / 'run'}", f"model.path={model}", "steps=1", "width=64", "height=64"]
    command = ["sample", str(job), *(word for each in sets for word in ("--set", each))]
    assert main(command) == 0
    (tmp_path / "run" / "samples" / "0001-seed1.png").unlink()
    with reads() as opened:
        assert main(command) == 0
    assert unlisted(opened, RUN=tmp_path / "run", MODEL=model) == []
    assert str(job.resolve()) in opened


def test_a_training_of_questions(stopped, tmp_path, vision, reads):
    (tmp_path / "pictures").mkdir()
    data = tmp_path / "pictures"
    config = vl_bart(tmp_path, 72, vision, write_questions(data, write_images(data)))
    run = stopped(**config)
    with reads() as opened:
        assert main(["train", "--resume", str(run)]) == 0
    tower = Path(vision["pretrained"]).parent
    assert unlisted(opened, RUN=run, DATA=data, MODEL=tmp_path / "model", CACHE=tmp_path / "tables", TOWER=tower) == []


def test_an_evaluation_of_questions(tmp_path, tiny_vlm, reads):
    (tmp_path / "pictures").mkdir()
    questions = write_questions(tmp_path / "pictures", write_images(tmp_path / "pictures"))
    values = {
        "pipeline": "eval_vl",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_vlm("blip_vqa"))},
        "data": {**questions, "tables": str(tmp_path / "tables")},
        "decode": {"max_new_tokens": 2},
    }
    command = ["eval", written(tmp_path / "config.yaml", **values)]
    assert main(command) == 0
    with reads() as opened:
        assert main(command) == 0
    places = {"RUN": tmp_path / "run", "DATA": tmp_path / "pictures", "CACHE": tmp_path / "tables"}
    assert unlisted(opened, MODEL=tiny_vlm("blip_vqa"), **places) == []


def test_features(tmp_path, vision, reads):
    (tmp_path / "pictures").mkdir()
    write_images(tmp_path / "pictures")
    images = [str(tmp_path / "pictures")]
    values = {"pipeline": "extract_features", "output": str(tmp_path / "features"), "images": images, "vision": vision}
    command = ["features", written(tmp_path / "config.yaml", **values)]
    assert main(command) == 0
    with reads() as opened:
        assert main(command) == 0
    tower = Path(vision["pretrained"]).parent
    assert unlisted(opened, FEATURES=tmp_path / "features", DATA=tmp_path / "pictures", TOWER=tower) == []


def test_a_reader_that_is_not_on_the_list_is_named(images, reads, monkeypatch):
    """One that is made up: a note in the run decides the seed."""
    resumed = RunDirectory.resume

    def with_note(path, *arguments):
        json.loads((path / "note.json").read_text())
        return resumed(path, *arguments)

    monkeypatch.setattr(RunDirectory, "resume", with_note)
    (images["RUN"] / "note.json").write_text('{"seed": 3}')
    with reads() as opened:
        assert main(again(images["RUN"])) == 0
    assert unlisted(opened, **images) == ["RUN/note.json"]
