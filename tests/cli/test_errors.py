import contextlib
import errno
import os
import resource
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dora_mm import cli
from dora_mm.cli import user_message
from dora_mm.utils.messages import ChangedFileError

ADAPTER = Path(__file__).parents[1] / "formats" / "fixtures" / "lycoris_out.safetensors"


def raising(error):
    def action():
        raise error

    return action


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


def exceed_quota():
    raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("write", [write_plainly, write_tensors, write_adapter, exceed_quota])
def test_a_full_disk_gives_a_one_line_message(config, pipeline, capsys, write):
    pipeline(write)
    assert cli.main(["train", str(config)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dora-mm: the disk is full: free some space")
    assert len(printed.splitlines()) == 1


def make_folder():
    Path("/proc/dora_mm/run").mkdir(parents=True)


def write_too_much():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_too_many_tensors():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_file({"a": torch.zeros(10_000)}, Path(folder, "a.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


REFUSED = {
    "a safetensors file that is too large": (
        write_too_many_tensors,
        "a file cannot be written or read: File too large",
    ),
    "a folder that cannot be made": (make_folder, "/proc/dora_mm cannot be written or read: No such file or directory"),
    "a file that is too large": (write_too_much, "a file cannot be written or read: File too large"),
    "no permission": (
        raising(PermissionError(errno.EACCES, "Permission denied", "runs/mine")),
        "runs/mine cannot be written or read: Permission denied",
    ),
    "a broken disk": (
        raising(OSError(errno.EIO, "Input/output error", "runs/mine")),
        "runs/mine cannot be written or read: Input/output error",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_named(config, pipeline, capsys, case):
    write, message = REFUSED[case]
    pipeline(write)
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err == f"dora-mm: {message}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_convert_to_a_folder_that_cannot_be_made(capsys):
    assert cli.main(["convert", str(ADAPTER), "/proc/dora_mm/style.safetensors", "--to", "kohya"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "dora-mm: /proc/dora_mm cannot be written or read: No such file or directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_convert_to_a_folder_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert cli.main(["convert", str(ADAPTER), str(tmp_path / "style.safetensors"), "--to", "kohya"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
    assert line.endswith("cannot be written or read: Permission denied")


def test_a_missing_extra_is_named_and_a_missing_module_of_ours_is_a_bug(config, pipeline, capsys):
    pipeline(raising(ModuleNotFoundError("No module named 'timm'", name="timm")))
    assert cli.main(["train", str(config)]) == 2
    assert "the package timm is missing: pip install" in capsys.readouterr().err
    pipeline(raising(ModuleNotFoundError("No module named 'dora_mm.x'", name="dora_mm.x")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", str(config)])


def test_what_a_terminal_would_obey_and_endless_names_are_shown_as_text(tmp_path, capsys):
    path = tmp_path / "\x1b[31m\nx.safetensors"
    assert cli.main(["verify", str(path), "--base", "samples/tiny-sdxl"]) == 2
    assert r"\x1b[31m\nx.safetensors" in capsys.readouterr().err
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    for text in ('{"peft_type": "LORA", "%s": 1, "%s": 1}' % (2 * ("x" * 2**20,)), '{"peft_type": "\x1b[2J"'):
        (folder / "adapter_config.json").write_text(text)
        assert cli.main(["convert", str(folder), str(tmp_path / "new"), "--to", "kohya"]) == 2
        printed = capsys.readouterr().err
        assert "\x1b" not in printed
        assert (len(printed.splitlines()), len(printed) < 3000) == (1, True)


def test_a_report_is_a_screen_of_lines_and_a_count():
    """An adapter with 30,000 unknown names would be 5.6 MB."""
    names = [f"a.{number}.lora_A.weight" for number in range(30_000)]
    message = user_message(ChangedFileError("\n  ".join(["a.safetensors: unknown", *names])))
    assert message is not None
    assert len(message) < 4000
    assert message.endswith("and 29,941 more lines")
