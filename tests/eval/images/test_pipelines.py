"""fit_judge, eval_diffusion and compare on a model with random weights: files, resuming and mistakes."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.models import ModelConfig
from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.scores import Scores
from dora_mm.models.images.families import load_image_model
from dora_mm.recipes import PIPELINES
from dora_mm.sampling import generating
from dora_mm.sampling.gallery.data import befores
from dora_mm.sampling.manifest import read_manifest
from dora_mm.studies.campaigns import trainings
from dora_mm.studies.campaigns.comparison import MethodComparison
from dora_mm.studies.campaigns.subprocesses import TrainingProcess
from dora_mm.utils.digest import file_digest, module_digest
from samples.build.__main__ import main as build
from tests.shared.edits import edits, named
from tests.shared.images.tiny_flows import FLOWS, NAMES
from tests.shared.killed import files_in

compare = PIPELINES.load("compare")

ROWS = ("bare_model_flat_prompts", "bare_model", "adapter")
PROMPT = "a TOK icon of {thing}, in the style of TOK"


def write(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def classifier_for(folder: Path, classifier: Classifier, model: Path) -> Path:
    """Saves a classifier as one for the VAE of a model."""
    found = load_image_model(ModelConfig(path=str(model)))
    origin = {"model": str(model), "resolution": 64, "vae": module_digest(found.vae)}
    replace(classifier, origin=origin).save(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_folder, classifier):
    """A classifier for the random model, fitted on icons as they are."""
    return classifier_for(tmp_path_factory.mktemp("judge"), classifier, tiny_folder)


@pytest.fixture
def base(tmp_path, tiny_folder, image_folder):
    config = {
        "pipeline": "train_diffusion",
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "alpha": 7.0},
        "data": {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK"},
        "optimizer": {"lr": 0.01, "magnitude_lr": 0.1},
        "train": {"steps": 2, "batch_size": 2},
        "sample": {"prompts": ["a TOK icon of a bus"], "steps": 2},
    }
    return write(tmp_path / "base.yaml", config)


@pytest.fixture
def evaluation(tmp_path, tiny_folder, fitted):
    def config(**changes):
        values = {
            "pipeline": "eval_diffusion",
            "output": str(tmp_path / "scores"),
            "model": {"path": str(tiny_folder)},
            "classifier": str(fitted),
            "style": "3d",
            "prompt": PROMPT,
            "concepts": {"role": "report", "count": 3, "seeds": [0, 1]},
            "sampling": {"steps": 2, "batch_size": 6},
        }
        return write(tmp_path / "eval.yaml", {**values, **changes})

    return config


@pytest.fixture
def comparison(tmp_path, base, fitted):
    def config(images=None, **changes):
        rates = [1e-3, 1e-2, 1e-1]
        values = {
            "pipeline": "compare",
            "output": str(tmp_path / "campaign"),
            "base": base,
            "steps": 1,
            "ranks": [2],
            "learning_rates": {method: list(rates) for method in ("full", "lora", "dora")},
            "seeds": [0, 1],
        }
        judged = {
            "classifier": str(fitted),
            "style": "brick",
            "prompt": PROMPT,
            "tune": {"role": "tune", "count": None, "seeds": [0]},
            "report": {"role": "report", "count": 3},
            "sampling": {"steps": 1, "batch_size": 6},
            "columns": 2,
        }
        values["images"] = {**judged, **(images or {})}
        return write(tmp_path / "compare.yaml", {**values, **changes})

    return config


@pytest.mark.slow
def test_fit_classifier_writes_a_classifier_and_reports_its_accuracy(tmp_path, tiny_folder, icons):
    values = {"pipeline": "fit_judge", "model": {"path": str(tiny_folder)}, "icons": str(icons)}
    output = tmp_path / "judge"
    assert build(["eval", write(tmp_path / "judge.yaml", {**values, "output": str(output)})]) == 0
    classifier = Classifier.load(output)
    assert classifier.origin["resolution"] == 64
    assert (output / "config.yaml").is_file()
    # a random VAE removes bricks and shading, so the classifier is not accurate enough
    assert classifier.shortcomings()


def test_eval_scores_the_bare_model_and_an_adapter(evaluation, base, tmp_path, capsys, caplog):
    assert main(["train", base, "--set", f"output={tmp_path / 'run'}", "--set", "sample.prompts=[]"]) == 0
    assert main(["eval", evaluation(adapter={"path": str(tmp_path / "run" / "adapter")})]) == 0
    folder = tmp_path / "scores"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["rows"]) == ["bare model, flat prompts", "bare model", "adapter"]
    for row in metrics["rows"].values():
        assert set(row) == {"style", "log_odds", "frechet", "concept", "both"}
        assert row["style"]["low"] <= row["style"]["mean"] <= row["style"]["high"]
    assert Scores.load(folder / "scores" / "adapter.json").ranks.shape == (3, 2)
    assert (folder / "sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "| adapter |" in printed
    assert [
        message for message in caplog.messages if message.startswith("The classifier knows the styles flat, 3d, brick")
    ]
    assert "concepts that it has not seen" in printed
    assert (folder / "table.md").read_text().strip() in printed
    check_manifest(folder, Scores.load(folder / "scores" / "adapter.json"))


@pytest.mark.slow
def test_the_bare_model_is_drawn_before_an_adapter_replaces_its_weights(evaluation, base, tmp_path):
    full = [
        "--set",
        "adapter={method: full, rank: 2}",
        "optimizer.magnitude_lr=null",
        f"output={tmp_path / 'run'}",
        "sample.prompts=[]",
    ]
    assert main(["train", base, *full]) == 0
    assert main(["eval", evaluation(adapter={"path": str(tmp_path / "run" / "adapter")})]) == 0
    shutil.copytree(tmp_path / "scores", tmp_path / "full")
    shutil.rmtree(tmp_path / "scores")
    assert main(["eval", evaluation()]) == 0
    rows = {name: [file_digest(f) for f in sorted((tmp_path / "full/samples" / name).iterdir())] for name in ROWS}
    bare = [file_digest(f) for f in sorted((tmp_path / "scores/samples/bare_model").iterdir())]
    assert rows["bare_model"] == bare
    assert not set(rows["adapter"]) & set(bare)


def check_manifest(folder: Path, scores: Scores) -> None:
    """Every image is kept, with its settings and its scores; the gallery finds the one before each of the adapter's."""
    entries = read_manifest(folder)
    assert len({entry.file for entry in entries}) == len(entries) == 3 * 3 * 2
    assert [entry.row for entry in entries] == list(range(1, 19))
    assert [entry.batch for entry in entries] == [1] * 6 + [2] * 6 + [3] * 6
    assert all(file_digest(folder / entry.file) == entry.digest for entry in entries)
    flat, bare, adapted = entries[:6], entries[6:12], entries[12:]
    things = {entry.settings["prompt"].removeprefix("a flat icon of ") for entry in flat}
    assert {entry.settings["prompt"] for entry in bare} == {PROMPT.format(thing=thing) for thing in things}
    assert [entry.settings["adapter"] is None for entry in entries] == [True] * 12 + [False] * 6
    assert [entry.settings["seed"] for entry in adapted] == [0, 1] * 3
    assert {entry.settings["width"] for entry in entries} == {64}
    assert [entry.scores["rank of the thing"] for entry in adapted] == scores.ranks.flatten().tolist()
    assert [entry.scores["right thing"] for entry in adapted] == scores.recognised().flatten().tolist()
    found = [entry.scores["log-odds of the style"] for entry in adapted]
    assert found == pytest.approx(scores.log_odds("3d").flatten().tolist(), abs=1e-3)
    assert befores([("run", entry) for entry in entries]) == [None] * 12 + list(range(6, 12))
    assert [entry.settings["prompt"] for entry in bare] == [entry.settings["prompt"] for entry in adapted]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_goes_on_in_its_folder(evaluation, tmp_path, monkeypatch, caplog, capsys):
    """It is interrupted in its second batch; images that were generated stay, unless they are damaged."""
    assert main(["eval", evaluation()]) == 0
    folder, rows = tmp_path / "scores", []
    whole, before = files_of(folder), files_in(folder / "samples")
    assert main(["eval", evaluation()]) == 0
    assert (files_of(folder), files_in(folder / "samples")) == (whole, before)
    shutil.rmtree(folder)
    draw, save = generating.generate_batch, generating.save_image

    def counted(job, batch, sampler, on_step=None):
        rows.append({job.names[index].partition("/")[0] for index in batch})
        draw(job, batch, sampler, on_step)

    def stopped(file, *arguments):
        if len(rows) == 2 and file.name.endswith("seed1.png"):
            raise KeyboardInterrupt
        save(file, *arguments)

    monkeypatch.setattr(generating, "generate_batch", counted)
    monkeypatch.setattr(generating, "save_image", stopped)
    assert main(["eval", evaluation()]) == 130
    assert len(list(folder.rglob("*-seed*.png"))) == 6 + 1
    monkeypatch.setattr(generating, "save_image", save)
    assert main(["eval", evaluation()]) == 0
    assert rows == [{"bare_model_flat_prompts"}, {"bare_model"}, {"bare_model"}]
    assert files_of(folder) == whole
    image = next((folder / "samples" / "bare_model").iterdir())
    image.write_bytes(image.read_bytes()[:-1])
    assert main(["eval", evaluation()]) == 0
    assert rows[3:] == [{"bare_model"}]
    shutil.rmtree(folder / "earlier")
    assert files_of(folder) == whole
    assert "circumstances" not in caplog.text
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert main(["eval", evaluation()]) == 0
    assert files_of(folder) == whole
    other = "computed under other circumstances, which may change last bits: MKL_CBWR none is COMPATIBLE"
    assert f"12 of 12 images that are there were {other}" in caplog.messages
    monkeypatch.delenv("MKL_CBWR")
    assert main(["eval", evaluation(style="brick")]) == 2
    assert "was started with different values of style: choose another folder" in capsys.readouterr().err


def test_eval_without_an_adapter_and_with_clip(evaluation, tmp_path, image_folder, clip_folder, capsys):
    clip = {"path": str(clip_folder), "images": str(image_folder)}
    assert main(["eval", evaluation(clip=clip)]) == 0
    rows = json.loads((tmp_path / "scores" / "metrics.json").read_text())["rows"]
    assert list(rows) == ["bare model, flat prompts", "bare model"]
    assert -1 <= rows["bare model"]["CLIP text similarity"]["mean"] <= 1
    assert "CLIP image similarity" in capsys.readouterr().out
    entries = read_manifest(tmp_path / "scores")
    mean = sum(entry.scores["CLIP text similarity"] for entry in entries[6:]) / 6
    assert mean == pytest.approx(rows["bare model"]["CLIP text similarity"]["mean"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": "nowhere"}, "classifier: nowhere does not exist"),
        ({"prompt": "a TOK icon"}, "prompt must contain {thing} once"),
        ({"concepts": {"role": "report", "count": 7}}, "has 6 with role report, not 7"),
        ({"adapter": {"path": "nowhere"}}, "adapter.path: nowhere does not exist"),
        ({"clip": {"path": "./nowhere"}}, "clip.path: ./nowhere does not exist"),
        ({"concepts": {"role": "report", "count": 2}}, "concepts.count: must be greater than or equal to 3"),
        ({"adapter": {"path": "other.safetensors"}}, "other.safetensors does not fit this model"),
        ({"clip": {"path": "CLIP", "images": "empty"}}, "clip.images: empty contains no images"),
    ],
)
def test_eval_reports_mistakes_before_it_generates_images(evaluation, tmp_path, capsys, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = {"unet.unknown.lora_A.weight": torch.ones(1, 2), "unet.unknown.lora_B.weight": torch.ones(2, 1)}
    save_file(unknown, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    assert main(["eval", evaluation(**changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_eval_rejects_the_classifier_of_another_model(evaluation, tmp_path, tiny, capsys):
    tiny.vae.decoder.conv_in.bias.data += 0.1
    tiny.pipeline().save_pretrained(tmp_path / "other")
    assert main(["eval", evaluation(model={"path": str(tmp_path / "other")})]) == 2
    assert "another VAE" in capsys.readouterr().err


@pytest.fixture
def commands(monkeypatch):
    """The trainings that a comparison starts, which run in this process."""
    found = []

    def in_this_process(name, arguments, log_file, threads):
        found.append(arguments)
        assert main(arguments) == 0
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", in_this_process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS, ids=NAMES)
def test_another_family_is_compared_by_the_same_recipe(flow, comparison, base, classifier, tmp_path, monkeypatch):
    """The first training is copied for the others."""
    runs = []

    def trained_or_copied(name, arguments, log_file, threads):
        output = arguments[-1].removeprefix("output=")
        if runs:
            shutil.copytree(runs[0], output)
        else:
            assert main(arguments) == 0
        runs.append(output)
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", trained_or_copied)
    folder = flow.build(tmp_path / "other")
    values = yaml.safe_load(Path(base).read_text()) | {"model": {"path": str(folder)}}
    own = classifier_for(tmp_path / "judge", classifier, folder)
    rates = {method: [1e-3, 1e-2, 1e-1] for method in ("lora", "dora")}
    settings = {"extra_rates": 0, "half_ranks": False, "learning_rates": rates}
    config = comparison({"classifier": str(own)}, base=write(tmp_path / "other.yaml", values), **settings)
    assert main(["compare", config]) == 0
    assert len(runs) == 2 * (3 + 1)
    rows = list(csv.DictReader((tmp_path / "campaign" / "results.csv").open()))
    assert [row["name"] for row in rows[2:]] == ["LoRA, rank 2", "DoRA, rank 2"]


@pytest.mark.slow
def test_comparison_trains_scores_and_reports(comparison, tmp_path, commands, capsys, monkeypatch, caplog):
    config = comparison(extra_rates=0)
    assert main(["compare", config]) == 0
    # full, LoRA 2, DoRA 1 and 2: three rates each, and one more run at the best rate for the second seed
    assert len(commands) == 4 * (3 + 1)
    folder = tmp_path / "campaign"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["name"] for row in rows] == [
        "bare model, flat prompts",
        "bare model",
        "full fine-tuning",
        "LoRA, rank 2",
        "DoRA, rank 2",
        "DoRA, half of rank 2",
    ]
    assert float(rows[-1]["parameters"]) < float(rows[-2]["parameters"])
    table = (folder / "table.md").read_text()
    assert "DoRA, rank 2 - LoRA, rank 2" in table
    assert "of 16 intervals exclude 0" in table
    assert (folder / "sheet.png").is_file()
    trained = load_config(next((folder / "runs").glob("lora-r2-*")) / "config.yaml")
    assert (trained.adapter.alpha, trained.optimizer.magnitude_lr, trained.train.steps) == (2.0, None, 1)
    assert len(list((folder / "pictures").glob("bare-model-report/*.png"))) == 6

    # Started again, it trains nothing and only writes the report.
    before = files_in(folder)
    assert main(["compare", config]) == 0
    assert files_in(folder) == before
    before = table
    commands.clear()
    (folder / "table.md").unlink()
    assert main(["compare", config]) == 0
    assert commands == []
    assert (folder / "table.md").read_text() == before

    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    caplog.clear()
    assert main(["compare", config]) == 0
    monkeypatch.delenv("MKL_CBWR")
    (said,) = (message for message in caplog.messages if "circumstances" in message)
    kept = 16 + len(list((folder / "scores").iterdir()))  # trainings and scores
    assert said.startswith(f"{kept} of {kept} kept trainings, scores and answers were computed under other circum")

    free = {"workers": 2, "images": {"columns": 1}}  # these do not change the results
    assert main(["compare", comparison(extra_rates=0, **free)]) == 0
    assert main(["compare", comparison(extra_rates=0, steps=2)]) == 2
    assert "different values of steps" in capsys.readouterr().err


def open_campaign(path: str) -> MethodComparison:
    config = load_config(path)
    return MethodComparison(config, compare.build_evaluation(config))


def test_comparison_is_not_resumed_with_other_weights_or_another_classifier(
    comparison, base, fitted, tmp_path, tiny, capsys
):
    open_campaign(comparison())
    Path(base).write_text(Path(base).read_text() + "loss: {min_snr_gamma: 1.0}\n")
    with pytest.raises(ValueError, match="different values of base:"):
        open_campaign(comparison())
    other = tmp_path / "other"
    tiny.unet.conv_out.bias.data += 0.1
    tiny.pipeline().save_pretrained(other)
    values = yaml.safe_load(Path(base).read_text())
    write(tmp_path / "elsewhere.yaml", {**values, "loss": {}, "model": {"path": str(other)}})
    with pytest.raises(ValueError, match="the weights of unet:"):
        open_campaign(comparison(base=str(tmp_path / "elsewhere.yaml")))


@pytest.mark.slow
def test_a_comparison_refuses_each_edited_file_of_its_model(comparison, base, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    write(Path(base), yaml.safe_load(Path(base).read_text()) | {"model": {"path": str(model)}})
    open_campaign(comparison())
    for file in edits(model):
        if file == "vae/diffusion_pytorch_model.safetensors":
            with pytest.raises(ValueError, match="classifier: fitted for images of 64 px and another VAE"):
                open_campaign(comparison())
        elif name := named(file):
            with pytest.raises(ValueError, match=f"was started with different values of {name}: choose"):
                open_campaign(comparison())
        else:
            open_campaign(comparison())


@pytest.mark.slow
def test_an_evaluation_refuses_each_edited_file_of_its_model(evaluation, tiny_folder, tmp_path, capsys):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    command = ["eval", evaluation(model={"path": str(model)}, concepts={"role": "report", "count": 3, "seeds": [0]})]
    assert main(command) == 0
    for file in edits(model):
        name = named(file)
        assert main(command) == (2 if name else 0)
        assert not name or f"was started with different values of {name}: choose" in capsys.readouterr().err


def test_comparison_reports_mistakes(comparison, base, capsys, tmp_path):
    assert main(["compare", comparison(base="configs/sdxl/eval_tiny.yaml")]) == 2
    assert "is a config of eval_diffusion" in capsys.readouterr().err
    assert main(["compare", comparison(images={"tune": {"role": "report", "count": 3}})]) == 2
    assert "images: tune.role and report.role must differ" in capsys.readouterr().err
    assert main(["compare", comparison(vl={"report": {"valid": {"format": "chat", "file": base}}})]) == 2
    assert "give either images or vl" in capsys.readouterr().err
    values = yaml.safe_load(Path(base).read_text())
    values["adapter"]["parts"] = {"unet.attn": {"rank": 1}}
    assert main(["compare", comparison(base=write(tmp_path / "ranks.yaml", values))]) == 2
    assert "gives adapter.parts: unet.attn settings of its own, which would hide" in capsys.readouterr().err
    (tmp_path / "campaign").mkdir()
    (tmp_path / "campaign" / "notes.txt").touch()
    assert main(["compare", comparison()]) == 2
    assert "exists already and is not a run directory: choose another folder" in capsys.readouterr().err
