"""Evaluations of transformers' vision-language models."""

import base64
import json
import shutil

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.models.vl.vlm.answers import VLMAnswers
from tests.models.vl.vlm.vlm_rows import write_pictures


@pytest.fixture
def config(tiny_vlm, tmp_path):
    """An evaluation of a tiny LLaVA on these images, with a question about each."""

    def write(images, **decode):
        said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "noise"}]
        rows = [{"image": image, "conversations": said} for image in images]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        valid = {"format": "chat", "file": str(tmp_path / "rows.json")}
        values = {
            "pipeline": "eval_vl",
            "model": {"path": str(tiny_vlm("llava"))},
            "data": {"valid": valid, "tables": str(tmp_path / "tables")},
            "decode": {"max_new_tokens": 1, **decode},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "config.yaml")

    return write


def test_the_page_shows_images_that_rows_contain_or_name_in_full(config, tmp_path):
    picture = write_pictures(tmp_path) / "wide.png"
    embedded = base64.b64encode(picture.read_bytes()).decode()
    assert main(["eval", config([str(picture), embedded])]) == 0
    assert (tmp_path / "run" / "examples.html").read_text().count("data:image/") == 2


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_evaluation_that_was_stopped_goes_on_in_its_folder(config, tmp_path, monkeypatch, capsys):
    """Answers of whole batches stay, as far as they are as they were written; the files are those of a whole one."""
    folder, kept = tmp_path / "run", tmp_path / "run" / "answers" / "chat.jsonl"
    path = config([str(write_pictures(tmp_path) / "wide.png")] * 7, batch_size=2)
    assert main(["eval", path]) == 0
    whole = files_of(folder)
    shutil.rmtree(folder)
    answerer, sizes, stop_after = VLMAnswers.answerer, [], 2

    def counted(*arguments):
        answer = answerer(*arguments)

        def answer_batch(examples, images):
            if len(sizes) == stop_after:
                raise KeyboardInterrupt
            sizes.append(len(examples))
            return answer(examples, images)

        return answer_batch

    monkeypatch.setattr(VLMAnswers, "answerer", counted)
    assert main(["eval", path]) == 130
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    stop_after = None
    damaged = [*lines[:3], lines[3].replace("[", "[1")]
    for left, remaining in ((lines, [2, 1]), (damaged, [2, 2, 1]), ([*lines[:2], '["'], [2, 2, 1])):
        kept.write_text("".join(left))
        sizes.clear()
        assert main(["eval", path]) == 0
        assert sizes == remaining
        assert files_of(folder) == whole
    shutil.copy(tmp_path / "tall.png", tmp_path / "wide.png")  # what was said of the old one is said anew
    sizes.clear()
    assert main(["eval", path]) == 0
    assert sizes == [2, 2, 2, 1]
    config([str(tmp_path / "wide.png")] * 6, batch_size=2)
    assert main(["eval", path]) == 2
    assert "was started with different values of the data of chat: choose another folder" in capsys.readouterr().err
