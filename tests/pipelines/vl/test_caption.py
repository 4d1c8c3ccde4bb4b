"""dora-mm caption: a model's captions of the images that have none."""

import json
import shutil

import pytest

from dora_mm.cli import main
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.recipes import PIPELINES


@pytest.fixture
def folder(image_folder):
    """Five images of which the first has a caption."""
    (image_folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "mine"}\n')
    shutil.copy(image_folder / "0.png", image_folder / "0.mask.png")
    return image_folder


@pytest.fixture
def captioned(folder, tiny_vlm, capsys):
    def run(*arguments):
        code = main(["caption", str(folder), "--model", str(tiny_vlm("llava")), "--max-new-tokens", "4", *arguments])
        return code, capsys.readouterr()

    return run


def asked(capsys, tiny_vlm, image, prompt):
    main(["ask", str(tiny_vlm("llava")), str(image), prompt, "--max-new-tokens", "4"])
    return " ".join(capsys.readouterr().out.split())


def test_captions_are_the_answers_of_ask_and_never_replace_one(folder, captioned, tiny_vlm, capsys):
    code, shown = captioned("--prompt", "What is it?")
    assert code == 0
    assert shown.out == f"4 captions in {folder / 'metadata.jsonl'}, 1 images had theirs\n"
    captions = {image.path.name: image.caption for image in read_captioned_images(folder)}
    assert captions["0.png"] == "mine"
    assert len(captions) == 5
    for name in ("1.png", "4.png"):
        assert captions[name] == asked(capsys, tiny_vlm, folder / name, "What is it?")
    before = (folder / "metadata.jsonl").read_bytes()
    assert captioned()[1].out == f"all 5 images of {folder} have captions\n"
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_a_killed_command_goes_on(folder, captioned, monkeypatch):
    """Also where the last line was not written to its end."""
    assert captioned("--batch-size", "3")[0] == 0
    file = folder / "metadata.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])
    recipe = PIPELINES.load("caption")
    asked_for, own = [], recipe.write_captions
    monkeypatch.setattr(
        recipe, "write_captions", lambda vl, images, *rest: asked_for.extend(images) or own(vl, images, *rest)
    )
    assert captioned("--batch-size", "3")[0] == 0
    assert [path.name for path in asked_for] == [json.loads(line)["file_name"] for line in lines[3:]]
    assert [json.loads(line)["file_name"] for line in file.read_text().splitlines()] == [f"{n}.png" for n in range(5)]


def test_a_last_line_without_an_end_is_kept(folder, captioned):
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    assert captioned()[0] == 0
    assert len(read_captioned_images(folder)) == 5


def test_what_cannot_be_captioned_is_refused(folder, captioned):
    file = folder / "metadata.jsonl"
    file.write_text('{"file_name": "0.png", "text": ""}\nnonsense')
    code, shown = captioned()
    assert code == 2
    assert "metadata.jsonl line 2 is not valid JSON" in shown.err
    assert "metadata.jsonl names 0.png without a caption: remove its line" in shown.err
    assert file.read_text().endswith("nonsense")
    file.rename(folder / "metadata.csv")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,mine\n")
    code, shown = captioned()
    assert code == 2
    assert "has metadata.csv, beside which metadata.jsonl is not read" in shown.err
    assert captioned("--prompt", " ")[0] == 2


def test_empty_answers_are_named_and_asked_again(folder, captioned, caplog, monkeypatch):
    class Silent:
        question_task = "chat"

        def answerer(self, *settings):
            return lambda examples, folder: ["" if "1.png" in each.images[0] else " a\n cat " for each in examples]

    monkeypatch.setattr(PIPELINES.load("caption"), "load_for_questions", lambda *given, **named: Silent())
    assert captioned()[1].out.startswith("3 captions in")
    assert "1 images got an empty answer, and have no caption: 1.png" in caplog.text
    captions = {image.path.name: image.caption for image in read_captioned_images(folder, instance_prompt="none")}
    assert captions == {"0.png": "mine", "1.png": "none", "2.png": "a cat", "3.png": "a cat", "4.png": "a cat"}
