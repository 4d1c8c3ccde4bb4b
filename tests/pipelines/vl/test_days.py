"""Runs whose chat template writes the day: it stays theirs, however many days pass, and is kept where it is asked."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import yaml

from dora_mm.adapting.files import header_of
from dora_mm.cli import main
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.studies.campaigns import subprocesses, trainings
from dora_mm.studies.campaigns.subprocesses import TrainingProcess
from dora_mm.tasks.preferences import Preferences
from dora_mm.train.state_file import read_state
from tests.shared.clock import Clock
from tests.shared.data.text_rows import write_texts
from tests.shared.data.vl_files import write_json
from tests.shared.killed import assert_same_weights
from tests.shared.vl.templates import DATED

FIRST, LATER = "2026-12-01", "2026-12-04"


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, FIRST)


@pytest.fixture(scope="module")
def base(tiny_vlm, tmp_path_factory):
    """A language model whose template writes the day into rows without a system turn."""
    folder = shutil.copytree(tiny_vlm("qwen2"), tmp_path_factory.mktemp("models") / "dated")
    (folder / "chat_template.jinja").write_text(DATED["mistral"])
    return folder


def write_config(folder, base, name, **sections):
    data = {**(sections.pop("data", None) or write_texts(folder)), "tables": str(folder / "tables")}
    values = {"model": {"path": str(base)}, "data": data, "output": str(folder / name), **sections}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return str(folder / f"{name}.yaml")


def training(folder, base, name="whole", **sections):
    settings = {
        "pipeline": "train_vl",
        "adapter": {"rank": 2},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 4, "batch_size": 2, "log_every": 1},
        "evaluate": {"max_new_tokens": 2},
    }
    return write_config(folder, base, name, **settings, **sections)


def evaluation(folder, base, name, **sections):
    decode = {"max_new_tokens": 4, "batch_size": 1}
    return write_config(folder, base, name, pipeline="eval_vl", decode=decode, **sections)


def interrupt(monkeypatch, kind, method, count):
    """Presses Ctrl-C in the call of this number."""
    whole, calls = getattr(kind, method), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return whole(*args, **kwargs)

    monkeypatch.setattr(kind, method, counted)
    return lambda: monkeypatch.setattr(kind, method, whole)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def days_of(kept):
    """The days of the answers in a file, whose other lines have circumstances."""
    return [row[3] for row in rows_of(kept) if isinstance(row, list)]


def test_a_training_goes_on_three_days_later_with_its_rows(base, tmp_path, clock, monkeypatch, caplog):
    caplog.set_level("INFO")
    config = training(tmp_path, base)
    assert main(["train", config]) == 0
    assert f"The chat template asks for the day: rows have {FIRST}, today (model.date gives another day)" in caplog.text
    stopped = tmp_path / "stopped"
    go_on = interrupt(monkeypatch, VLM, "loss", 2)
    assert main(["train", config, "--set", f"output={stopped}"]) == 130
    go_on()
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000002"]
    clock.pass_days(3)
    assert main(["train", "--resume", str(stopped)]) == 0
    assert f"rows have {FIRST}, the day on which {stopped} began" in caplog.text
    assert_same_weights("step-000004", tmp_path / "whole", stopped)
    whole, found = (header_of(run / "adapter") for run in (tmp_path / "whole", stopped))
    assert {key: text.replace("stopped", "whole") for key, text in found.items()} == whole
    assert found["day"] == FIRST
    assert json.loads((stopped / "summary.json").read_text())["day"] == FIRST
    assert yaml.safe_load((stopped / "config.yaml").read_text())["model"]["date"] is None
    gpu = (stopped / "adapter" / "README.md").read_text()
    assert f"The day of its rows, which the chat template asks for: `{FIRST}`." in gpu


@pytest.mark.slow
def test_pairs_are_compared_with_the_reference_of_the_first_day(base, tmp_path, clock, monkeypatch):
    pairs = [{"prompt": f"{word}?", "chosen": "It is.", "rejected": "no"} for word in ("Is it", "Red", "Warm", "Two")]
    source = {"format": "preferences", "file": str(write_json(tmp_path / "pairs.json", pairs))}
    data = {"task": "preference", "train": source}
    config = training(tmp_path, base, data=data)
    settings = ["adapter.extra_trainable=[norms]", "train.checkpoint_every=1"]
    assert main(["train", config, "--set", *settings]) == 0
    stopped = tmp_path / "stopped"
    go_on = interrupt(monkeypatch, Preferences, "loss", 2)
    assert main(["train", config, "--set", *settings, f"output={stopped}"]) == 130
    go_on()
    clock.pass_days(3)
    assert main(["train", "--resume", str(stopped)]) == 0
    assert_same_weights("step-000004", tmp_path / "whole", stopped)
    state = read_state(stopped / "checkpoints" / "step-000004" / "state.safetensors")
    assert len(state["reference"]["keys"]) == len(pairs)
    assert state["row counts"]["day"] == FIRST


@pytest.mark.slow
def test_a_new_training_has_the_day_of_its_own_or_that_of_its_config(base, tmp_path, clock, capsys):
    config = training(tmp_path, base)
    assert main(["train", config]) == 0
    clock.pass_days(3)
    later, dated = tmp_path / "later", tmp_path / "dated"
    assert main(["train", config, "--set", f"output={later}"]) == 0
    assert header_of(later / "adapter")["day"] == LATER
    with pytest.raises(AssertionError):
        assert_same_weights("step-000004", later, tmp_path / "whole")
    assert main(["train", config, "--set", f"output={dated}", f"model.date={FIRST}"]) == 0
    assert_same_weights("step-000004", dated, tmp_path / "whole")
    capsys.readouterr()
    assert main(["train", "--resume", str(later), "--set", "train.steps=8", f"model.date={FIRST}"]) == 2
    assert "the finished steps have read rows of the old day" in capsys.readouterr().err


def test_an_evaluation_goes_on_three_days_later_with_its_answers(base, tmp_path, clock, monkeypatch):
    path = evaluation(tmp_path, base, "whole")
    assert main(["eval", path]) == 0
    stopped = [f"output={tmp_path / 'stopped'}"]
    go_on = interrupt(monkeypatch, VLMAnswers, "generate", 2)
    assert main(["eval", path, "--set", *stopped]) == 130
    clock.pass_days(3)
    go_on()
    assert main(["eval", path, "--set", *stopped]) == 0
    whole, found = ((tmp_path / run / "scored_chat.jsonl").read_text() for run in ("whole", "stopped"))
    assert found == whole
    assert json.loads(found.splitlines()[0])["day"] == FIRST
    kept = tmp_path / "stopped" / "answers" / "chat.jsonl"
    assert days_of(kept) == [FIRST] * 2
    inputs = tmp_path / "stopped" / "inputs.json"
    inputs.write_text(inputs.read_text().replace(f'"day": "{FIRST}"', f'"day": "{LATER}"'))
    assert main(["eval", path, "--set", *stopped]) == 0  # nothing that was answered on another day is taken
    assert days_of(kept) == [LATER] * 2


@pytest.mark.slow
def test_two_results_of_different_days_say_so(base, tmp_path, clock, capsys):
    path = evaluation(tmp_path, base, "whole")
    assert main(["eval", path]) == 0
    clock.pass_days(3)
    same = [f"output={tmp_path / 'later'}", f"same_as={tmp_path / 'whole'}"]
    capsys.readouterr()
    assert main(["eval", path, "--set", *same]) == 0
    printed = capsys.readouterr().out
    assert f"asks for the day: rows have {LATER} here, and {FIRST} in {tmp_path / 'whole'}" in printed
    assert json.loads((tmp_path / "later" / "same_answers.json").read_text())["days"] == [LATER, FIRST]
    both = [str(tmp_path / run / "scored_chat.jsonl") for run in ("whole", "later")]
    assert main(["score", *both]) == 0
    printed = capsys.readouterr().out
    assert f"day of the chat template: {LATER}" in printed
    assert f"The day that the chat template got: {FIRST} in {both[0]}, {LATER} in {both[1]}." in printed


@pytest.mark.slow
def test_an_adapter_is_scored_on_its_day_and_asked_on_that_of_the_question(base, tmp_path, clock, caplog, capsys):
    caplog.set_level("INFO")
    assert main(["train", training(tmp_path, base)]) == 0
    clock.pass_days(3)
    path = evaluation(tmp_path, base, "eval")

    def day_of(name, *settings):
        caplog.clear()
        assert main(["eval", path, "--set", f"output={tmp_path / name}", *settings]) == 0
        return rows_of(tmp_path / name / "scored_chat.jsonl")[0]["day"]

    adapter = f"adapter={tmp_path / 'whole'}"
    assert day_of("own", adapter) == FIRST
    assert f"rows have {FIRST}, that of the adapter" in caplog.text
    assert day_of("given", adapter, "model.date=2027-01-01") == "2027-01-01"
    assert day_of("bare") == LATER
    caplog.clear()
    assert main(["ask", str(base), "Is it?", "--adapter", str(tmp_path / "whole"), "--max-new-tokens", "1"]) == 0
    assert f"rows have {LATER}, today" in caplog.text
    capsys.readouterr()
    assert main(["train", training(tmp_path, base, "dry"), "--dry-run"]) == 0
    assert f"dated {LATER} (model.date)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_before_has_the_day_of_its_oldest_file(base, tmp_path, clock, monkeypatch, caplog):
    caplog.set_level("INFO")
    go_on = interrupt(monkeypatch, VLM, "loss", 2)
    config, run = training(tmp_path, base), tmp_path / "whole"
    assert main(["train", config]) == 130
    go_on()
    inputs = json.loads((run / "inputs.json").read_text())
    assert inputs.pop("day") == FIRST
    (run / "inputs.json").write_text(json.dumps(inputs))
    noon = 1796126400  # of 2026-12-01 in UTC, which is that day in all time zones but those of the date line
    for number, name in enumerate(("versions.json", "config.yaml", "inputs.json", "metrics.jsonl")):
        os.utime(run / name, (noon + 86400 * number, noon + 86400 * number))
    clock.pass_days(30)
    assert main(["train", "--resume", str(run)]) == 0
    assert f"rows have {FIRST}, that of the oldest file of {run}, which was started before days were rec" in caplog.text
    assert header_of(run / "adapter")["day"] == FIRST


@pytest.mark.slow
def test_runs_whose_rows_have_no_day_record_none(base, tiny_vlm, tmp_path, clock, caplog):
    """Of a template that does not ask, and of one that asks in other rows."""
    caplog.set_level("INFO")
    said = [("system", "Be brief."), ("user", "Is it?"), ("assistant", "no")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}] * 2
    source = {"format": "chat", "file": str(write_json(tmp_path / "system.json", rows))}
    hour = shutil.copytree(base, tmp_path / "hour")
    (hour / "chat_template.jinja").write_text(DATED["hour"])
    for name, model, data in (
        ("plain", tiny_vlm("qwen2"), None),
        ("system", hour, {"train": source, "valid": dict(source)}),
    ):
        assert main(["train", training(tmp_path, model, name, data=data)]) == 0
        assert "day" not in header_of(tmp_path / name / "adapter")
        assert main(["eval", evaluation(tmp_path, model, f"eval-{name}", data=data)]) == 0
        assert "day" not in rows_of(tmp_path / f"eval-{name}" / "scored_chat.jsonl")[0]
    assert "asks for the day" not in caplog.text


@pytest.mark.slow
def test_all_trainings_of_a_search_have_the_day_on_which_it_began(base, tmp_path, clock, monkeypatch):
    started = []

    def in_this_process(name, arguments, log_file, threads):
        started.append(name)
        if len(started) == 2:
            raise KeyboardInterrupt
        assert main(arguments) == 0
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", in_this_process)
    monkeypatch.setattr(subprocesses, "POLL_SECONDS", 0.0)
    search = tmp_path / "search"
    command = ["tune", training(tmp_path, base), "--rates", "1e-3", "1e-2", "--selection-metric", "held_out"]
    assert main([*command, "--output", str(search)]) == 130
    clock.pass_days(3)
    assert main([*command, "--output", str(search)]) == 0
    runs = sorted((search / "runs").iterdir())
    assert len(runs) > 2
    assert {header_of(run / "adapter")["day"] for run in runs} == {FIRST}
    assert json.loads((search / "inputs.json").read_text())["day"] == FIRST
    assert (search / "trainings.csv").read_text().count(f"day {FIRST}") == len(runs)
    assert yaml.safe_load((search / "tuned.yaml").read_text())["model"].get("date") is None
