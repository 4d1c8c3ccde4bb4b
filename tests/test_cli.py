import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import types

import pytest
import torch
from safetensors import SafetensorError

from dora_mm import cli
from dora_mm.config import dump_config, load_config

CONFIG = """\
pipeline: train_sdxl
model: {path: some/model}
adapter: {rank: 4}
data: {folder: pictures, resolution: 128}
optimizer: {lr: 1e-4}
train: {steps: 10, batch_size: 2}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def pipeline(monkeypatch):
    """Replaces a recipe by a stub, whose `.calls` lists the arguments of its calls."""

    def replace(action=lambda: None, name="train_sdxl"):
        module = types.ModuleType(f"dora_mm.pipelines.{name}")
        module.calls = []

        def main(config, *, resume=None):
            module.calls.append((config, resume))
            action()

        module.main = main
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return replace


def raising(error):
    def action():
        raise error

    return action


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from dora_mm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pydantic', 'yaml', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("train", "sample", "eval", "features", "gallery", "inspect"):
        assert command in done.stdout


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
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["sample", "eval", "features"])
def test_a_config_of_another_command_is_refused(config, pipeline, capsys, command):
    recipe = pipeline()
    assert cli.main([command, str(config)]) == 2
    assert f"needs another command: dora-mm train {config}" in capsys.readouterr().err
    assert recipe.calls == []


def test_train_needs_a_config_or_a_run(capsys):
    assert cli.main(["train"]) == 2
    assert "train needs a CONFIG before --set, or --resume RUN_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["sample"], ["train", "a.yaml", "--steps", "3"], ["features", "a", "--resume", "b"]]
)
def test_malformed_command_lines_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: dora-mm" in capsys.readouterr().err


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, config):
    folder = tmp_path / "runs" / "mine" / "001"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(config, ["seed=5"])))
    return folder


def test_a_resumed_run_takes_its_own_config(run, config, pipeline):
    recipe = pipeline()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert cli.main(["train", str(config), "--set", "seed=5", "--resume", str(run)]) == 0
    assert recipe.calls == [(load_config(config, ["seed=5"]), run)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CONFIG"], "different values of seed; leave CONFIG out"),
        (["CONFIG", "--set", "seed=5", "--set", "train.steps=11"], "different values of train.steps"),
        (["--set", "train.steps=11"], "--set cannot be used with --resume"),
    ],
)
def test_a_resumed_run_is_not_changed(run, config, pipeline, capsys, arguments, message):
    recipe = pipeline()
    arguments = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    assert cli.main(["train", *arguments, "--resume", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert recipe.calls == []


def test_resuming_names_a_folder_that_is_not_a_run_directory(tmp_path, capsys):
    assert cli.main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a run directory" in capsys.readouterr().err


# --- how a command ends ----------------------------------------------------------------------------------------------


def test_interruption_and_termination_have_separate_exit_codes(config, pipeline):
    saved = []

    def training():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            saved.append("state")
            raise

    before = signal.getsignal(signal.SIGTERM)
    pipeline(training)
    assert cli.main(["train", str(config)]) == 143
    assert saved == ["state"]
    assert signal.getsignal(signal.SIGTERM) is before
    pipeline(raising(KeyboardInterrupt()))
    assert cli.main(["train", str(config)]) == 130


def test_a_bug_keeps_its_traceback(config, pipeline):
    for error in (RuntimeError("shapes"), KeyError("x"), OSError(errno.EIO, "Input/output error")):
        pipeline(raising(error))
        with pytest.raises(type(error)):
            cli.main(["train", str(config)])


def test_value_errors_of_libraries_are_bugs_and_ours_are_messages(config, pipeline, capsys):
    pipeline(lambda: torch.utils.data.DataLoader([], batch_size=-1))
    with pytest.raises(ValueError, match="batch_size"):
        cli.main(["train", str(config)])
    from dora_mm.data.images.buckets import bucket_sizes

    pipeline(lambda: bucket_sizes(1000))
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err == "dora-mm: data.resolution 1000 must be a multiple of 64\n"


@contextlib.contextmanager
def full_disk():
    """Opens /dev/full, Linux's always full device, without being able to create or replace it."""
    with open(os.open("/dev/full", os.O_WRONLY), "wb") as file:
        assert stat.S_ISCHR(os.fstat(file.fileno()).st_mode)
        yield file


def write_plainly():
    with full_disk() as file:
        file.write(b"x")


def write_tensors():
    with full_disk() as file:
        torch.save(torch.zeros(10), file)


def write_adapter():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("write", [write_plainly, write_tensors, write_adapter])
def test_a_full_disk_gives_a_one_line_message(config, pipeline, capsys, write):
    pipeline(write)
    assert cli.main(["train", str(config)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dora-mm: the disk is full: free some space")
    assert len(printed.splitlines()) == 1


def test_a_path_without_permissions_is_named(config, pipeline, capsys):
    pipeline(raising(PermissionError(errno.EACCES, "Permission denied", "runs/mine")))
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err == "dora-mm: runs/mine cannot be written or read: Permission denied\n"


def test_a_missing_extra_is_named_and_a_missing_module_of_ours_is_a_bug(config, pipeline, capsys):
    pipeline(raising(ModuleNotFoundError("No module named 'timm'", name="timm")))
    assert cli.main(["train", str(config)]) == 2
    assert "the package timm is missing: pip install" in capsys.readouterr().err
    pipeline(raising(ModuleNotFoundError("No module named 'dora_mm.x'", name="dora_mm.x")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", str(config)])
