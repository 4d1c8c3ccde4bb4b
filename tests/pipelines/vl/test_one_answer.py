"""The same answers have one score, whoever made them and in whose file they are."""

import json
import re

import pytest
import torch
import yaml

from dora_mm.cli import main
from dora_mm.models.vl.vlm.network import VLMNetwork
from tests.shared.data import vl_files as files
from tests.shared.data.vlm_rows import save_noise
from tests.shared.local_server import started, text_of

# label, what the model wrote, and whether it had more to write
ROWS = [
    ("yes", "<think>There is no dog</think>\n\nYes", False),
    ("yes", "<think>it is", True),  # POPE's own script takes no answer for yes
    ("no", "No.", False),
    ("no", "<think>there is not", True),
    ("yes", "Yes", True),
    ("no", "The user wants a word.</think>No", False),  # the template has begun the thought
    ("yes", "No", False),
    ("no", "<think>\n\n</think>\n\nno", False),
]
LABELS, TEXTS, CUT = zip(*ROWS, strict=True)
SCORE, SCORE_WITH_THOUGHTS = 62.5, 50.0  # rows 0, 2, 4, 5 and 7 are right, and with thoughts 1, 2, 3 and 4
MISSING = "2 of 8 answers are missing, and score 0 (ids 1, 3)"
AT_THE_LIMIT = "3 of 8 answers were cut at decode.max_new_tokens (ids 1, 3, 4)"
THOUGHTS = "thoughts were removed from 4 of 8 answers"


@pytest.fixture
def data(tmp_path):
    """POPE's file, in which each question has its number."""
    rows = []
    for number, label in enumerate(LABELS):
        save_noise(tmp_path / f"{number}.jpg", number, 40, 60)
        rows.append({"question_id": number, "image": f"{number}.jpg", "text": f"Is {number} there?", "label": label})
    return files.write_lines(tmp_path / "coco_pope_random.json", rows)


def evaluated(tmp_path, data, pipeline, **settings):
    """Runs an evaluation; returns its folder."""
    valid = {"format": "pope", "file": str(data), "images": str(tmp_path)}
    values = {
        "pipeline": pipeline,
        "name": "one",
        "data": {"task": "pope", "valid": valid, "tables": str(tmp_path / "tables")},
        "output": str(tmp_path / pipeline),
        **settings,
    }
    config = tmp_path / f"{pipeline}.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["eval", str(config)]) == 0
    return tmp_path / pipeline


def run_eval_server(tmp_path, data, monkeypatch, tiny_vlm, **decode):
    """A server whose thoughts are apart where it finds them, and whose answer without text is null."""
    server = started()

    def say(body):
        number = int(re.search(r"\d", text_of(body))[0])
        server.reason = "length" if CUT[number] else "stop"
        if number == 1:
            return {"role": "assistant", "content": None, "reasoning_content": "it is"}
        return TEXTS[number]

    server.say = say
    about = {"url": f"http://127.0.0.1:{server.server_port}/v1", "concurrency": 1}
    try:
        return evaluated(tmp_path, data, "eval_server", server=about, decode=decode)
    finally:
        server.shutdown()
        server.server_close()


def run_eval_vl(tmp_path, data, monkeypatch, tiny_vlm, **decode):
    """A model whose tokens are those of the answers."""
    folder = tiny_vlm("qwen2_5_vl")
    numbers = iter(range(8))

    def generate(self, inputs, settings, **_):
        from transformers import AutoTokenizer

        number = next(numbers)
        ids = AutoTokenizer.from_pretrained(folder)(TEXTS[number])["input_ids"]
        return torch.tensor([[*ids, *([] if CUT[number] else settings.eos_token_id[:1])]])

    monkeypatch.setattr(VLMNetwork, "generate", generate)
    about = {"model": {"path": str(folder)}, "decode": {"batch_size": 1, **decode}}
    return evaluated(tmp_path, data, "eval_vl", **about)


EVALUATIONS = {"eval_server": run_eval_server, "eval_vl": run_eval_vl}


def batch(path):
    rows = []
    for number, (text, cut) in enumerate(zip(TEXTS, CUT, strict=True)):
        message = {"role": "assistant", "content": text}
        if number == 1:
            message |= {"content": None, "reasoning_content": "it is"}
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        response = {"status_code": 200, "body": {"choices": [choice]}}
        rows.append({"id": f"r{number}", "custom_id": str(number), "response": response, "error": None})
    return files.write_lines(path, rows)


def samples(path):
    return files.write_lines(
        path,
        [
            {"doc_id": number, "target": LABELS[number], "resps": [[text]], "filtered_resps": [text]}
            for number, text in enumerate(TEXTS)
        ],
    )


def table(path):
    rows = [["index", "question", "answer", "prediction"]]
    rows += [[str(number), f"Is {number} there?", LABELS[number], text] for number, text in enumerate(TEXTS)]
    rows[2][3] = ""  # an empty cell
    if path.suffix == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
        return path
    cells = ["\t".join(f'"{cell}"' if "\n" in cell else cell for cell in row) for row in rows]
    return files.write_text(path, "\n".join(cells) + "\n")


OTHERS = {"batch.jsonl": batch, "samples.jsonl": samples, "results.xlsx": table, "results.tsv": table}


def scored(capsys, path, *arguments):
    assert main(["score", str(path), *map(str, arguments)]) == 0
    return capsys.readouterr().out


def accuracy(text):
    return float(re.search(r"\| accuracy \| ([\d.]+) \|", text)[1])


@pytest.mark.parametrize("pipeline", EVALUATIONS)
def test_an_evaluation_counts_as_the_score_of_its_file(tmp_path, data, monkeypatch, tiny_vlm, capsys, pipeline):
    folder = EVALUATIONS[pipeline](tmp_path, data, monkeypatch, tiny_vlm)
    printed = capsys.readouterr().out
    again = scored(capsys, folder / "scored_pope.jsonl")
    for text in (printed, again):
        assert accuracy(text) == SCORE
        assert all(note in text for note in (MISSING, AT_THE_LIMIT, THOUGHTS))
    rows = [json.loads(line) for line in (folder / "scored_pope.jsonl").read_text().splitlines()[1:]]
    assert [row["answer"] for row in rows] == ["Yes", "", "No.", "", "Yes", "No", "No", "no"]
    assert [row["ended"] for row in rows] == ["length" if cut else "stop" for cut in CUT]
    assert [row["score"] for row in rows] == [1, 0, 1, 0, 1, 1, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", EVALUATIONS)
def test_thoughts_may_be_a_part_of_answers(tmp_path, data, monkeypatch, tiny_vlm, capsys, pipeline):
    folder = EVALUATIONS[pipeline](tmp_path, data, monkeypatch, tiny_vlm)
    capsys.readouterr()
    later = scored(capsys, folder / "scored_pope.jsonl", "--keep-thoughts")
    folder.rename(tmp_path / "without")
    folder = EVALUATIONS[pipeline](tmp_path, data, monkeypatch, tiny_vlm, keep_thoughts=True)
    printed = capsys.readouterr().out
    for text in (later, printed, scored(capsys, folder / "scored_pope.jsonl")):
        assert accuracy(text) == SCORE_WITH_THOUGHTS
        assert "missing" not in text
        assert "thoughts were removed" not in text


@pytest.mark.parametrize("name", ["batch.jsonl", "samples.jsonl"])
def test_thoughts_may_be_a_part_of_the_answers_of_other_programs(tmp_path, data, capsys, name):
    text = scored(capsys, OTHERS[name](tmp_path / name), "--suite", "pope", "--data", data, "--keep-thoughts")
    assert accuracy(text) == SCORE_WITH_THOUGHTS


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_programs_have_the_same_score(tmp_path, data, capsys, name):
    text = scored(capsys, OTHERS[name](tmp_path / name), "--suite", "pope", "--data", data)
    assert accuracy(text) == SCORE
    assert MISSING in text
    assert (AT_THE_LIMIT in text) == (name == "batch.jsonl")  # others do not say why an answer ended
    num_thoughts = 3 if name.startswith("results") else 4  # an empty cell has no thought
    assert THOUGHTS.replace("4", str(num_thoughts), 1) in text


def test_the_pages_of_both_evaluations_are_the_same(tmp_path, data, monkeypatch, tiny_vlm):
    pages = [run(tmp_path, data, monkeypatch, tiny_vlm) / "examples.html" for run in EVALUATIONS.values()]
    assert pages[0].read_text() == pages[1].read_text()
