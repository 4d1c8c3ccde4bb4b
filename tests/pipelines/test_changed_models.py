"""Commands that keep results, and go on after a file of their model was edited: refused by its name, or not read."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.models import ModelConfig
from dora_mm.models.folders import identity_of as identity_of_folder
from dora_mm.models.images.families import identity_of
from dora_mm.recipes import PIPELINES
from dora_mm.studies.campaigns.tuning import Tuning
from dora_mm.utils.run_directory import MODEL, RunDirectory
from tests.shared.data.vlm_rows import write_images
from tests.shared.edits import edits, named
from tests.shared.images.tiny_flows import FLOWS

tune = PIPELINES.load("tune")
FAMILIES = ("sdxl", "z_image")
VLM = "qwen2_5_vl"


@pytest.fixture
def image_model(tiny_folder, tmp_path):
    """A copy of a tiny model of a family."""

    def copied(family: str) -> Path:
        if family == "sdxl":
            return shutil.copytree(tiny_folder, tmp_path / "model")
        (flow,) = (flow for flow in FLOWS if flow.name == family)
        return flow.build(tmp_path / "model")

    return copied


@pytest.fixture
def vlm(tiny_vlm, tmp_path):
    return shutil.copytree(tiny_vlm(VLM), tmp_path / "model")


def written(path: Path, **values: object) -> str:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def refused(command: list[str], capsys: pytest.CaptureFixture) -> str:
    """The error of a command that is repeated; empty where it goes on."""
    capsys.readouterr()
    code, said = main(command), capsys.readouterr().err
    assert code in (0, 2), said
    return said.splitlines()[-1] if code else ""


def check(model: Path, command: list[str], capsys: pytest.CaptureFixture) -> None:
    """Checks that a command which goes on refuses each edit by name; what is not read it does not notice."""
    for file in edits(model):
        said = refused(command, capsys)
        name = named(file)
        assert name in said if name else not said, (file, said)


# --- what a model is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_file_of_an_image_model_is_one_of_its_identity(family, image_model, tmp_path):
    model = image_model(family)
    config = ModelConfig(path=str(model))
    run = RunDirectory.create("a", "pipeline: sample\n", str(tmp_path / "run"), identity_of(config).inputs)
    for file in edits(model):
        assert run.changed_inputs(identity_of(config).inputs) == [name for name in [named(file)] if name]


def test_each_file_of_a_model_of_transformers_is_one_of_its_identity(vlm, tmp_path):
    run = RunDirectory.create(
        "a", "pipeline: sample\n", str(tmp_path / "run"), identity_of_folder(str(vlm), None).inputs
    )
    for file in edits(vlm):
        assert run.changed_inputs(identity_of_folder(str(vlm), None).inputs) == [n for n in [named(file)] if n]


def test_a_file_that_was_removed_or_added_is_named(vlm, tmp_path):
    before = identity_of_folder(str(vlm), None).inputs
    run = RunDirectory.create("a", "pipeline: sample\n", str(tmp_path / "run"), before)
    (vlm / "chat_template.jinja").rename(vlm / "template.jinja")
    after = run.changed_inputs(identity_of_folder(str(vlm), None).inputs)
    assert after == ["chat_template.jinja of the model", "template.jinja of the model"]


def test_runs_of_before_are_compared_by_what_they_recorded(vlm, tiny_folder, tmp_path, caplog):
    inputs = identity_of_folder(str(vlm), None).inputs
    old = {name: digest for name, digest in inputs.items() if name != MODEL}
    run = RunDirectory.create("a", "pipeline: sample\n", str(tmp_path / "run"), old)
    assert not run.changed_inputs(inputs)
    assert run.changed_inputs({**inputs, "base_digest": "another"}) == ["the weights of the model"]
    before = {"the model's unet": "a digest", "the model": "that of a single checkpoint"}
    images = RunDirectory.create("a", "pipeline: sample\n", str(tmp_path / "images"), before)
    assert not images.changed_inputs(identity_of(ModelConfig(path=str(tiny_folder))).inputs)
    assert f"{images.path} was started by a release that did not record each file of a model" in caplog.text


def test_a_run_inside_of_a_models_folder_is_no_part_of_it(vlm):
    before = identity_of_folder(str(vlm), None)
    for name in ("LICENSE.txt", "USE_POLICY.md", "model.onnx_data", "runs/a/config.yaml", "logs/events.out"):
        (vlm / name).parent.mkdir(parents=True, exist_ok=True)
        (vlm / name).write_text("not of the model")
    assert identity_of_folder(str(vlm), None) == before


# --- what goes on -----------------------------------------------------------------------------------------------------


@pytest.fixture
def style(tmp_path, image_folder):
    """The values of a training of images."""

    def values(model: Path, steps: int = 1) -> dict:
        data = {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK", "valid": {"share": 0.3}}
        return {
            "pipeline": "train_diffusion",
            "model": {"path": str(model)},
            "adapter": {"rank": 2},
            "data": data,
            "optimizer": {"lr": 0.01},
            "train": {"steps": steps, "batch_size": 1},
        }

    return values


@pytest.fixture
def questions(tmp_path, vlm):
    """The values of a training on questions."""
    image = write_images(tmp_path) / "wide.png"
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": str(image), "conversations": said}] * 2))
    source = {"format": "chat", "file": str(tmp_path / "rows.json"), "images": str(tmp_path)}
    return {
        "pipeline": "train_vl",
        "model": {"path": str(vlm)},
        "adapter": {"rank": 2},
        "data": {"train": source, "valid": {**source}, "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 1, "batch_size": 1},
        "evaluate": {"max_new_tokens": 1},
    }


def search(config: str, folder: Path) -> None:
    """Opens a search for a learning rate as `dora-mm tune` does before its first training."""
    base = load_config(config)
    settings = tune.search_of(base, config, (), [0.01, 0.02], None, "score", None, str(folder))
    Tuning(settings, tune.build_selection_metric(settings, base))


def check_search(model: Path, config: str, folder: Path) -> None:
    search(config, folder)
    for file in edits(model):
        if name := named(file):
            with pytest.raises(ValueError, match=f"was started with different values of {name}: choose another"):
                search(config, folder)
        else:
            search(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_of_images(family, image_model, style, tmp_path, capsys):
    model = image_model(family)
    values = style(model) | {"output": str(tmp_path / "run"), "sample": {"prompts": []}}
    assert main(["train", written(tmp_path / "a.yaml", **values)]) == 0
    check(model, ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_of_images(family, image_model, style, tmp_path):
    model = image_model(family)
    values = style(model) | {"sample": {"prompts": ["a TOK bus"], "steps": 1}}
    check_search(model, written(tmp_path / "a.yaml", **values), tmp_path / "search")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_drawn_again_and_not_replayed(family, image_model, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    model = image_model(family)
    settings = {"model": {"path": str(model)}, "prompts": ["a bus"], "steps": 1, "width": 64, "height": 64}
    sample = written(tmp_path / "a.yaml", pipeline="sample", output="out", contact_sheet=False, **settings)
    axes = {"rows": {"name": "prompt", "values": ["a bus"]}, "columns": {"name": "seed", "values": [0]}}
    rest = {key: value for key, value in settings.items() if key != "prompts"}
    grid = written(tmp_path / "b.yaml", pipeline="grid", output="grid", **rest, **axes)
    assert main(["sample", sample]) == 0
    assert main(["grid", grid]) == 0
    (image,) = (tmp_path / "out" / "samples").glob("*.png")
    first = shutil.copy(image, tmp_path / "first.png")
    for file in edits(model):
        name = named(file)
        said = refused(["sample", "--replay", str(first)], capsys)
        assert bool(said) == bool(name)
        changed = "the weights" if file.endswith(".safetensors") else file
        if name:
            assert f"has changed since the image was drawn: {changed}" in said
        for command in (["sample", sample], ["grid", grid]) if name else ():
            caplog.clear()
            assert main(command) == 0
            said = caplog.text.partition("were drawn with another model (")[2].partition(" changed)")[0]
            assert changed in said.split(", ")  # beside the file of the edit before
    assert main(["sample", sample]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_of_a_style(family, image_model, style, tmp_path, capsys):
    model = image_model(family)
    values = style(model) | {"output": str(tmp_path / "run"), "sample": {"prompts": []}}
    assert main(["train", written(tmp_path / "a.yaml", **values)]) == 0
    drawing = {"prompts": ["a TOK bus"], "prompts_without_style": ["a cat"], "seeds": [0], "steps": 1}
    scored = {"pipeline": "eval_style", "adapter": {"path": str(tmp_path / "run")}, "output": str(tmp_path / "scores")}
    command = ["eval", written(tmp_path / "b.yaml", **scored, **drawing)]
    assert main(command) == 0
    check(model, command, capsys)


@pytest.mark.slow
def test_a_training_on_questions(vlm, questions, tmp_path, capsys):
    assert main(["train", written(tmp_path / "a.yaml", **questions, output=str(tmp_path / "run"))]) == 0
    check(vlm, ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"], capsys)


@pytest.mark.slow
def test_an_evaluation_of_answers(vlm, questions, tmp_path, capsys):
    data = {"valid": questions["data"]["valid"], "tables": questions["data"]["tables"]}
    values = {"pipeline": "eval_vl", "model": questions["model"], "data": data, "decode": {"max_new_tokens": 1}}
    command = ["eval", written(tmp_path / "a.yaml", **values, output=str(tmp_path / "run"))]
    assert main(command) == 0
    check(vlm, command, capsys)


@pytest.mark.slow
def test_a_search_on_questions(vlm, questions, tmp_path):
    check_search(vlm, written(tmp_path / "a.yaml", **questions), tmp_path / "search")
