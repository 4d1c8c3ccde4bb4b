import subprocess
import sys
from unittest.mock import create_autospec

import pytest

from dora_mm import cli
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import all_keys
from dora_mm.formats.tools import export_of
from dora_mm.recipes import PIPELINES
from dora_mm.registries.other_trainers import KEYS
from dora_mm.registries.tools import EXPORT_FORMATS, TOOLS, other_tools
from dora_mm.registries.vl_tasks import TASKS

COMMANDS = {  # with the recipes of those that take no config
    "train": None,
    "sample": None,
    "grid": None,
    "eval": None,
    "features": None,
    "example": "example",
    "new": "new",
    "configs": "configs",
    "check": "check",
    "gallery": "gallery",
    "inspect": "inspect_model",
    "merge": "merge",
    "convert": "convert",
    "verify": "verify",
    "extract": "extract",
    "average": "average",
    "ask": "ask",
    "caption": "caption",
    "unpack": "unpack",
    "import": "import_config",
    "schema": "schema",
}


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from dora_mm.cli import main\n"
        f"for command in ('', *{list(COMMANDS)}):\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pydantic', 'yaml', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: dora-mm {command} " in done.stdout


@pytest.mark.parametrize("command", ["merge", "ask", "caption"])
def test_help_has_the_default_of_dtype(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "of the weights; default: that of the" in " ".join(capsys.readouterr().out.split())


def test_help_of_score_has_the_formats_of_each_suite(capsys):
    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    printed = capsys.readouterr().out
    assert all(f"({', '.join(TASKS[name].formats)})" in printed for name in ("docvqa", "vqa", "refcoco"))


@pytest.mark.parametrize(("command", "names"), [("convert", EXPORT_FORMATS), ("verify", other_tools())])
def test_help_lists_all_targets_and_tools(command, names, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    _, _, listed = capsys.readouterr().out.rpartition(":\n")
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(names)


@pytest.mark.parametrize(
    "line",
    [
        "example OUT",
        "check --report --config FILE",
        "new sdxl NAME --images FOLDER --data FILE --model MODEL",
        "gallery RUN --output OUT",
        "inspect FILE --targets NAME --base some/model --json",
        "merge some/model FILE OUT --dtype float32 --revision main",
        "convert FILE OUT --to peft --base some/model --axis in --strength 2 --rank 3 --energy 0.5 --allow-lossy",
        "verify FILE --tool peft --base some/model --axis out --json",
        "extract some/tuned some/base OUT --rank 4 --to peft",
        "average RUN --last 3",
        "ask some/model FILE FILE question --adapter FILE --max-new-tokens 5",
        "ask some/model question --then more --then still --system text",
        "caption FILE --model some/model --prompt text --max-new-tokens 5 --batch-size 2 --revision main",
    ],
)
def test_arguments_have_the_names_of_the_recipe_s_parameters(line, tmp_path, monkeypatch):
    for name in ("FILE", "RUN"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    command, *_ = words = line.split()
    recipe = PIPELINES.load(COMMANDS[command])
    main = create_autospec(recipe.main)
    monkeypatch.setattr(recipe, "main", main)
    assert cli.main(words) == 0
    main.assert_called_once()


def test_the_version():
    import dora_mm

    done = subprocess.run([sys.executable, "-m", "dora_mm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dora_mm {dora_mm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train a.yaml train.steps=20 seed=1", "values of a config follow --set: --set train.steps=20 seed=1"),
        ("train a.yaml --max_train_steps=20", "error: --max_train_steps is --set train.steps=20 here\n"),
        ("train --network-dim 4 a.yaml", "error: --network-dim is --set adapter.rank=4 here\n"),
        (
            "train a.yaml --mixed_precision bf16 --masked_loss --optimizer_type AdamW8bit",
            "error: --mixed_precision and --masked_loss and --optimizer_type are --set model.dtype=bfloat16 "
            "train.mixed_precision=bf16 'data.mask={}' optimizer.name=adamw_8bit here\n",
        ),
        ("train a.yaml --dryrun", "error: there is no --dryrun, did you mean '--dry-run'?\n"),
        (
            "train a.yaml --conditioning_data_dir masks",
            "--conditioning_data_dir is --set data.mask.folder=masks here with masked_loss (masks), and data.refer",
        ),
        (
            "train a.yaml --conditioning_data_dir masks --masked_loss",
            "are --set data.mask.folder=masks 'data.mask={}' here\n",
        ),
        ("train a.yaml --control_directory before", "is --set 'data.references=[before]' here\n"),
        ("train a.yaml --train.steps=5 --seed 3", "values of a config follow --set: --set train.steps=5"),
        ("train a.yaml --train.steps 5", "values of a config follow --set: --set train.steps=5"),
        ("train a.yaml --lora_rank 8", "error: --lora_rank is --set adapter.rank=8 here\n"),
        ("train a.yaml --num_train_epochs 3", "error: --num_train_epochs is --set train.epochs=3 here\n"),
        ("train a.yaml --cutoff_len 2048", "error: --cutoff_len is --set model.max_length=2048 here\n"),
        ("train a.yaml --num_processes 2", "error: --num_processes: torchrun --nproc-per-node N -m dora_mm COMMAND"),
        (
            "serve",
            "error: there is no command 'serve': dora-mm merge MODEL ADAPTER OUT writes a folder, and vllm serve",
        ),
        ("trian a.yaml", "error: there is no command 'trian', did you mean 'train'?\n"),
        ("zzz", "error: there is no command 'zzz'; there are train, sample, grid,"),
        ("train a.yaml --unheard-of", "unrecognized arguments: --unheard-of"),
        ("", "generate images for the prompts of a job"),
    ],
)
def test_what_is_meant_by_an_argument_of_another_form_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_other_trainers_are_keys_of_the_training():
    keys = {*all_keys(SCHEMAS["train_diffusion"]), *all_keys(SCHEMAS["train_vl"])}
    assert set(KEYS.values()) <= keys


def test_targets_for_programs_are_those_that_they_read():
    named = {name: record.export_format for name, record in TOOLS.items() if record.export_format}
    assert all(name in export_of(target).read_by for name, target in named.items() if EXPORT_FORMATS[target].export)


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["eval"], ["train", "a.yaml", "--steps", "3"], ["features", "a", "--resume", "b"]]
)
def test_malformed_command_lines_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: dora-mm" in capsys.readouterr().err
