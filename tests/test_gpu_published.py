"""The comparisons of `make gpu` in other projects' forms, on a CPU, and the page of their tables."""

import csv
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("diffusers")

from tests.benchmarks import gpu
from tests.benchmarks.gpu import automodel
from tests.benchmarks.gpu.published import entries, inputs, metamath
from tests.benchmarks.gpu.published.experiments import IMAGES, METAMATH
from tests.benchmarks.gpu.published.inputs import Inputs
from tests.benchmarks.gpu.published.record import published
from tests.benchmarks.gpu.published.training import Memory, train
from tests.benchmarks.gpu.run import Run
from tests.documented import gpu_tables

CPU = torch.device("cpu")
OURS_ALONE = {"dora_mm-version", "dora_mm-commit-hash"}


# --- the trainings ---------------------------------------------------------------------------------------------------


def names(value):
    """The names in JSON, without its values; settings of adapters differ between releases of PEFT."""
    if isinstance(value, dict):
        return {key: names(each) for key, each in value.items() if key not in OURS_ALONE | {"peft_config"}}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [sorted(value[0]), sorted(value[-1])]
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "comparison"), [("metamath", METAMATH), ("images", IMAGES)])
def test_a_dry_run_has_the_form_of_the_published_results(entry, comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = [entry, "--dry", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    folder, found = tmp_path / "method_comparison" / comparison.task, {}
    for experiment in comparison.experiments:
        found[experiment] = json.loads((folder / f"{experiment.name}.json").read_text())
        expected = published(comparison.task, experiment.settings_of)
        expected["run_info"]["peft_worktree_is_dirty"] = None  # newer than the published results
        assert names(found[experiment]) == names(expected)
        theirs, ours = (each["run_info"]["peft_config"] for each in (expected, found[experiment]))
        compared = ("r", "lora_alpha", "use_dora", "base_model_name_or_path", "task_type")
        assert [ours[key] for key in compared] == [theirs[key] for key in compared]
        assert ours["target_modules"] == sorted(theirs["target_modules"])
    dora, fused, lora = (each["train_info"] for each in found.values())
    assert dora["num_trainable_params"] == fused["num_trainable_params"] > lora["num_trainable_params"]
    assert [row["train loss"] for row in fused["metrics"]] == pytest.approx(
        [row["train loss"] for row in dora["metrics"]], rel=1e-5
    )
    capsys.readouterr()
    assert gpu.main(arguments) == 0
    assert capsys.readouterr().out.count("has its result already") == 3


def test_without_inputs_the_sentence_says_what_downloads_them(tmp_path, capsys):
    run = Run("metamath", CPU, False, tmp_path, time.monotonic() + 60, inputs=tmp_path)
    entries.compare(run, METAMATH)
    assert capsys.readouterr().out.splitlines() == [
        f"left out: all of metamath: INPUTS={tmp_path} lacks meta-llama/Llama-3.2-3B, metamathqa.jsonl, "
        "gsm8k_valid.jsonl, gsm8k_test.jsonl, wiki.jsonl; `python -m tests.benchmarks.gpu.published.inputs FOLDER` "
        "downloads them"
    ]
    assert run.faults == []


class Sums:
    """A task of one weight, whose time is over after a step."""

    scores_apart, frees_every = True, 2

    def __init__(self, run=None):
        self.model, self.num_samples, self.num_tokens, self.run = nn.Linear(1, 1), 0, [], run

    def prepare(self):
        self.is_prepared = True

    def loss(self, step):
        assert self.is_prepared
        assert self.model.training
        self.num_samples += 2
        if self.run and step == 3:
            self.run.deadline = 0.0
        return self.model(torch.ones(2, 1)).square().mean()

    def validate(self):
        assert not self.model.training
        return {"score": float(self.num_samples)}

    def test(self):
        return {"score": 0.5, "drift": 0.25}


SETTINGS = {"max_steps": 4, "eval_steps": 2, "grad_norm_clip": 1.0, "lr_scheduler": "cosine"}
SETTINGS |= {"optimizer_kwargs": {"lr": 0.1}}


def test_a_training_validates_between_its_steps_and_tests_at_the_end(tmp_path):
    run, task = Run("images", CPU, False, tmp_path, time.monotonic() + 60), Sums()
    found = train(run, task, SETTINGS, Memory(CPU))
    assert (found.status, found.num_trainable_params, len(found.memory_log)) == ("success", 2, 4)
    first, second, last = found.metrics
    assert [row["step"] for row in found.metrics] == [2, 4, 4]
    assert [row["valid score"] for row in (first, second)] == [4, 8]
    assert (last["test score"], last["drift"], last["train samples"]) == (0.5, 0.25, 8)
    assert second["train loss"] < first["train loss"]
    assert second["train loss"] == last["train loss"]
    assert found.train_time >= first["train time"] + second["train time"]


def test_a_training_whose_time_is_over_keeps_what_it_measured(tmp_path):
    run = Run("images", CPU, False, tmp_path, time.monotonic() + 60)
    found = train(run, Sums(run), SETTINGS, Memory(CPU))
    assert (found.status, found.error_msg) == ("canceled", "the time of this entry was over after 3 steps")
    assert [row["step"] for row in found.metrics] == [2]


def test_memory_is_what_was_reserved_since_the_start(monkeypatch):
    found = {"memory_reserved": 100, "memory_allocated": 100, "max_memory_reserved": 100}
    for name in found:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: found[name])
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: calls.append(name))
    memory = Memory(torch.device("cuda"))
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    for reserved, peak in [(350, 900), (250, 400)]:
        found.update(memory_reserved=reserved, memory_allocated=150, max_memory_reserved=peak)
        memory.add()
        memory.note_peak()
    assert (memory.reserved, memory.allocated, memory.peak) == ([250, 150], [50, 50], 800)


@pytest.mark.parametrize(
    ("text", "row", "right"),
    [
        ("So.\nThe answer is: 16.", "9 + 7 = 16\n#### 16", True),
        ("The answer is 0.5", "#### 1/2", True),
        ("The answer is: $50%\nAnd more", "#### 50", True),
        ("The answer is: 3. The answer is: 4", "#### 4", True),
        ("It is 16", "#### 16", False),
        ("The answer is: 1/0", "#### 0", False),
        ("The answer is: 17", "#### 16", False),
    ],
)
def test_an_answer_is_right(text, row, right):
    assert metamath.is_right(text, row) is right


def test_rows_of_a_bucket_are_sorted_and_buckets_stay_in_order():
    lengths = [*range(1, 41), *range(100, 103)]
    found = list(metamath.batches([[0] * length for length in lengths], 2))
    assert [len(batch[0]) for batch in found] == [*range(40, 0, -2), 102, 100]
    assert len(found[-1]) == 1


def test_long_entries_run_only_where_they_are_named():
    long = {"automodel", "images", "metamath"}
    usual, dry, named = (
        [entry.name for entry in gpu.chosen_entries(gpu.parsed(each))] for each in ([], ["--dry"], ["images"])
    )
    assert long.isdisjoint(usual)
    assert set(dry) == set(usual) | long
    assert named == ["images"]


# --- their inputs ----------------------------------------------------------------------------------------------------


def test_rows_are_those_that_peft_takes():
    order = np.arange(7473)
    np.random.seed(0)
    np.random.shuffle(order)
    assert inputs.shuffled(7473) == order.tolist()
    long, short = ({"query": "q" * length, "response": "r", "type": "x"} for length in (1299, 1298))
    assert inputs.short_rows([long, short]) == [{"query": "q" * 1298, "response": "r"}]


def test_inputs_are_downloaded_as_plain_files(tmp_path, monkeypatch):
    gsm8k = [{"question": f"{number}?", "answer": f"#### {number}"} for number in range(60)]
    rows = {
        "meta-math/MetaMathQA": {"train": [{"query": "q", "response": "r"}]},
        "openai/gsm8k": {"train": gsm8k, "test": gsm8k[:3]},
        "peft-internal-testing/cat-image-dataset": {"train": [{"image": Image.new("L", (4, 5))}] * 2},
    }

    class Stream(list):
        def take(self, count):
            return self[:count]

    def load_dataset(name, *arguments, split=None, streaming=False):
        if streaming:
            return Stream([{"text": "t"}] * 200)
        return rows[name][split] if split else rows[name]

    about = SimpleNamespace(sha="a" * 40, created_at=SimpleNamespace(isoformat=lambda: "2024-09-18"))
    hub = SimpleNamespace(model_info=lambda name: about, dataset_info=lambda name: about)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_dir: local_dir.mkdir(parents=True))
    inputs.download(tmp_path)
    found = Inputs(tmp_path)
    assert found.missing(*inputs.MODELS, *METAMATH.files, *IMAGES.files) == []
    assert len(found.rows("gsm8k_valid")) == 50
    assert found.rows("gsm8k_test")[2] == ("2?", "#### 2")
    assert (len(found.texts("wiki")), len(found.images())) == (100, 2)
    assert found.revision(inputs.MODELS[0]) == {"sha": "a" * 40, "created_at": "2024-09-18"}
    assert found.revision("unknown/model")["sha"] is None


# --- NeMo AutoModel's columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("Llama3 8B", "llama"), ("Qwen2.5 7B", "qwen2")])
def test_operations_are_those_of_the_published_rows(name, kind):
    """Their TFLOP/s follow from their seconds."""
    (row,) = [row for row in gpu_tables.lines(gpu_tables.RESULTS / "peers" / "automodel.csv") if row["model"] == name]
    config = SimpleNamespace(**automodel.MODELS[name][1])
    width, key_value = config.hidden_size, 128 * config.num_key_value_heads
    sides = 2 * (width + width) + 2 * (width + key_value) + 3 * (width + config.intermediate_size)
    trained = automodel.RANK * config.num_hidden_layers * sides
    flops = automodel.model_flops(config, 32, 4096, trained)
    found = automodel.rates([float(row["step_seconds"])], flops / 1e12, 32 * 4096)
    assert round(found["tflops_per_gpu"]) == int(row["tflops_per_gpu"])
    assert found["tokens_per_second_per_gpu"] == pytest.approx(float(row["tokens_per_second_per_gpu"]), rel=1e-3)
    assert automodel.MODELS[name][0] == kind


@pytest.mark.slow
def test_a_dry_run_of_automodel(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["automodel", "--dry", "--output", str(tmp_path)]) == 0
    with (tmp_path / "automodel.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows if row["model"] == "Llama3 8B"] == list(automodel.ADAPTED)
    assert set(gpu_tables.lines(gpu_tables.RESULTS / "peers" / "automodel.csv").__next__()) - {"kernels"} <= set(
        rows[0]
    )


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_results():
    assert gpu_tables.PAGE.read_text(encoding="utf-8") == gpu_tables.page(), "python -m tests.documented.gpu_tables"


def rows_of(page, title):
    chapter = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in chapter.splitlines() if line[:1] == "|"][
        2:
    ]


def test_published_seconds_of_a_step_leave_validation_out():
    dora, lora = rows_of(gpu_tables.page(), "Images")[:2]
    assert (dora[:5], lora[3:5]) == (["DoRA", "0", "NVIDIA L40S", "1.459", "1436"], ["0.757", "717"])


def test_results_take_the_place_of_rows_that_wait(tmp_path):
    folder = tmp_path / "nvidia_h100" / "method_comparison" / "image-gen"
    folder.mkdir(parents=True)
    for name, status in [("dora--flux2-klein-rank64-fused-seed1", "success"), ("lora--flux2-klein-rank64", "canceled")]:
        result = published("image-gen", "dora--flux2-klein-rank64")
        result["run_info"] |= {"experiment_name": name.replace("--", "/", 1)}
        result["run_info"]["train_config"]["seed"] = int(name.endswith("seed1"))
        result["train_info"]["status"] = status
        result["meta_info"]["system_info"]["accelerator"] = "NVIDIA H100"
        (folder / f"{name}.json").write_text(json.dumps(result))
    rows = rows_of(gpu_tables.page(tmp_path), "Images")[2:]
    assert [row[:4] for row in rows] == [
        ["DoRA", "", "not measured", "not measured"],
        ["DoRA, fused", "1", "NVIDIA H100", "1.459"],
        ["LoRA", "0", "NVIDIA H100", "canceled"],
    ]
    columns = {"model": "Llama3 8B", "contender": "our DoRA", "backend": "triton", "card": "NVIDIA H100"}
    columns |= dict.fromkeys(gpu_tables.SHAPE, "1") | {"step_seconds": "10.0", "tflops_per_gpu": "401.7"}
    columns |= {"tokens_per_second_per_gpu": "12345.6"}
    with (tmp_path / "nvidia_h100" / "automodel.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerow(columns)
    rows = rows_of(gpu_tables.page(tmp_path), "Language models")
    assert [row[8:13] for row in rows if row[:2] == ["Llama3 8B", "our DoRA"]] == [
        ["triton", "10.00", "402", "12,346", "NVIDIA H100"]
    ]
    assert len(rows) == 2 + 10
