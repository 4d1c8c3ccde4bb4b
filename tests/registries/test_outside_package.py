"""What a package of others adds is trained and scored by command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.packages import outside_package

ROOT = Path(__file__).parents[2]
SUMS = '''
"""Sums: one a line, `1 + 2 = 3`. An answer counts the less, the further it is from the sum."""

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, check_answered, percent
from dora_mm.registries.readers import Reader
from dora_mm.registries.submissions import Submission
from dora_mm.registries.vl_tasks import VLTask

TASK = VLTask("Sums", formats=("sum_lines",), scorer="near", submission="lines", images=0, prompt="{text} =")
READER = Reader("sums:read", published="sums.example", images="none")
SUBMISSION = Submission(".txt", "sums:lines")


def read(source, bad):
    for number, line in enumerate(source.path.read_text().splitlines()):
        question, answer = line.split(" = ")
        yield Example(str(number), (), question, (answer,), (1.0,))


def near(example, answer):
    return 1 / (1 + abs(int(answer) - int(example.answers[0]))) if answer.isdecimal() else 0.0


def score(predictions):
    check_answered(predictions)
    return VLScores("nearness", {"nearness": percent([near(*row) for row in predictions])})


def lines(predictions):
    return "".join(f"{example.id} {answer}\\n" for example, answer in predictions)


SCORER = AnswerScorer(score, near)
'''
POINTS = {
    "vl_tasks.sums": "TASK",
    "readers.sum_lines": "READER",
    "scorers.near": "SCORER",
    "submissions.lines": "SUBMISSION",
}
COMMANDS = "import sys; from dora_mm.cli import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"


def run(package: Path, *commands: str) -> subprocess.CompletedProcess:
    """Runs commands, one after another, where the package is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(package), str(ROOT)))}
    call = [sys.executable, "-c", COMMANDS, *commands]
    return subprocess.run(call, cwd=package.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_task_with_its_reader_scorer_and_submission_file_is_trained_and_scored(tiny_vlm, tmp_path):
    places = {name: f"sums:{thing}" for name, thing in POINTS.items()}
    package = outside_package(tmp_path / "package", {"sums.py": SUMS}, places)
    (tmp_path / "sums.txt").write_text("".join(f"{one} + {one} = {2 * one}\n" for one in range(8)))
    base, source = str(tiny_vlm("llama")), {"format": "sum_lines", "file": "sums.txt"}
    data = {"task": "sums", "tables": "tables"}
    train = {
        "pipeline": "train_vl",
        "model": {"path": base},
        "adapter": {"rank": 2},
        "data": data | {"train": source, "valid": source},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"max_new_tokens": 2},
        "output": "trained",
    }
    score = {
        "pipeline": "eval_vl",
        "model": {"path": base},
        "adapter": "trained",
        "data": data | {"valid": source},
        "decode": {"max_new_tokens": 2},
        "output": "scored",
    }
    for name, config in (("train", train), ("score", score)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    done = run(package, "train train.yaml", "eval score.yaml")
    assert done.returncode == 0, done.stderr
    assert "sums" in json.loads((tmp_path / "trained" / "summary.json").read_text())
    scores = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert 0 <= scores["sums"]["metrics"]["nearness"] <= 100
    answers = (tmp_path / "scored" / "predictions_sums.txt").read_text().splitlines()
    assert [line.split()[0] for line in answers] == list("01234567")


def test_a_package_is_listed_beside_what_is_built_in(tmp_path):
    package = outside_package(tmp_path / "package", {"sums.py": SUMS}, {"vl_tasks.sums": "sums:TASK"})
    (tmp_path / "config.yaml").write_text("pipeline: eval_vl\ndata:\n  task: sms\n")
    done = run(package, "eval config.yaml")
    assert "line 3: data.task: must be 'vqa', " in done.stderr
    assert "'textvqa' or 'sums', got 'sms', did you mean 'sums'?" in done.stderr
