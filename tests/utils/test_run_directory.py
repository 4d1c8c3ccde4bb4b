"""Run directories."""

import json

import pytest
import torch

from dora_mm.utils.devices import hardware_name, processor_name
from dora_mm.utils.run_directory import RunDirectory


def test_run_directories_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (RunDirectory.create("demo", "seed: 1\n") for _ in range(2))
    assert (str(one.path), str(two.path)) == ("runs/demo/001", "runs/demo/002")
    assert (one.path / "config.yaml").read_text() == "seed: 1\n"
    versions = json.loads((one.path / "versions.json").read_text())
    made_by = [versions[name] for name in ("torch", "processor", "threads")]
    assert made_by == [torch.__version__, hardware_name(), torch.get_num_threads()]
    with pytest.raises(ValueError, match="exists"):
        RunDirectory.create("demo", "", output=str(one.path))
    with pytest.raises(ValueError, match="not a run directory"):
        RunDirectory.resume(tmp_path)


def test_the_processor_has_its_family_where_linux_says_it(monkeypatch):
    text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t: fpu\n\nprocessor\t: 1\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding: text)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert processor_name() == "AMD EPYC, family 25, model 1, AVX2"


def test_a_processor_without_proc_has_a_name(monkeypatch):
    def missing(path, encoding):
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert processor_name().startswith("arm, ")
