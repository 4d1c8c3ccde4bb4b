"""Evaluations whose answers come from a server of the test's own."""

import base64
import io
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from PIL import Image

from dora_mm.cli import main
from dora_mm.models.vl import server as served
from tests.shared.data import vl_files as files
from tests.shared.data.vlm_rows import save_noise
from tests.shared.local_server import Sent, started, text_of

KEY = "sk-never-recorded-4711"


@pytest.fixture
def server(monkeypatch) -> Iterator[Any]:
    monkeypatch.setattr(served, "WAITS", (0.01, 0.01))
    own = started()
    yield own
    own.shutdown()
    own.server_close()


@pytest.fixture
def config(server, tmp_path):
    """An evaluation of POPE on six made-up rows."""
    rows = []
    for number in range(6):
        save_noise(tmp_path / f"{number // 2}.jpg", number, 40, 60)
        thing = "dog" if number % 2 else "cat"
        label = "yes" if number in (1, 2, 3) else "no"
        rows.append(
            {"question_id": number, "image": f"{number // 2}.jpg", "text": f"Is there a {thing}?", "label": label}
        )
    values = {
        "pipeline": "eval_server",
        "server": {"url": f"http://127.0.0.1:{server.server_port}/v1", "concurrency": 2},
        "data": {
            "task": "pope",
            "valid": {
                "format": "pope",
                "file": str(files.write_lines(tmp_path / "coco_pope_random.json", rows)),
                "images": str(tmp_path),
            },
            "tables": str(tmp_path / "tables"),
        },
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_answers_of_a_server_are_scored_as_all_others(server, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(served.KEY_VARIABLE, KEY)
    server.codes = [503]
    assert main(["eval", config]) == 0
    printed = capsys.readouterr()
    assert "| accuracy | 66.67 | POPE's evaluate.py" in printed.out
    assert server.keys == {f"Bearer {KEY}"}
    assert len(server.bodies) == 6
    first = min(server.bodies, key=lambda body: text_of(body))
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "model": "served-vlm",
        "max_tokens": 16,
        "temperature": 0.0,
        "stream": True,
    }
    image, question = first["messages"][0]["content"]
    assert question["text"] == "Is there a cat?\nAnswer the question using a single word or phrase."
    head, _, packed = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(packed))).size == (60, 40)
    assert main(["score", str(tmp_path / "run" / "scored_pope.jsonl")]) == 0
    assert "| accuracy | 66.67 |" in capsys.readouterr().out
    for file in (file for file in (tmp_path / "run").rglob("*") if file.is_file()):
        assert KEY.encode() not in file.read_bytes(), file
    assert KEY not in printed.out + printed.err


def test_a_stopped_evaluation_goes_on_and_asks_only_what_is_missing(server, config, tmp_path, capsys):
    server.codes = [200, 200, 200, 200, 400]
    assert main(["eval", config]) == 2
    assert "refuses it with code 400" in capsys.readouterr().err
    num_answered = len(server.bodies)
    assert 4 <= num_answered <= 5
    server.bodies.clear()
    assert main(["eval", config]) == 0
    assert len(server.bodies) == 6 - num_answered
    server.bodies.clear()
    assert main(["eval", config]) == 0
    assert server.bodies == []


def test_answers_that_did_not_arrive_are_missing_and_asked_for_at_the_next_start(
    server, config, tmp_path, capsys, caplog
):
    endless = Sent(itertools.repeat(b" "), wait=0.05)
    server.say = lambda body: endless if "dog" in text_of(body) else "No."
    assert main(["eval", config, "--set", "server.timeout=0.2"]) == 0
    printed = capsys.readouterr().out
    missing = "3 of 6 answers are missing, and score 0 (ids 1, 3, 5); 3 had not ended after 0.2 s (server.timeout)"
    assert missing in printed
    assert "row 1 of pope: its answer had not ended after 0.2 s" in caplog.text
    assert main(["score", str(tmp_path / "run" / "scored_pope.jsonl")]) == 0
    assert missing in capsys.readouterr().out
    server.bodies.clear()
    server.say = lambda body: "Yes"
    assert main(["eval", config, "--set", "server.concurrency=3"]) == 0
    assert sorted(text_of(body)[:15] for body in server.bodies) == ["Is there a dog?"] * 3
    assert "missing" not in capsys.readouterr().out


def test_answers_are_written_as_they_come(server, config, tmp_path):
    """Those behind one that takes long are there before it."""
    file, seen, first = tmp_path / "run" / "answers" / "pope.jsonl", [], [True]

    def say(body):
        if first and first.pop():  # others are asked for meanwhile
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and len(seen) < 5:
                seen[:] = [line for line in file.read_text().splitlines() if line.startswith("[")]
                time.sleep(0.01)
        return "No."

    server.say = say
    assert main(["eval", config]) == 0
    assert len(seen) == 5


@pytest.mark.slow
def test_rows_that_a_server_refuses_may_be_left_out(server, config, caplog):
    server.codes = [400]
    assert main(["eval", config, "--set", "data.on_bad_data=skip", "server.concurrency=1"]) == 0
    assert "row 0 of pope: server.url: " in caplog.text
    assert "maximum context length is 8 tokens" in caplog.text
    assert "1 of 6 rows of pope could not be read, and were left out" in caplog.text


def test_rows_that_nobody_answered_are_never_left_out(server, config, tmp_path, capsys):
    server.codes = [200] + [503] * 9
    assert main(["eval", config, "--set", "data.on_bad_data=skip", "server.concurrency=1"]) == 2
    assert "refuses it with code 503" in capsys.readouterr().err
    assert not (tmp_path / "run" / "scores.json").exists()


def test_settings_of_answers_are_sent_and_kept(server, config, tmp_path):
    settings = ["decode.temperature=0.7", "decode.top_p=0.9", "decode.seed=3", "decode.stop=[END]"]
    assert main(["eval", config, "--set", *settings, "decode.max_new_tokens=5"]) == 0
    sent = server.bodies[0]
    assert [sent[key] for key in ("temperature", "top_p", "seed", "stop", "max_tokens")] == [0.7, 0.9, 3, ["END"], 5]
    first = json.loads((tmp_path / "run" / "scored_pope.jsonl").read_text().splitlines()[0])
    assert first["settings"]["decode"]["temperature"] == 0.7
    assert first["digests"]["the model of the server"] == "served-vlm"


@pytest.mark.slow
def test_answers_that_are_cut_are_counted(server, config, capsys):
    server.reason = "length"
    assert main(["eval", config]) == 0
    assert "6 of 6 answers were cut at decode.max_new_tokens (ids 0, 1, 2, 3, 4, ...)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([401] * 4, "wants a key: set the variable DORA_MM_API_KEY (code 401)"),
        ([503] * 9, "refuses it with code 503"),
        ([302] * 4, "refuses it with code 302"),
        ([404] * 4, "refuses it with code 404"),
    ],
)
def test_refusals_of_a_server(server, config, capsys, codes, message):
    server.codes = codes
    assert main(["eval", config]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("dora-mm: server.url: http://127.0.0.1:")


@pytest.mark.slow
def test_the_model_is_named_where_there_are_several(server, config, capsys):
    server.models = ["one", "two"]
    assert main(["eval", config]) == 2
    assert "serves one, two: name one of these" in capsys.readouterr().err
    assert main(["eval", config, "--set", "server.model=two"]) == 0
    assert {body["model"] for body in server.bodies} == {"two"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("server.url=localhost:8000", "must be an address such as http://localhost:8000/v1"),
        ("server.url=http://me:secret@localhost/v1", "a key belongs into the variable DORA_MM_API_KEY"),
        ("server.url=http://localhost/v1?key=secret", "a key belongs into the variable"),
        ("decode.seed=3", "seed has no effect with temperature 0"),
        ("prompts={vqa: x}", "prompts: vqa has no effect"),
        ("data.task=tvqa", "is only for"),
    ],
)
def test_settings_that_cannot_be(config, capsys, setting, message):
    assert main(["eval", config, "--set", setting]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_not_there(config, capsys):
    assert main(["eval", config, "--set", "server.url=http://127.0.0.1:1/v1"]) == 2
    assert "server.url: http://127.0.0.1:1/v1 cannot be reached" in capsys.readouterr().err


def test_conversations_and_images_of_other_kinds(server, tmp_path):
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    said = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "<image>\nWhat? <image>"}]
    rows = [{"image": ["clear.png", "turned.jpg"], "conversations": [*said, {"from": "gpt", "value": "yes"}]}]
    config = {
        "pipeline": "eval_server",
        "server": {"url": f"http://127.0.0.1:{server.server_port}/v1"},
        "data": {
            "valid": {
                "format": "chat",
                "file": str(files.write_json(tmp_path / "c.json", rows)),
                "images": str(tmp_path),
            },
            "tables": str(tmp_path / "tables"),
        },
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "config.yaml")]) == 0
    system, user = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Be kind."}
    first, text, second = user["content"]
    assert text == {"type": "text", "text": "\nWhat? "}
    images = [
        Image.open(io.BytesIO(base64.b64decode(item["image_url"]["url"].partition(",")[2]))) for item in (first, second)
    ]
    assert [(image.format, image.size) for image in images] == [("PNG", (8, 4)), ("PNG", (4, 8))]
    assert images[0].convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_several_processes_ask_no_server(server, config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", config]) == 2
    assert "server.concurrency rows at a time in one process" in capsys.readouterr().err
    assert server.bodies == []
