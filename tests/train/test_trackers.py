"""What shows metrics beside metrics.jsonl: TensorBoard, and packages that are not installed here, by stand-ins."""

import importlib.machinery
import sys
import types

import pytest
from accelerate import Accelerator

from dora_mm.train.metrics import MetricsLog
from dora_mm.train.trackers import chosen_trackers, started
from dora_mm.utils.run_directory import RunDirectory

VALUES = {"name": "mine", "seed": 1}


@pytest.fixture
def package(monkeypatch):
    """A stand-in for wandb or trackio; returns what it is called with."""
    Accelerator(cpu=True)

    def install(name, fails=()):
        calls = []

        def called(method):
            def call(*arguments, **settings):
                calls.append((method, *arguments, settings))
                if method in fails:
                    raise RuntimeError(f"no {method} today\nand more")

            return call

        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        run = types.SimpleNamespace(log=called("log"), finish=called("finish"))
        module.init = lambda **settings: called("init")(**settings) or run
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_rows_are_shown_by_a_tracker(package, tmp_path, name):
    calls = package(name)
    for step in (0, 4):  # a new run, and a resumed one
        with started(chosen_trackers([name]), tmp_path, VALUES, step) as trackers:
            run = RunDirectory(tmp_path, trackers)
            for place, values in ((run, {"loss": 0.5}), (run.stage("validation"), {"vqa": 60.0})):
                log = MetricsLog(place, step)
                log.write(step + 2, **values)
                log.close()
    (first, loss, score, end), again = calls[:4], calls[4:]
    assert (first[0], again[0]) == ("init", first)
    settings = first[-1]
    assert (settings["project"], settings["name"], settings["resume"]) == ("mine", tmp_path.name, "allow")
    assert settings["config"] == VALUES
    assert loss[:2] == ("log", {"loss": 0.5})
    assert loss[-1]["step"] == 2
    assert score[1] == {"validation/vqa": 60.0}
    assert end[0] == "finish"


def test_a_tracker_that_fails_does_not_end_a_training(package, tmp_path, caplog):
    calls = package("wandb", fails=("log",))
    with started(["wandb"], tmp_path, VALUES, 0) as trackers:
        log = MetricsLog(RunDirectory(tmp_path, trackers))
        for step in (1, 2):
            log.write(step, loss=1.0)
    assert [call[0] for call in calls] == ["init", "log"]
    assert [record.message for record in caplog.records] == [
        "train.track: wandb shows no more (no log today); metrics.jsonl goes on."
    ]
    assert len(log.path.read_text().splitlines()) == 2


def test_a_tracker_that_cannot_start_or_is_not_installed_is_named(package, tmp_path):
    package("wandb", fails=("init",))
    with (
        pytest.raises(ValueError, match="^train.track: wandb cannot start: no init today$"),
        started(["wandb"], tmp_path, VALUES, 0),
    ):
        pass
    with pytest.raises(ValueError, match="^train.track: trackio needs the package trackio: pip install trackio"):
        chosen_trackers(["trackio"])


def test_tensorboard_is_the_default_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    assert chosen_trackers(None) == ["tensorboard"]
    assert chosen_trackers([]) == []
    Accelerator(cpu=True)
    with started(["tensorboard"], tmp_path, VALUES, 3) as trackers:
        trackers[0].log({"loss": 1.0}, 4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(4, 1.0)]
