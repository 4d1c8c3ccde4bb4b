import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dora_mm import cli
from dora_mm.config import dump_config, load_config
from dora_mm.utils.run_directory import RunDirectory


def test_a_config_and_its_overrides_reach_the_recipe(config, pipeline):
    recipe = pipeline()
    assert cli.main(["train", str(config), "--set", "train.steps=7", "--set", "seed=3"]) == 0
    ((given, resume),) = recipe.calls
    assert given == load_config(config, ["train.steps=7", "seed=3"])
    assert resume is None


def test_mistakes_in_a_config_give_one_report_and_exit_code_2(config, pipeline, capsys):
    recipe = pipeline()
    assert cli.main(["train", str(config), "--set", "train.stesp=7", "--set", "adapter.rank=x"]) == 2
    assert recipe.calls == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "did you mean 'steps'" in printed.err
    assert "adapter.rank" in printed.err
    assert str(config) not in printed.err  # the file is right
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["sample", "eval", "features"])
def test_a_config_of_another_command_is_refused(config, pipeline, capsys, command):
    recipe, config = pipeline(), config.rename(config.with_name("my recipe.yaml"))
    assert cli.main([command, str(config)]) == 2
    assert f"needs another command: dora-mm train {shlex.quote(str(config))}" in capsys.readouterr().err
    assert recipe.calls == []


def test_train_needs_a_config_or_a_run(capsys):
    assert cli.main(["sample"]) == 2
    assert "sample needs JOBS, a CONFIG, --set prompts=[...], or --resume RUN_DIR" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert "train needs a CONFIG before --set, or --resume RUN_DIR" in capsys.readouterr().err


def test_recipes_without_a_dry_run_refuse_it(config, pipeline, capsys):
    recipe = pipeline()
    assert cli.main(["train", str(config), "--dry-run"]) == 2
    assert "--dry-run: the recipe train_diffusion does not support it" in capsys.readouterr().err
    assert recipe.calls == []


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, config):
    folder = tmp_path / "runs" / "mine" / "001"
    folder.mkdir(parents=True)
    RunDirectory(folder).write_config(dump_config(load_config(config, ["seed=5"])), {})
    return folder


def test_a_resumed_run_takes_its_own_config(run, config, pipeline):
    recipe = pipeline()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert cli.main(["train", str(config), "--set", "seed=5", "--resume", str(run)]) == 0
    assert recipe.calls == [(load_config(config, ["seed=5"]), run)] * 2


@pytest.mark.parametrize(
    "setting",
    [
        "train.steps=11",
        "train.checkpoint_every=5",
        "train.keep_checkpoints=5",
        "train.log_every=1",
        "train.gradient_checkpointing=true",
        "data.latent_cache=latents",
        "adapter.strength=1.5",
        "optimizer.lr=1e-3",
        "sample.prompts=[a bus]",
    ],
)
def test_a_resumed_run_may_change_what_its_finished_steps_do_not_depend_on(run, config, pipeline, setting):
    recipe = pipeline()
    assert cli.main(["train", "--resume", str(run), "--set", setting]) == 0
    assert cli.main(["train", str(config), "--resume", str(run), "--set", "seed=5", setting]) == 0
    assert recipe.calls == [(load_config(config, ["seed=5", setting]), run)] * 2


REFUSED = {
    "seed=6": "seed cannot change from 5 to 6: order and noise",
    "name=other": "name cannot change from 'mine' to 'other': it names the folder",
    "output=elsewhere": "output cannot change from null to 'elsewhere'",
    "backend=torch": "backend cannot change",
    "model.path=other/model": "model.path cannot change from 'some/model' to 'other/model': the checkpoints belong",
    "adapter.rank=8": "adapter.rank cannot change",
    "data.flip=true": "data.flip cannot change",
    "loss.type=l1": "loss.type cannot change",
    "optimizer.eps=1e-3": "optimizer.eps cannot change from null to 0.001: the finished steps",
    "schedule.name=cosine": "schedule.name cannot change",
    "train.batch_size=3": "train.batch_size cannot change from 2 to 3",
    "train.mixed_precision=bf16": "train.mixed_precision cannot change",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_resumed_run_names_what_may_not_change_and_what_may(run, pipeline, capsys, setting):
    recipe = pipeline()
    assert cli.main(["train", "--resume", str(run), "--set", setting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSED[setting] in line
    assert "--resume may change train.steps, " in line
    assert recipe.calls == []


def test_an_edited_config_is_honoured_or_refused_by_key(run, pipeline, capsys):
    recipe, saved = pipeline(), run / "config.yaml"
    started = saved.read_text()
    saved.write_text(started.replace("steps: 10", "steps: 12"))
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert [config.train.steps for config, _ in recipe.calls] == [12]
    saved.write_text(started.replace("seed: 5", "seed: 6"))
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert cli.main(["train", "--resume", str(run), "--set", "train.steps=12"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert f"{saved}, edited: seed cannot change from 5 to 6: order and noise" in line
    assert len(recipe.calls) == 1


def test_a_run_without_the_config_that_it_was_started_with_is_refused(run, pipeline, capsys):
    inputs = run / "inputs.json"
    for text in ("{", "[]", "{}", '{"config.yaml": {}}', inputs.read_text().replace('"rank"', '"ranc"')):
        inputs.write_text(text)
        assert cli.main(["train", "--resume", str(run)]) == 2
        assert f"{inputs} is" in capsys.readouterr().err


def test_each_refused_change_has_a_sentence(run, config, pipeline, capsys):
    recipe = pipeline()
    assert cli.main(["train", str(config), "--resume", str(run), "--set", "adapter.alpha=2", "train.steps=20"]) == 2
    printed = capsys.readouterr().err
    assert "2 keys cannot change" in printed
    assert "  seed cannot change from 5 to 0" in printed
    assert "  adapter.alpha cannot change from 4.0 to 2.0" in printed
    assert "train.steps cannot" not in printed
    assert recipe.calls == []


def test_every_section_of_a_training_config_has_a_reason_why_it_may_not_change():
    from dora_mm.config.pipelines import SCHEMAS
    from dora_mm.config.report import all_keys
    from dora_mm.train.resuming import REASONS

    for schema in SCHEMAS.values():
        if schema.command == "train":
            assert set(schema.changeable) - {"train.epochs"} <= set(all_keys(schema))
            assert {key.partition(".")[0] for key in all_keys(schema)} - set(schema.changeable) <= set(REASONS)


def test_resume_auto_starts_a_run_and_goes_on_with_it(config, pipeline, tmp_path, monkeypatch):
    """The same command, before there is a run and afterwards."""
    monkeypatch.chdir(tmp_path)
    recipe, command = pipeline(), ["train", str(config), "--resume", "auto", "--set", "output=job", "train.steps=7"]
    assert cli.main(command) == 0
    expected = load_config(config, ["output=job", "train.steps=7"])
    RunDirectory(tmp_path / "job").write_config(dump_config(expected), {})
    assert cli.main(command) == 0
    assert recipe.calls == [(expected, None), (expected, Path("job"))]


def test_resume_auto_refuses_a_config_that_has_changed(config, pipeline, tmp_path, capsys):
    """Also one that another command has written there; and a folder that is no run stays as it is."""
    recipe, run = pipeline(), tmp_path / "job"
    command = ["train", str(config), "--resume", "auto", "--set", f"output={run}"]
    RunDirectory(run).write_config(dump_config(load_config(config, [f"output={run}"])), {})
    assert cli.main([*command, "adapter.rank=8"]) == 2
    assert "adapter.rank cannot change from 4 to 8" in capsys.readouterr().err
    (run / "config.yaml").rename(run / "notes.yaml")
    assert cli.main(command) == 2
    assert f"output {run} exists already" in capsys.readouterr().err
    assert recipe.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CONFIG"], "--resume auto needs the folder of the run, by which it is found again: --set output="),
        (["train"], "train needs a CONFIG before --set\n"),
        (["sample", "--set", "prompts=[a]"], "--resume auto belongs to train: sample goes on in its `output` without"),
    ],
)
def test_resume_auto_needs_a_training_with_a_folder(config, pipeline, capsys, arguments, message):
    recipe = pipeline()
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    assert cli.main([*given, "--resume", "auto"]) == 2
    assert message in capsys.readouterr().err
    assert recipe.calls == []


def test_resuming_names_a_folder_that_is_not_a_run_directory(tmp_path, capsys):
    assert cli.main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a run directory" in capsys.readouterr().err


def test_a_run_directory_that_is_nearly_right_is_proposed(run, capsys):
    (run / "checkpoints").mkdir()
    for wrong in (run.parent, run / "checkpoints"):
        assert cli.main(["train", "--resume", str(wrong)]) == 2
        assert f"did you mean '{run}'?" in capsys.readouterr().err
    assert cli.main(["train", str(run)]) == 2
    assert f"dora-mm train --resume {shlex.quote(str(run))} goes on" in capsys.readouterr().err


# --- mistakes that are found before anything large is imported -------------------------------------------------------


WRONG = {  # by the command line: what the one sentence contains
    "train nosuch.yaml": "nosuch.yaml does not exist",
    "train --resume nosuch": "nosuch is not a run directory",
    "train CONFIG --set data.folder=nosuch": "data.folder: nosuch does not exist",
    "train CONFIG --set model.path=./nosuch": "model.path: ./nosuch does not exist",
    "train CONFIG --set adapter.init_from=nosuch": "adapter.init_from: nosuch does not exist",
    "train CONFIG --set output=FOLDER": "exists already: choose another folder",
    "train CONFIG --set output=FILE/run": "is inside a file",
    "train CONFIG --set output=LONG": "File name too long",
    "train CONFIG --set data.folder=LONG": "does not exist",
    "train CONFIG --set name=LONG": "name: must have at most 200 characters",
    "train LONG": "does not exist",
    "train --resume LONG": "LONG",  # too long, or no run directory: Python 3.14 does not tell
    'train CONFIG --set data.folder="a\\0b"': "data.folder: contains a NUL character: 'a\\x00b'",
    'train CONFIG --set output="a\\0b"': "output: contains a NUL character",
    'train CONFIG --set sample.prompts=["a\\0b"]': "sample.prompts: contains a NUL character",
    'train CONFIG --set sample.prompts=["\\ud800"]': "sample.prompts[0]",
    'train CONFIG --set data.folder="\\ud800"': "data.folder: must be text in Unicode",
    "train CONFIG --set data.folder=\udcff": "'data.folder=\\udcff' is not valid UTF-8",
    "train \udcff.yaml": "is not valid UTF-8",
    "train --resume \udcff": "is not valid UTF-8",
    "eval EVAL": "classifier: nosuch does not exist",
    "sample SAMPLE --set adapter.path=nosuch": "adapter.path: nosuch does not exist",
    "inspect nosuch.safetensors": "nosuch.safetensors does not exist",
    "sample SAMPLE --set adapter.path=RUNS": "adapter.path: RUNS is a folder of runs, not one of them, did you mean",
    "sample JOBS": "line 3: adapter: nosuch does not exist",
    "train CONFIG --set model.path=LORA": "model.path: LORA is an adapter (LoRA or DoRA), not a model: name the model",
    "train CONFIG --set model.path=RUNS/001": "RUNS/001 is an adapter (LoRA or DoRA), not a model",
    # of another family of image models
    "train CONFIG --set model.path=UNETS adapter.parts=[transformer.attn,transformer.text]": (
        "adapter.parts: the config has parts of Qwen-Image-2.1 or Krea 2 (transformer.attn, transformer.text), and "
        "model.path UNETS is "
        "SDXL (StableDiffusionXLPipeline), whose denoiser has unet.attn, unet.cross, unet.ff, unet.conv: start from a "
        "config in configs/sdxl"
    ),
    "train configs/z_image/style.yaml --set data.folder=FOLDER model.path=UNETS.safetensors": (
        "the config has parts of Z-Image (transformer.attn, transformer.ff), and model.path UNETS.safetensors is SDXL"
    ),
    "train CONFIG --set model.path=FLOW adapter.parts=[unet.attn] --dry-run": (
        "the config has parts of SDXL (unet.attn), and model.path FLOW is Z-Image (ZImagePipeline)"
    ),
    "ask LORA FILE what?": "MODEL: LORA is an adapter (LoRA or DoRA), not a model",
    "merge PIPE LORA out": "PIPE is a model of diffusers, and merge writes folders of transformers: dora-mm convert",
    "convert LORA out.safetensors --to a1111": (
        "there is no export format 'a1111': what it reads is written with --to diff"
    ),
    "convert nosuch out.safetensors --to kohya": "IN: nosuch does not exist",
    "convert RUNS out.safetensors --to kohya": "IN: RUNS is a folder of runs",
    "convert LORA out.safetensors --to kohya --base LORA": "--base: LORA is an adapter",
    "verify LORA --base nosuch": "--base: nosuch does not exist",
    "extract nosuch PIPE out --rank 4": "TUNED: nosuch does not exist",
}

SAMPLE = "pipeline: sample\nmodel: {path: some/model}\nprompts: [a bus]\n"
EVAL = "pipeline: eval_diffusion\nmodel: {path: some/model}\nclassifier: nosuch\nstyle: 3d\nprompt: '{thing}'\n"
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "PIL.Image")


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_in_the_command_line_gives_one_sentence(config, tmp_path, capsys, line):
    assert cli.main(words(line, config, tmp_path)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("dora-mm: ")
    assert filled(WRONG[line], config, tmp_path) in message


def words(line, config, tmp_path):
    return [filled(word, config, tmp_path) for word in line.split(" ")]


def filled(line, config, tmp_path):
    """A line with the paths of files, which are made."""
    run = tmp_path / "runs" / "001"
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    (run / "adapter").mkdir(exist_ok=True)
    (tmp_path / "pipe").mkdir(exist_ok=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for name, kind in {"unets": "StableDiffusionXLPipeline", "flow": "ZImagePipeline"}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    names = ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight")
    checkpoint = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (tmp_path / "unets.safetensors").write_bytes(len(checkpoint).to_bytes(8, "little") + checkpoint)
    (tmp_path / "jobs.csv").write_text("prompt,adapter\na,none\nb,nosuch\n")
    header = b'{"__metadata__":{"a":"b"},"unet.to_q.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "file").touch()
    (tmp_path / "sample.yaml").write_text(SAMPLE)
    (tmp_path / "eval.yaml").write_text(EVAL)
    files = {"CONFIG": config, "FOLDER": tmp_path, "FILE": tmp_path / "file", "LONG": "a" * 300}
    files |= {"SAMPLE": tmp_path / "sample.yaml", "EVAL": tmp_path / "eval.yaml", "RUNS": tmp_path / "runs"}
    files |= {"JOBS": tmp_path / "jobs.csv", "LORA": tmp_path / "lora.safetensors", "PIPE": tmp_path / "pipe"}
    files |= {"UNETS": tmp_path / "unets", "FLOW": tmp_path / "flow"}
    for name, path in files.items():
        line = line.replace(name, str(path))
    return line


def test_the_folder_of_runs_is_a_file(config, tmp_path, capsys, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path)
    pipeline()
    (tmp_path / "runs").touch()
    assert cli.main(["train", str(config)]) == 2
    assert "the run directory runs/mine is inside a file" in capsys.readouterr().err


def test_such_mistakes_are_found_before_anything_large_is_imported(config, tmp_path):
    lines = [words(line, config, tmp_path) for line in WRONG]
    code = (
        "import sys; from dora_mm.cli import main\n"
        f"codes = [main(line) for line in {lines!r}]\n"
        "assert set(codes) == {2}, codes\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
