"""From the committed scenes to an adapter and its scores, through the command line."""

import json
import shlex
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from dora_mm import load_adapter
from dora_mm.cli import main
from dora_mm.config.models import VLBartModelConfig
from dora_mm.models.vl.vl_bart.loading import from_bart, load_vl_bart, save_vl_bart
from dora_mm.recipes import PIPELINES
from dora_mm.train.metrics import read_metrics
from tests.shared.data.vl_samples import captions, vqa
from tests.shared.killed import assert_same_weights, files_in, kill_after
from tests.shared.vl.small_towers import DIM
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

EXTRA = ["visual_embedding", "biases", "norms"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), folder)
    return folder


def short_training(folder: Path, model_folder: Path, vision: dict) -> dict:
    """The config of four steps of two tasks, whose run goes into a folder."""
    return {
        "pipeline": "train_vl",
        "output": str(folder / "run"),
        "model": {"family": "vl_bart", "path": str(model_folder)},
        "vision": vision,
        "adapter": {"method": "dora", "rank": 2, "extra_trainable": EXTRA},
        "data": {
            "tables": str(folder / "tables"),
            "tasks": [
                {"task": "vqa", "train": vqa("train", 16), "valid": vqa("val", 8)},
                {"task": "caption", "batch_size": 2, "train": captions("train", 8)},
            ],
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "linear", "warmup_ratio": 0.1},
        "train": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "log_every": 1},
        "evaluate": {"every": 2, "batch_size": 8},
        "ema": {"decay": 0.5},
    }


@pytest.fixture
def config(tmp_path, model_folder, vision):
    """Writes the config; keyword arguments replace sections. Its attribute `values` has the sections."""
    values = short_training(tmp_path, model_folder, vision)
    path = tmp_path / "config.yaml"

    def write(**changes) -> Path:
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    write.values = values
    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, vision):
    """The folder of a training that was not interrupted, with its run and what it printed; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(yaml.safe_dump(short_training(folder, model_folder, vision)))
    with redirect_stdout(StringIO()) as shown:
        assert main(["train", str(folder / "config.yaml")]) == 0
    (folder / "shown.txt").write_text(shown.getvalue())
    return folder


def test_it_trains_scores_and_saves_a_loadable_adapter(finished, config, tmp_path, model_folder):
    run = finished / "run"
    assert "answer_type" in (finished / "shown.txt").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert {"vqa", "overall", "vqa_loss", "ema_vqa", "ema_vqa_loss", "best_step"} <= summary.keys()
    assert (run / "adapter-ema" / "adapter_model.safetensors").is_file()
    assert 0 < summary["seconds_per_step"] <= summary["seconds"]
    assert 0 < summary["trainable_share"] < 100
    assert summary["peak_memory_mb"] > 100
    assert [row["step"] for row in read_metrics(run / "validation" / "metrics.jsonl")] == [2, 4]
    assert (run / "best" / "overall" / "adapter_model.safetensors").is_file()
    results = ModelCard.load(run / "adapter" / "README.md").data.eval_results
    assert {result.dataset_name for result in results} == {"vqa"}
    assert results[0].metric_value == pytest.approx(summary["vqa"], abs=0.01)

    trained = load_file(run / "checkpoints" / "step-000004" / "trained_weights.safetensors")
    model, _ = load_vl_bart(VLBartModelConfig(family="vl_bart", path=str(model_folder)), DIM, 0)
    load_adapter({"model": model}, run / "adapter")
    ours = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert {name: torch.equal(ours[name], tensor) for name, tensor in trained.items()} == dict.fromkeys(trained, True)

    evaluation = {key: config.values[key] for key in ("model", "vision", "data")}
    evaluation["data"]["tasks"].pop()  # captions, which the slow test below scores
    page = config(**evaluation)
    page.write_text(
        yaml.safe_dump(
            {**evaluation, "pipeline": "eval_vl", "adapter": str(run), "output": str(tmp_path / "eval"), "examples": 3}
        )
    )
    assert main(["eval", str(page)]) == 0
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores["vqa"]["metrics"]["accuracy"] == pytest.approx(summary["vqa"], abs=0.01)
    predictions = json.loads((tmp_path / "eval" / "predictions_vqa.json").read_text())
    assert len(predictions) == 8
    assert {"question_id", "answer"} == predictions[0].keys()
    assert "data:image/" in (tmp_path / "eval" / "examples.html").read_text()


def test_a_finished_run_that_is_resumed_writes_nothing(finished, caplog):
    caplog.set_level("INFO")
    before = files_in(finished / "run")
    assert main(["train", "--resume", str(finished / "run")]) == 0
    how = f"dora-mm train --resume {shlex.quote(str(finished / 'run'))}"
    assert f"To train longer: {how} --set train.steps=8" in caplog.messages
    assert files_in(finished / "run") == before


def test_numbers_of_processes_that_do_not_fit_each_other_are_damage(finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    inputs = (run / "inputs.json").read_text()
    assert '"the number of processes": "1",\n  "the micro-batches of a step": "1"' in inputs
    (run / "inputs.json").write_text(inputs.replace('processes": "1"', 'processes": "2"'))
    before = files_in(run)
    assert main(["train", "--resume", str(run), "--set", "train.steps=8"]) == 2
    assert "inputs.json is damaged (the number of processes): the run cannot go on" in capsys.readouterr().err
    assert files_in(run) == before


@pytest.mark.slow
def test_captions_are_scored_while_they_train_and_after(config, tmp_path):
    config.values["data"]["tasks"][1]["valid"] = captions("val", 4)
    assert main(["train", str(config(train={"steps": 1, "batch_size": 2}, evaluate={"batch_size": 8}))]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"vqa", "overall", "vqa_loss", "caption_loss", "ema_vqa"} <= summary.keys()
    results = ModelCard.load(tmp_path / "run" / "adapter" / "README.md").data.eval_results
    assert {result.dataset_name for result in results} == {"vqa", "caption"}
    evaluation = {key: config.values[key] for key in ("model", "vision", "data")}
    evaluation |= {"pipeline": "eval_vl", "adapter": str(tmp_path / "run"), "output": str(tmp_path / "eval")}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert {"CIDEr", "METEOR"} <= scores["caption"]["metrics"].keys()
    before = files_in(tmp_path / "eval")
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    assert files_in(tmp_path / "eval") == before


def test_a_killed_run_is_resumed_to_the_same_bits(finished, config, tmp_path):
    kill_after("step-000002", config(), tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_weights("step-000004", finished / "run", tmp_path / "run")
    logs = [read_metrics(folder / "run" / "validation" / "metrics.jsonl") for folder in (finished, tmp_path)]
    assert logs[0] == logs[1]
    curves = [read_metrics(folder / "run" / "metrics.jsonl") for folder in (finished, tmp_path)]
    for row in curves[0] + curves[1]:
        del row["seconds"]
    assert curves[0] == curves[1]


def test_a_finished_run_is_extended_by_epochs_and_checkpoints_activations(config, tmp_path, caplog, capsys):
    """Checkpointing activations changes no bit, so it may be switched on in the middle of a run."""
    caplog.set_level("INFO")
    tasks = [{"task": "vqa", "train": vqa("train", 8), "valid": vqa("val", 4)}]
    changes = {"data": {"tables": str(tmp_path / "tables"), "tasks": tasks}, "schedule": {"name": "constant"}}
    run = tmp_path / "run"
    assert main(["train", str(config(**changes, train={"epochs": 1, "batch_size": 4}))]) == 0
    assert f"dora-mm train --resume {shlex.quote(str(run))} --set train.epochs=2" in caplog.text
    overrides = ["train.epochs=2", "train.gradient_checkpointing=true"]
    assert main(["train", "--resume", str(run), "--set", *overrides]) == 0
    longer = config(**changes, train={"epochs": 2, "batch_size": 4}, output=str(tmp_path / "longer"))
    assert main(["train", str(longer)]) == 0
    assert_same_weights("step-000004", tmp_path / "longer", run)
    assert main(["train", "--resume", str(run), "--set", "evaluate.limit=2"]) == 2
    assert "evaluate.limit cannot change" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_run_through_the_same_code(config, tmp_path, method):
    adapter = {"method": method, "rank": 2, "extra_trainable": ["visual_embedding", "biases", "norms", "embeddings"]}
    tasks = [{"task": "vqa", "train": vqa("train", 8), "valid": vqa("val", 4)}]
    path = config(
        adapter=adapter, data={"tables": str(tmp_path / "tables"), "tasks": tasks}, train={"steps": 2, "batch_size": 4}
    )
    assert main(["train", str(path)]) == 0
    kind = "trained_weights" if method == "full" else "adapter_model"
    assert (tmp_path / "run" / "adapter" / f"{kind}.safetensors").is_file()


def test_an_epoch_covers_every_task_once(config, tmp_path):
    tasks = [
        {"task": "vqa", "train": vqa("train", 8)},
        {"task": "caption", "batch_size": 2, "train": captions("train", 4)},
    ]
    data = {"tables": str(tmp_path / "tables"), "tasks": tasks}
    path = config(train={"epochs": 2, "batch_size": 4, "log_every": 1}, data=data, evaluate={})
    assert main(["train", str(path)]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2 * (8 // 4 + 4 // 2)


def test_the_tower_can_be_adapted_too(config, tmp_path, model_folder):
    torch.manual_seed(0)
    bart = from_bart(small_bart(), len(small_tokenizer()), 64, "image")
    save_vl_bart(bart, small_tokenizer(), tmp_path / "model")
    path = config(
        model={"family": "vl_bart", "path": str(tmp_path / "model")},
        vision={"tower": "timm/test_vit", "pretrained": None},
        adapter={"method": "dora", "rank": 2, "parts": ["text.qv", "cross.qv", "vision.attn"]},
        data={"tables": str(tmp_path / "tables"), "tasks": [{"task": "vqa", "train": vqa("train", 4)}]},
        train={"steps": 1, "batch_size": 2},
        evaluate={},
    )
    assert main(["train", str(path)]) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "vision" / "adapter_model.safetensors")
    assert any(".attn.qkv.lora_B" in name and tensor.any() for name, tensor in saved.items())


@pytest.fixture
def open_clip_tower(tmp_path):
    vision = {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "saved-vit.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    return "saved-vit"


def test_an_adapted_tower_that_peft_cannot_hold(config, tmp_path, open_clip_tower):
    """Also where the run saved the tower as peft before, which is then replaced."""
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), 24, "image"), small_tokenizer(), tmp_path / "model")
    shared = {
        "model": {"family": "vl_bart", "path": str(tmp_path / "model")},
        "vision": {"tower": open_clip_tower, "pretrained": None},
        "data": {
            "tables": str(tmp_path / "tables"),
            "tasks": [{"task": "vqa", "train": vqa("train", 4), "valid": vqa("val", 4)}],
        },
    }
    adapter = {"method": "dora", "rank": 2, "parts": ["text.qv", "vision.attn", "vision.mlp"]}
    train = {"steps": 2, "batch_size": 2}
    assert main(["train", str(config(**shared, adapter=adapter, train=train, evaluate={}))]) == 0
    run = tmp_path / "run"
    for folder in (run / "adapter", run / "best" / "overall"):
        assert {file.name for file in (folder / "vision").iterdir()} == {"trained_weights.safetensors", "README.md"}
        assert (folder / "adapter_model.safetensors").is_file()
        (folder / "vision" / "adapter_model.safetensors").touch()
    saved = load_file(run / "adapter" / "vision" / "trained_weights.safetensors")
    for name in ("attn.q_proj", "attn.out_proj", "mlp.c_fc"):
        assert any(f".{name}.lora_B" in key and tensor.any() for key, tensor in saved.items())

    (run / "summary.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert not list(run.glob("*/**/vision/adapter_model.safetensors"))
    again = config(
        **shared, adapter={**adapter, "init_from": str(run)}, train=train, evaluate={}, output=str(run) + "2"
    )
    assert main(["train", str(again)]) == 0
    page = {**shared, "pipeline": "eval_vl", "adapter": str(run), "output": str(tmp_path / "eval")}
    again.write_text(yaml.safe_dump(page))
    assert main(["eval", str(again)]) == 0


def test_a_dry_run_shows_trained_parameters_and_missing_data(capsys):
    assert main(["train", "configs/vl_bart/image_dora.yaml", "--dry-run"]) == 2
    shown, error = capsys.readouterr()
    assert "data/vqa/karpathy_train.json does not exist" in error
    assert "trainable 8,838,912 of 148,262,400 parameters" in shown
    assert "text.qv" in shown
    assert "data/vqa/karpathy_train.json" in shown
    assert "missing, get it from" in shown


@pytest.mark.parametrize(
    "name", ["image_dora", "image_lora", "image_lora_published", "image_ft", "video_dora", "video_lora", "video_ft"]
)
def test_every_full_size_run_has_a_dry_run(name, capsys):
    assert main(["train", f"configs/vl_bart/{name}.yaml", "--dry-run"]) == 2  # there are no data
    trained = capsys.readouterr().out.split("parameters")[0]
    expected = {
        "image_dora": "8,838,912 of 148,262,400",
        "image_lora_published": "8,786,688 of 148,234,752",
        "video_dora": "7,634,688 of 147,082,752",
        "video_lora": "7,607,040 of 147,055,104",
        "image_ft": "141,156,864 of 141,156,864",
    }
    assert expected.get(name, "trainable") in trained


def test_an_adapted_tower_gives_the_same_answers_in_eval(config, tmp_path, capsys):
    """Whether eval is given the run, the folder or the file, it loads the tower's adapter."""
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), 64, "image"), small_tokenizer(), tmp_path / "model")
    task = {"task": "vqa", "train": vqa("train", 6), "valid": vqa("val", 6)}
    shared = {
        "model": {"family": "vl_bart", "path": str(tmp_path / "model")},
        "vision": {"tower": "timm/test_vit", "pretrained": None},
        "data": {
            "tables": str(tmp_path / "tables"),
            "tasks": [task],
        },
    }
    adapter = {"method": "dora", "rank": 2, "parts": ["text.qv", "cross.qv", "vision.attn"], "dropout": 0.5}
    path = config(**shared, adapter=adapter, optimizer={"lr": 0.3}, train={"steps": 3, "batch_size": 2}, evaluate={})
    assert main(["train", str(path)]) == 0
    answers = []
    for number, place in enumerate(("", "adapter", "adapter/adapter_model.safetensors")):
        output = tmp_path / f"eval{number}"
        path.write_text(
            yaml.safe_dump(
                {**shared, "pipeline": "eval_vl", "adapter": str(tmp_path / "run" / place), "output": str(output)}
            )
        )
        assert main(["eval", str(path)]) == 0
        answers.append((output / "predictions_vqa.json").read_text())
    assert answers[0] == answers[1] == answers[2]


def test_it_continues_from_an_adapter_of_the_same_base_only(config, tmp_path, model_folder, capsys):
    short = {"train": {"steps": 1, "batch_size": 2}, "evaluate": {}}
    assert main(["train", str(config(**short, output=str(tmp_path / "first")))]) == 0
    again = {"method": "dora", "rank": 2, "extra_trainable": EXTRA, "init_from": str(tmp_path / "first")}
    assert main(["train", str(config(**short, adapter=again))]) == 0

    assert (
        main(["train", str(config(adapter={**again, "extra_trainable": ["biases"]}, output=str(tmp_path / "other")))])
        == 2
    )
    assert "which adapter.extra_trainable does not include" in capsys.readouterr().err
    torch.manual_seed(5)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), tmp_path / "model")
    other = config(
        adapter=again, model={"family": "vl_bart", "path": str(tmp_path / "model")}, output=str(tmp_path / "other")
    )
    assert main(["train", str(other)]) == 2
    assert "another base model" in capsys.readouterr().err
    other.write_text(
        yaml.safe_dump(
            {
                "vision": config.values["vision"],
                "data": {"tasks": [{"task": "vqa", "valid": vqa("val", 8)}]},
                "model": {"family": "vl_bart", "path": str(tmp_path / "model")},
                "pipeline": "eval_vl",
                "adapter": str(tmp_path / "first"),
                "output": str(tmp_path / "other"),
            }
        )
    )
    assert main(["eval", str(other)]) == 2
    assert "another base model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_interrupted_validation_is_repeated(finished, config, tmp_path, monkeypatch):
    recipe = PIPELINES.load("train_vl")
    real = recipe.score_all
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(recipe, "score_all", interrupted)
    assert main(["train", str(config())]) == 130
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    logs = [read_metrics(folder / "run" / "validation" / "metrics.jsonl") for folder in (finished, tmp_path)]
    assert logs[0] == logs[1]


def test_a_summary_that_is_missing_comes_again(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    summary = (tmp_path / "run" / "summary.json").read_text()
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    rows = read_metrics(tmp_path / "run" / "validation" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    kept = ("vqa", "overall", "loss", "steps")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {key: again[key] for key in kept} == {key: json.loads(summary)[key] for key in kept}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluate": {"answers": "trie", "min_answer_count": 900}}, "no answer occurs 900 times"),
        (
            {"schedule": {"warmup_steps": 5}, "train": {"epochs": 1, "batch_size": 24}},
            "below the 5 steps of train.epochs",
        ),
        ({"adapter": {"method": "full", "rank": 1, "dropout": 0.1}}, "full has no A and B"),
        ({"model": {"family": "vl_bart", "path": "nowhere"}}, "nowhere does not exist"),
        ({"model": {"family": "vl_bart", "path": "MODEL", "feature_dim": 9}}, "vision gives 72 channels"),
        ({"vision": {"tower": "timm/no_such"}}, "no_such"),
        ({"train": {"batch_size": 4}}, "give either train.steps or train.epochs"),
    ],
)
def test_mistakes_give_a_sentence_and_no_run(config, tmp_path, model_folder, capsys, change, message):
    change = json.loads(json.dumps(change).replace("MODEL", str(model_folder)))
    assert main(["train", str(config(**change))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_whose_config_was_edited_is_not_resumed(config, tmp_path, capsys):
    assert main(["train", str(config(train={"steps": 1, "batch_size": 2}, evaluate={}))]) == 0
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("limit: 16", "limit: 15"))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert f"{saved}, edited: data.tasks cannot change" in capsys.readouterr().err
