"""How far long work is, by lines in the log and by a bar in a terminal."""

import logging
import re
import time

import pytest

from dora_mm.models.opening import opening
from dora_mm.train.metrics import TrainingProgress
from dora_mm.utils import digest, progress
from dora_mm.utils.progress import BYTES, Progress, duration, tracked


@pytest.fixture
def lines(monkeypatch, caplog):
    """The lines of work of which the first comes after 50 ms, and the others after 100 each."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "NEXT_LINE", 0.1)
    caplog.set_level(logging.INFO, logger="dora_mm")
    return caplog


def wait_for(lines, number):
    """Until there are so many lines: how long that takes depends on the machine."""
    deadline = time.monotonic() + 60
    while len(lines.messages) < number and time.monotonic() < deadline:
        time.sleep(0.01)


def test_long_work_has_lines_with_the_time_left_and_a_last_one(lines):
    started = time.monotonic()
    for number in tracked(range(4), "encoding images", "images"):
        wait_for(lines, number)
    *others, last = lines.messages
    assert 3 <= len(others) <= 1 + (time.monotonic() - started) / 0.1
    line = re.compile(r"encoding images: [0-3] of 4 images, (\d+ s so far|([\d.]+ s each, )?\d+ s left)")
    assert [text for text in others if not line.fullmatch(text)] == []
    assert " s left" in others[-1]
    assert re.fullmatch(r"encoding images: 4 of 4 images, \d+ s in all", last)


def test_short_work_is_silent(lines, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 60.0)
    for _ in tracked(range(100), "encoding images", "images"):
        pass
    assert lines.messages == []


def test_a_single_long_item_is_no_silence(lines, tmp_path):
    with opening(str(tmp_path), "it cannot be loaded"):
        wait_for(lines, 1)
    assert re.fullmatch(rf"loading {re.escape(str(tmp_path))}: \d+ s so far", lines.messages[0])
    assert re.fullmatch(rf"loading {re.escape(str(tmp_path))}: \d+ s in all", lines.messages[-1])


def test_what_fails_has_no_last_line(lines, tmp_path):
    def load():
        wait_for(lines, 1)
        raise OSError

    with pytest.raises(ValueError, match="cannot"), opening(str(tmp_path), "it cannot be loaded"):
        load()
    assert {re.sub(r"\d+ s", "0 s", line) for line in lines.messages} == {f"loading {tmp_path}: 0 s so far"}


def test_of_work_inside_other_work_the_inner_one_has_the_lines(lines):
    with Progress("training", 2, "steps") as training:
        training.note = "loss 1.0"
        with Progress("held-out", 2, "batches"):
            before = len(lines.messages)
            wait_for(lines, before + 2)
        assert {line.split(":")[0] for line in lines.messages[before:]} == {"held-out"}
        wait_for(lines, len(lines.messages) + 1)
    assert re.fullmatch(r"training: 0 of 2 steps, loss 1.0, \d+ s in all", lines.messages[-1])


def test_a_training_has_a_line_at_its_steps_and_one_at_its_end(lines, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 60.0)
    training = TrainingProgress(5, 2, shown=True)
    training.start(0)
    for _ in range(5):
        training.advance(0.5, 1e-4)
    training.close()
    assert [line.partition(" steps, loss 0.5000, lr 1.0e-04")[0] for line in lines.messages] == [
        *("training: 2 of 5", "training: 4 of 5", "training: 5 of 5")
    ]


def test_a_large_file_says_how_much_of_it_is_read(lines, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    monkeypatch.setattr(digest, "REMEMBERED", 1 << 20)
    monkeypatch.setattr(Progress, "advance", lambda self, count: wait_for(lines, 1) or setattr(self, "done", count))
    digest.file_digest(file)
    assert lines.messages[0].startswith("digest of model.safetensors: 0.0 GB of 0.0 GB, ")


def test_amounts():
    assert [duration(seconds) for seconds in (4.4, 99, 100, 426, 7300)] == [
        "4 s",
        "99 s",
        "1.7 min",
        "7.1 min",
        "2.0 h",
    ]
    with Progress("checking", 6_900_000_000, BYTES) as checking:
        checking.done = 3_450_000_000
        assert checking.line().startswith("checking: 3.5 GB of 6.9 GB, ")
    with Progress("reading", unit="rows") as reading:
        reading.advance(120_000)
        assert reading.line() == "reading: 120,000 rows, 0 s so far"


def test_a_program_that_logs_no_information_sees_nothing(lines, caplog):
    caplog.set_level(logging.WARNING, logger="dora_mm")
    with Progress("encoding images", 3, "images"):
        time.sleep(0.1)
    assert lines.messages == []


TIMES = [(0.012, ""), (0.5, "0.5 s each, "), (24, "24 s each, "), (310, "5.2 min each, ")]


@pytest.mark.parametrize(("seconds", "each"), TIMES)
def test_the_time_of_an_item(monkeypatch, seconds, each):
    """A training of 310 s was said to take 3.1e+02 s."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("trainings", 5, "trainings", hidden=True) as progress:
        progress.advance()
        now[0] += seconds
        assert progress.line().startswith(f"trainings: 1 of 5 trainings, {each}")
        assert progress.line().endswith(" left")
