"""A comparison of methods on two tasks, end to end on a random model: interrupted, resumed, refused."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.studies.campaigns import subprocesses, trainings
from dora_mm.studies.campaigns import training_rows as module
from dora_mm.studies.campaigns.answers import AnsweredSplits
from dora_mm.studies.campaigns.comparison import MethodComparison
from dora_mm.studies.campaigns.selection_metrics import AnswerScoreMetric
from dora_mm.studies.campaigns.subprocesses import TrainingProcess
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.campaigns.tuned import TunedVL
from dora_mm.studies.campaigns.vl import ValidationSet, VLEvaluation, shared_images
from dora_mm.studies.config import CompareConfig, TuneConfig
from dora_mm.studies.variants import FULL, Variant
from dora_mm.utils.devices import hardware_name
from tests.shared.edits import edits, named
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_tokenizer

SAMPLES = Path(__file__).parents[3] / "samples" / "vl"
QUESTIONS = SAMPLES / "vqa" / "v2_OpenEnded_mscoco_val2014_questions.json"


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Random features of every image of the samples: their quality does not matter here."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for path in [*SAMPLES.rglob("*.jpg"), *SAMPLES.rglob("*.png")]:
        np.savez(folder / f"{path.stem}.npz", features=rng.normal(size=(4, DIM)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), folder)
    return folder


EXTRA = ["visual_embedding", "biases", "norms"]


def first_of_image(number: int) -> int:
    """The row of the first validation question about the image of this number."""
    images = [row["image_id"] for row in json.loads(QUESTIONS.read_text())["questions"]]
    return images.index(list(dict.fromkeys(images))[number])


def vqa(split: str, **rows: int) -> dict:
    return {
        "format": "vqa_v2",
        "file": str(SAMPLES / f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json"),
        "annotations": str(SAMPLES / f"vqa/v2_mscoco_{split}2014_annotations.json.gz"),
        **rows,
    }


def nlvr2(split: str) -> dict:
    return {"format": "nlvr2", "file": str(SAMPLES / f"nlvr2/{split}.json")}


@pytest.fixture
def base(tmp_path, model_folder, features):
    """The file, and the values in it to change."""
    tasks = [
        {"task": "vqa", "train": vqa("train", limit=24), "valid": vqa("val", limit=first_of_image(2))},
        {"task": "nlvr2", "train": nlvr2("train"), "valid": nlvr2("dev")},
    ]
    values = {
        "pipeline": "train_vl",
        "model": {"family": "vl_bart", "path": str(model_folder)},
        "vision": {"features": [str(features)]},
        "adapter": {
            "rank": 2,
            "alpha": 6.0,
            "dropout": 0.1,
            "extra_trainable": ["visual_embedding", "biases", "norms"],
        },
        "data": {"tables": str(tmp_path / "tables"), "tasks": tasks},
        "optimizer": {"lr": 0.5, "magnitude_lr": 0.5},
        "train": {"epochs": 9, "batch_size": 4, "checkpoint_every": 1, "log_every": 1},
        "evaluate": {"every": 1},
    }

    def write(**changes) -> str:
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return str(path)

    write.values = values
    write.path = str(tmp_path / "base.yaml")
    return write


@pytest.fixture
def comparison(tmp_path, base):
    def write(**changes) -> str:
        tasks = [
            {"task": "vqa", "valid": vqa("val", skip=first_of_image(2), limit=16)},
            {"task": "nlvr2", "valid": nlvr2("test1")},
        ]
        values = {
            "pipeline": "compare",
            "output": str(tmp_path / "campaign"),
            "base": changes.get("base") or base(),
            "steps": 2,
            "ranks": [4],
            "learning_rates": {method: [1e-3, 1e-2, 1e-1] for method in ("full", "lora", "dora")},
            "extra_rates": 0,
            "seeds": [0, 1],
        }
        questions = {"report": changes.pop("report", {"tables": str(tmp_path / "tables"), "tasks": tasks})}
        questions |= {key: changes.pop(key) for key in ("features", "decode") if key in changes}
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump({**values, "vl": questions, **changes}))
        return str(path)

    return write


@pytest.fixture
def commands(monkeypatch):
    """Runs trainings in this process; their command lines are in the list."""
    found = []

    def in_this_process(name, arguments, log_file, threads):
        found.append(arguments)
        assert main(arguments) == 0
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", in_this_process)
    monkeypatch.setattr(subprocesses, "POLL_SECONDS", 0.0)
    return found


def evaluation_of(path: str) -> VLEvaluation:
    config = load_config(path)
    assert isinstance(config, CompareConfig)
    assert config.vl is not None
    return VLEvaluation(config, config.vl)


@pytest.mark.slow
def test_each_edited_file_of_the_model_is_refused(comparison, base, tmp_path, model_folder):
    """That of a VL-BART; its weights have one digest for all."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    path = comparison(base=base(model={"family": "vl_bart", "path": str(model)}))

    def opened() -> None:
        config = load_config(path)
        MethodComparison(config, evaluation_of(path))

    opened()
    for file in edits(model):
        if name := named(file):
            with pytest.raises(ValueError, match=f"was started with different values of {name}: choose"):
                opened()
        else:
            opened()


def trainings_in(folder: Path, path: str, evaluation: VLEvaluation) -> Trainings:
    return Trainings(folder, load_config(path).base, 1, evaluation.overrides)


@pytest.mark.slow
def test_an_interrupted_campaign_is_resumed_and_reports(comparison, commands, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "campaign"
    answer = AnsweredSplits.answer

    def interrupted(self, adapter, seed):
        if adapter and adapter.parent.name.startswith("dora"):
            raise KeyboardInterrupt
        return answer(self, adapter, seed)

    monkeypatch.setattr(AnsweredSplits, "answer", interrupted)
    assert main(["compare", comparison()]) == 130
    assert len(commands) == 4 * 3  # full, LoRA 4, DoRA 2 and 4: three rates each
    assert not (folder / "table.md").exists()

    commands.clear()
    asked = []
    monkeypatch.setattr(
        AnsweredSplits, "answer", lambda self, adapter, seed: asked.append(adapter) or answer(self, adapter, seed)
    )
    assert main(["compare", comparison(workers=2)]) == 0  # this changes no result
    assert len(commands) == 4  # the best rate of each with the second seed
    answered = [adapter.parent.name for adapter in asked if adapter]
    assert len(answered) == 2 + 4
    assert {name.partition("-lr")[0] for name in answered if name.endswith("seed0")} == {"dora-r2", "dora-r4"}

    rows = list(csv.DictReader((folder / "results.csv").open()))
    names = ["untrained base", "questions alone", "full fine-tuning", "LoRA, rank 4", "DoRA, rank 4"]
    assert [row["name"] for row in rows] == [*names, "DoRA, half of rank 4"]
    shares = [float(row["trainable_share"]) for row in rows[2:]]
    assert shares[0] == 100.0
    assert shares[3] < shares[1] < shares[2] < 100
    for row in rows[2:]:
        assert float(row["mean_low"]) <= float(row["mean_mean"]) <= float(row["mean_high"])
        assert float(row["mean_mean"]) == pytest.approx(
            (float(row["vqa_mean"]) + float(row["nlvr2_mean"])) / 2, abs=2e-3
        )
        assert float(row["seconds_per_step"]) > 0
        assert float(row["peak_memory_mb"]) > 100
    assert rows[1]["mean_mean"] == rows[0]["learning_rate"] == ""
    table = (folder / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "VQA 16 answers in " in table
    assert "DoRA, rank 4, minus the score without images" in table
    assert "DoRA, rank 2 - LoRA, rank 4" in table
    assert "of 12 intervals exclude 0" in table
    made_on = csv.DictReader((folder / "trainings.csv").open())
    assert {(row["processor"], row["threads"]) for row in made_on} == {(hardware_name(), str(torch.get_num_threads()))}
    assert f"Trained on: {hardware_name()}, threads {torch.get_num_threads()}: 8." in table

    # the reported scores of a training are those of eval_vl
    chosen = next((folder / "answers").glob("lora-r4-*-seed1.json")).stem
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    values = {key: base[key] for key in ("model", "vision")}
    report = yaml.safe_load((tmp_path / "compare.yaml").read_text())["vl"]["report"]
    adapter, output = str(folder / "runs" / chosen), str(tmp_path / "eval")
    config = {**values, "pipeline": "eval_vl", "data": report, "adapter": adapter, "output": output, "examples": 0}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    evaluation = evaluation_of(comparison())
    trained = next(
        training for rate in (1e-3, 1e-2, 1e-1) if (training := Training(Variant("lora", 4), rate, 1)).name == chosen
    )
    found = evaluation.scores([evaluation.scored(trainings_in(folder, comparison(), evaluation), trained)])
    for task in ("vqa", "nlvr2"):
        assert 100 * found[task].values_QS.mean() == pytest.approx(scores[task]["metrics"]["accuracy"], abs=1e-2)

    assert main(["compare", comparison(steps=3)]) == 2
    assert "different values of steps" in capsys.readouterr().err


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """Names of the trainings that a comparison starts; all but the first are copies of that."""
    names, first = [], tmp_path / "first"

    def trained_or_copied(name, arguments, log_file, threads):
        if not first.exists():
            assert main([*arguments[:-1], f"output={first}"]) == 0
        shutil.copytree(first, arguments[-1].removeprefix("output="))
        names.append(name)
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", trained_or_copied)
    monkeypatch.setattr(subprocesses, "POLL_SECONDS", 0.0)
    return names


@pytest.mark.slow
def test_a_comparison_goes_on_from_its_rows_alone(comparison, base, copied, tmp_path, monkeypatch, capsys):
    """Trainings that answer alike at all rates are as good everywhere: both ends of what was tried stay open."""
    rows = tmp_path / "rows.csv"
    settings = {
        "learning_rates": {method: [1e-3, 1e-2, 1e-1] for method in ("lora", "dora")},
        "half_ranks": False,
        "variants": [
            {"name": "b4", "rank": 4, "overrides": ["optimizer.b_lr_ratio=4.0"]},
            {"name": "m_half", "rank": 4, "magnitude_lr_ratio": 0.5},
        ],
        "curves": True,
        "rows": str(rows),
    }
    assert main(["compare", comparison(**settings, output=str(tmp_path / "empty")), "--report"]) == 2
    assert "rows.csv has no training to report yet" in capsys.readouterr().err
    run = module.TrainingRows.add

    def stopped(self, added):
        run(self, added)
        if added[0].training.seed == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.TrainingRows, "add", stopped)
    assert main(["compare", comparison(**settings)]) == 130
    assert len(copied) == 4 * 3 + 1
    monkeypatch.setattr(module.TrainingRows, "add", run)

    shutil.rmtree(tmp_path / "campaign")
    copied.clear()
    assert main(["compare", comparison(**settings)]) == 0
    # all rates are equal, so the lowest is the best: it and its one neighbour with the second seed, less one
    assert len(copied) == 4 * 2 - 1
    assert all(name.endswith("seed1") for name in copied)
    folder = tmp_path / "campaign"
    table = (folder / "table.md").read_text()
    assert "DoRA, rank 4, m_half - DoRA, rank 4" in table
    assert "< 0.001 to 0.1 >" in table
    assert {file.name for file in folder.glob("curves.*")} == {"curves.csv", "curves.png", "curves.svg"}

    copied.clear()
    other = {**settings, "output": str(tmp_path / "other")}
    assert main(["compare", comparison(**other)]) == 0
    assert copied == []
    assert (tmp_path / "other" / "table.md").read_text() == table
    assert main(["compare", comparison(**other), "--report"]) == 0
    assert (tmp_path / "other" / "table.md").read_text() == table

    changed = yaml.safe_load(Path(base()).read_text())
    changed["optimizer"]["weight_decay"] = 0.5
    base(**{key: value for key, value in changed.items() if key == "optimizer"})
    assert main(["compare", comparison(**{**settings, "output": str(tmp_path / "third")}, base=base.path)]) == 2
    assert "of another config, other data or another model: choose another file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_counts_epochs_in_steps_and_scores_answers_as_a_training_does(base, commands, tmp_path, capsys):
    """Held-out losses choose, since answers of a random model may be equally wrong at all rates."""
    folder, path = tmp_path / "search", base()
    command = ["tune", path, "--rates", "1e-3", "1e-2", "--selection-metric", "held_out", "--output", str(folder)]
    assert main([*command, "--set", "train.epochs=1"]) == 0
    rows = list(csv.DictReader((folder / "trainings.csv").open()))
    lengths = sorted({int(row["setting"].split()[0]) for row in rows})
    config = load_config(path, ["train.epochs=1"])
    trained = TunedVL(TuneConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())), config)
    assert lengths == [trained.steps // 4, trained.steps]
    summaries = {row["setting"] + row["rate"]: summary_of(folder, row) for row in rows}
    for row in rows:
        found = summaries[row["setting"] + row["rate"]]
        assert float(row["value"]) == pytest.approx(-(found["vqa_loss"] + found["nlvr2_loss"]) / 2, abs=1e-6)
        assert found["steps"] == int(row["setting"].split()[0])
    assert load_config(folder / "tuned.yaml").train.epochs == 1
    assert "--set" not in capsys.readouterr().out.splitlines()[-1]

    classifier, row = AnswerScoreMetric(trained), rows[0]
    training = module.TrainingRow(**{**row, "scores": ""}).training
    value = classifier.value(Trainings(folder, path, 1, classifier.overrides), training)
    found = summaries[row["setting"] + row["rate"]]
    assert 100 * value == pytest.approx((found["vqa"] + found["nlvr2"]) / 2, abs=0.01)


def summary_of(folder: Path, row: dict) -> dict:
    training = module.TrainingRow(**{**row, "scores": ""}).training
    return json.loads((folder / "runs" / training.name / "summary.json").read_text())


def test_settings_of_a_variant_reach_its_trainings(comparison, base):
    variants = [
        {"name": "b4", "rank": 4, "overrides": ["optimizer.b_lr_ratio=4.0", "adapter.norm_grad=exact"]},
        {"name": "m_half", "rank": 4, "magnitude_lr_ratio": 0.5},
    ]
    evaluation = evaluation_of(comparison(variants=variants))
    found = [
        load_config(base(), evaluation.overrides(Training(Variant("dora", 4, name), 0.25, 7)))
        for name in ("", "b4", "m_half")
    ]
    settings = [(c.optimizer.b_lr_ratio, c.adapter.norm_grad, c.optimizer.magnitude_lr) for c in found]
    assert settings == [(1.0, "detached", None), (4.0, "exact", None), (1.0, "detached", 0.125)]


def test_every_training_that_adapts_the_tower_answers_with_its_own_tower(comparison, base, commands, tmp_path):
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), 64, "image"), small_tokenizer(), tmp_path / "model")
    images = {"images": str(SAMPLES / "images")}
    task = {"task": "vqa", "train": vqa("train", limit=4, **images), "valid": vqa("val", limit=2, **images)}
    adapted = base(
        model={"family": "vl_bart", "path": str(tmp_path / "model")},
        vision={"tower": "timm/test_vit", "pretrained": None},
        adapter={"rank": 2, "parts": ["text.qv", "cross.qv", "vision.attn"]},
        data={"tables": str(tmp_path / "tables"), "tasks": [task]},
    )
    valid = vqa("val", skip=first_of_image(2), limit=first_of_image(4) - first_of_image(2), **images)
    report = {"tables": str(tmp_path / "tables"), "tasks": [{"task": "vqa", "valid": valid}]}
    path = comparison(report=report, steps=1, base=adapted)
    found = evaluation_of(path)
    training = Training(Variant("lora", 4), 0.01, 1)
    trainings_in(tmp_path, path, found).train([training], lambda training: None)
    adapter = tmp_path / "runs" / training.name / "adapter"
    assert len(found.splits.answer(adapter, training.seed)["vqa"]) == len(found.splits.examples["vqa"])
    assert not any("lora_A" in name for name, _ in found.model.vision.named_parameters())


def test_trainings_override_values_of_the_base(comparison, base):
    evaluation = evaluation_of(comparison())
    loaded = load_config(base())

    def trained(variant):
        return load_config(base(), evaluation.overrides(Training(variant, 0.25, 7)))

    half = trained(Variant("dora", 2))
    assert (half.adapter.method, half.adapter.rank, half.adapter.alpha) == ("dora", 2, 6.0)
    assert (half.seed, half.optimizer.lr, half.optimizer.magnitude_lr) == (7, 0.25, None)
    assert (half.train.steps, half.train.epochs, half.train.checkpoint_every, half.evaluate.every) == (2, None, 0, 0)
    lora, dora = trained(Variant("lora", 4)), trained(Variant("dora", 4))
    assert lora.adapter.alpha / lora.adapter.rank == dora.adapter.alpha / dora.adapter.rank == 3.0
    assert lora.adapter.extra_trainable == dora.adapter.extra_trainable == loaded.adapter.extra_trainable
    full = trained(FULL)
    assert set(full.adapter.parts) == {"text.qv", "text.ko", "text.mlp", "cross.qv", "cross.ko"}
    assert set(full.adapter.extra_trainable) == {"visual_embedding", "biases", "norms", "embeddings"}
    assert (full.adapter.dropout, lora.adapter.dropout) == (0.0, 0.1)


def changed(tasks: list[dict], **valid: dict) -> list[dict]:
    return [{**task, "valid": valid.get(task["task"], task["valid"])} for task in tasks]


def test_contradictions_are_found_before_a_folder_exists(comparison, base, tmp_path, capsys):
    def refused(path: str) -> str:
        assert main(["compare", path]) == 2
        assert not (tmp_path / "campaign").exists()
        return capsys.readouterr().err

    report = yaml.safe_load(Path(comparison()).read_text())["vl"]["report"]
    shared = {**report, "tasks": changed(report["tasks"], vqa=vqa("val", skip=1))}
    assert "images of vqa are also in the valid of vqa in" in refused(comparison(report=shared))
    trained = {**report, "tasks": changed(report["tasks"], vqa=vqa("train", limit=30))}
    assert "images of vqa are also in the train of vqa in" in refused(comparison(report=trained))
    unanswered = {**vqa("val", skip=first_of_image(2)), "annotations": None}
    without = {**report, "tasks": changed(report["tasks"], vqa=unanswered)}
    assert "has no answers to compare with: it is a test split" in refused(comparison(report=without))
    single = vqa("val", skip=first_of_image(2), limit=1)
    alone = {**report, "tasks": changed(report["tasks"], vqa=single)}
    assert "vl.report.tasks: vqa has only one image" in refused(comparison(report=alone))
    fewer = {**report, "tasks": report["tasks"][:1]}
    assert "vl.report.tasks: must be the tasks of" in refused(comparison(report=fewer))

    assert "is a config of compare, not of train_vl" in refused(comparison(base=str(tmp_path / "compare.yaml")))
    untuned = {**base.values["data"], "tasks": [{**base.values["data"]["tasks"][0], "valid": None}]}
    for changes, message in (
        ({"data": untuned, "evaluate": {}}, "has no valid for vqa"),
        ({"adapter": {"rank": 2, "init_from": "some"}}, "has adapter.init_from"),
    ):
        config = comparison()
        base(**changes)
        assert message in refused(config)
    base()
    adapted = {
        "vision": {"tower": "timm/vit_tiny_patch16_224"},
        "adapter": {"rank": 2, "parts": ["text.qv", "cross.qv", "vision.attn"]},
    }
    config = comparison(features=[str(tmp_path)], report=fewer)
    seen = {split: {**vqa(split), "images": str(SAMPLES / "images")} for split in ("train", "val")}
    task = {"task": "vqa", "train": seen["train"], "valid": seen["val"]}
    base(**adapted, data={**base.values["data"], "tasks": [task]})
    assert "adapts the vision tower" in refused(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [3, 3]}, "seeds names a seed twice"),
        ({"seeds": [3]}, "seeds"),
        ({"ranks": [4, 3]}, "ranks: 3 has no half: take an even rank, or set half_ranks: false"),
        ({"ranks": [4, 4]}, "ranks names a rank twice"),
        ({"variants": [{"name": "b4", "rank": 4}]}, "b4 changes nothing: give overrides or magnitude_lr_ratio"),
        ({"variants": [{"name": "b4", "rank": 4, "overrides": ["seed=1"]}]}, "seed is set for each training"),
        ({"variants": [{"name": "b4", "rank": 1, "magnitude_lr_ratio": 2.0}]}, "b4 is of rank 1, which ranks does not"),
        (
            {"variants": [{"name": "b4", "rank": 4, "method": "lora", "magnitude_lr_ratio": 2.0}]},
            "b4: lora has no magnitudes",
        ),
        ({"variants": [{"name": "b4", "rank": 4, "overrides": ["optimizer.b_ratio=1"]}]}, "b_ratio"),
        ({"report": {"tasks": [{"task": "vqa"}]}}, "vl: report.tasks: vqa has no valid"),
        ({"report": {"tasks": [{"task": "vqa", "train": vqa("train")}]}}, "report.tasks: vqa may only have valid"),
    ],
)
def test_invalid_configs(comparison, capsys, changes, message):
    assert main(["compare", comparison(**changes)]) == 2
    assert message in capsys.readouterr().err


def test_equal_names_are_equal_images_unless_their_folders_differ(tmp_path):
    def split(folder: Path | None, *names: str) -> ValidationSet:
        return ValidationSet(SimpleNamespace(images=lambda: names), folder and str(folder))

    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    a, b = tmp_path / "a", tmp_path / "b"
    assert shared_images(split(a, "1.png", "2.png"), split(b, "2.png")) == set()
    assert shared_images(split(a, "sub/2.png"), split(a / "sub", "2.png")) == {str(a / "sub" / "2.png")}
    assert shared_images(split(a, "sub/2.png", "1.png"), split(None, "2.png")) == {"2"}
