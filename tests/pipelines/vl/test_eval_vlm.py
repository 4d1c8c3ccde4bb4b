"""Evaluations of transformers' vision-language models."""

import base64
import json
import shutil

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.models.vl.vlm.answers import VLMAnswers
from tests.pipelines.files.test_merge import vlm_adapter
from tests.shared.data.vlm_rows import write_images


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
            "data": {"absolute_paths": True, "valid": valid, "tables": str(tmp_path / "tables")},
            "decode": {"max_new_tokens": 1, **decode},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "config.yaml")

    return write


def test_the_page_shows_images_that_rows_contain_or_name_in_full(config, tmp_path):
    image = write_images(tmp_path) / "wide.png"
    embedded = base64.b64encode(image.read_bytes()).decode()
    assert main(["eval", config([str(image), embedded])]) == 0
    assert (tmp_path / "run" / "examples.html").read_text().count("data:image/") == 2


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_evaluation_that_was_stopped_goes_on_in_its_folder(config, tmp_path, monkeypatch, capsys):
    """Answers of whole batches stay, as far as they are as they were written; the files are those of a whole one."""
    folder, kept = tmp_path / "run", tmp_path / "run" / "answers" / "chat.jsonl"
    path = config([str(write_images(tmp_path) / "wide.png")] * 7, batch_size=2)
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
    assert len(lines) == 5  # the first has the circumstances
    stop_after = None
    damaged = [*lines[:4], lines[4].replace("[", "[1")]
    for left, remaining in ((lines, [2, 1]), (damaged, [2, 2, 1]), ([*lines[:3], '["'], [2, 2, 1])):
        kept.write_text("".join(left))
        sizes.clear()
        assert main(["eval", path]) == 0
        assert sizes == remaining
        assert files_of(folder) == whole
    sizes.clear()
    copied = shutil.copytree(folder, tmp_path / "another name")
    assert main(["eval", path, "--set", f"output={copied}"]) == 0
    assert (sizes, files_of(copied)) == ([], whole)
    shutil.copy(tmp_path / "tall.png", tmp_path / "wide.png")  # what was said of the old one is said anew
    sizes.clear()
    assert main(["eval", path]) == 0
    assert sizes == [2, 2, 2, 1]
    config([str(tmp_path / "wide.png")] * 6, batch_size=2)
    assert main(["eval", path]) == 2
    assert "was started with different values of the data of chat: choose another folder" in capsys.readouterr().err


def test_answers_of_other_circumstances_stay_and_are_named(config, tmp_path, monkeypatch, caplog):
    kept = tmp_path / "run" / "answers" / "chat.jsonl"
    path = config([str(write_images(tmp_path) / "wide.png")] * 5, batch_size=2)
    assert main(["eval", path]) == 0
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:3]))  # stopped after a batch
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert main(["eval", path]) == 0
    other = "computed under other circumstances, which may change last bits: "
    said = [message for message in caplog.messages if "circumstances" in message]
    assert said == [f"2 of 2 kept answers of chat were {other}MKL_CBWR none is COMPATIBLE"]
    mixed = f"2 of 5 answers were {other}MKL_CBWR none is COMPATIBLE"
    for name in ("report.md", "scores.json", "scored_chat.jsonl"):
        assert mixed in (tmp_path / "run" / name).read_text()


def test_the_share_of_answers_that_stay_the_same(config, tmp_path, tiny_vlm, capsys):
    """Counted again from the submissions, which have the answers by id; it is 1 for the same adapter, and merged."""
    images = [str(image) for image in sorted(write_images(tmp_path).glob("*.png"))] * 3
    path = config(images, max_new_tokens=4)
    base, adapter = str(tiny_vlm("llava")), vlm_adapter(tiny_vlm("llava"), tmp_path / "adapter")
    assert main(["eval", path, "--set", f"adapter={adapter}"]) == 0
    assert main(["convert", str(adapter), str(tmp_path / "lora"), "--to", "lora", "--rank", "1", "--base", base]) == 0
    assert main(["merge", base, str(adapter), str(tmp_path / "merged")]) == 0
    shares = {}
    for name, key in (("adapter", "adapter"), ("lora", "adapter"), ("merged", "model.path")):
        given = [f"{key}={tmp_path / name}", f"same_as={tmp_path / 'run'}", f"output={tmp_path / f'run-{name}'}"]
        assert main(["eval", path, "--set", *given, "decode.batch_size=5"]) == 0
        answers = [
            [
                json.loads(line)["answer"]
                for line in (tmp_path / run / "predictions_chat.jsonl").read_text().splitlines()
            ]
            for run in ("run", f"run-{name}")
        ]
        shares[name] = sum(ours == theirs for ours, theirs in zip(*answers, strict=True)) / len(images)
        found = json.loads((tmp_path / f"run-{name}" / "same_answers.json").read_text())["chat"]
        assert (found["mean"], found["rows"]) == (shares[name], len(images))
        assert f"same     {100 * shares[name]:.1f} (" in capsys.readouterr().out
    assert shares["adapter"] == shares["merged"] == 1.0
    assert shares["lora"] < 1.0


def test_only_an_evaluation_of_the_same_rows_is_compared_with(config, tmp_path, capsys):
    write_images(tmp_path)
    wide, tall = str(tmp_path / "wide.png"), str(tmp_path / "tall.png")
    path = config([wide, tall])
    assert main(["eval", path]) == 0
    again = [f"same_as={tmp_path / 'run'}", f"output={tmp_path / 'again'}"]

    def refused(*overrides: str) -> str:
        assert main(["eval", path, "--set", *again, *overrides]) == 2
        assert not (tmp_path / "again").exists()
        return capsys.readouterr().err

    assert "another decode section" in refused("decode.max_new_tokens=2")
    assert "same_as" in refused(f"same_as={tmp_path / 'missing'}")
    config([wide])
    assert "answered other rows than these, by the data of chat" in refused()
    config([wide, tall])
    kept = tmp_path / "run" / "answers" / "chat.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text(lines[0])
    assert "has no answers to all rows of chat" in refused()
    kept.write_text("".join(lines))
    shutil.copy(tall, wide)
    assert main(["eval", path, "--set", *again]) == 2
    assert "row 1, are not those of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_share_of_drawn_answers_that_a_batch_changes_in_half_precision(config, tmp_path, capsys):
    """Counted again from the answers of a run without batches; in float32 nothing is said, since none differ."""
    images = [str(image) for image in sorted(write_images(tmp_path).glob("*.png"))] * 5
    path = config(images, max_new_tokens=8, temperature=2.0)

    def run(name, dtype, batch_size):
        changes = [f"output={tmp_path / name}", f"model.dtype={dtype}", f"decode.batch_size={batch_size}"]
        assert main(["eval", path, "--set", *changes]) == 0
        first, *rows = map(json.loads, (tmp_path / name / "scored_chat.jsonl").read_text().splitlines())
        return [row["answer"] for row in rows], first["settings"].get("others_alone"), capsys.readouterr().out

    batched, others, printed = run("batched", "bfloat16", 16)
    alone, none, unsaid = run("alone", "bfloat16", 1)
    assert others["chat"]["rows"] == len(images)
    share = sum(one != other for one, other in zip(batched, alone, strict=True)) / len(images)
    assert share == pytest.approx(others["chat"]["mean"])
    assert f"alone    {100 * share:.1f} (" in printed
    assert "bfloat16" in printed
    assert (none, "alone  " in unsaid) == (None, False)
    exact, none, unsaid = run("exact", "float32", 16)
    assert (none, "alone  " in unsaid) == (None, False)
    assert exact == run("exact-alone", "float32", 1)[0]
