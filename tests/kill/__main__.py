"""Kills commands that write, at each file event in turn, and repeats them: python -m tests.kill --each 100.

After the repetition the files are those of a command that was not killed, and nothing else is left.
"""

import os

os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # before they are loaded
os.environ |= {"HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

import argparse
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import dora_mm.formats.commands.extract
import dora_mm.models.images.families  # noqa: F401  imported once, by the parent
from dora_mm.cli import main as dora_mm_main
from dora_mm.utils.run_directory import RunDirectory

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
EVENTS = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
UNEQUAL = (".svg", ".png")  # of matplotlib, with a date in them


def prepare() -> None:
    """What the commands read, in the current directory."""
    Path("pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 90, 160)).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text(f"a sks drawing of thing {number}")
    shutil.copy(FIXTURES / "lycoris_out.safetensors", "adapter.safetensors")
    weights = {f"{ATTENTION}.to_{name}.weight": torch.eye(8) * (1 + place) for place, name in enumerate("qkv")}
    save_file(weights, "base.safetensors", {"format": "pt"})
    save_file({name: W + 0.1 * torch.outer(W[0], W[1] + 1) for name, W in weights.items()}, "tuned.safetensors")
    Path("here").mkdir()
    Path("here/other.txt").write_text("of a person's")


def command(*arguments: str) -> Callable[[], object]:
    def run() -> None:
        code = dora_mm_main(list(arguments))
        assert code == 0, f"exit code {code}"

    return run


COMMANDS: dict[str, Callable[[], object]] = {
    "new": command("new", "sdxl", "style", "--images", "pictures"),
    "convert to a file": command("convert", "adapter.safetensors", "out/a.safetensors", "--to", "kohya"),
    "convert beside others": command("convert", "adapter.safetensors", "here/a.safetensors", "--to", "kohya"),
    "convert to a folder": command("convert", "adapter.safetensors", "here", "--to", "diffusers"),
    "extract": command("extract", "tuned.safetensors", "base.safetensors", "out/e.safetensors", "--rank", "2"),
    "analyse": command("analyse", "tuned.safetensors", "--base", "base.safetensors", "--output", "analysis"),
    "a run": lambda: RunDirectory.create("a", "seed: 1\n", "run/X", {"data": "0" * 64}),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--each", type=int, default=100, help="the most kills of each command")
    parser.add_argument("--commands", nargs="*", help="only these")
    given = parser.parse_args()
    bad, total = [], 0
    with tempfile.TemporaryDirectory(prefix="kill") as name:
        root = Path(name)
        prepared = root / "prepared"
        prepared.mkdir()
        assert in_child(prepare, prepared) == 0
        for what, run in COMMANDS.items():
            if what in (given.commands or COMMANDS):
                found, kills = killed(what, run, prepared, root, given.each)
                print(f"{what}: {kills} kills, {len(found)} of them with other files", flush=True)
                bad, total = bad + found, total + kills
    print("\n".join([*bad, f"{total} kills, {len(bad)} of them with other files"]))
    return 1 if bad else 0


def killed(what: str, run: Callable[[], object], prepared: Path, root: Path, most: int) -> tuple[list[str], int]:
    """Kills a command at each event in turn; returns what was wrong, and the number of kills."""
    bad: list[str] = []
    whole = fresh(prepared, root / "whole")
    assert in_child(run, whole) == 0, f"{what} fails"
    expected = files_of(whole)
    for event in range(most):
        folder = fresh(prepared, root / "killed")
        if in_child(run, folder, event) != -signal.SIGKILL:
            return bad, event
        code = in_child(run, folder)
        left = files_of(folder)
        if code == 2 and expected == left:
            continue  # it had ended but for its last event
        if code or left != expected:
            names = sorted(name for name in {*left, *expected} if left.get(name) != expected.get(name))
            bad.append(
                f"{what}, killed at event {event}: exit code {code}, other files: {', '.join(names[:5]) or 'none'}"
            )
    return bad, most


def fresh(prepared: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files and folders with their contents, hidden ones among them."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() or path.suffix in UNEQUAL else path.read_bytes()
        for path in paths
        if path.name != "versions.json"
    }


def in_child(run: Callable[[], object], folder: Path, kill_at: int | None = None) -> int:
    """Runs a function in a folder, and kills it at a file event there; returns its exit code, or minus the signal."""
    assert len(os.listdir("/proc/self/task")) == 1, "a second thread would be missing in the child"
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(folder)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            if kill_at is not None:
                kill_at_event(str(folder.resolve()), kill_at)
            run()
            code = 0
        except (AssertionError, ValueError) as error:
            code = 2 if isinstance(error, ValueError) or str(error) == "exit code 2" else 1
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill_at_event(folder: str, number: int) -> None:
    """Kills this process before the event of this number, from 0, that changes something in a folder."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in EVENTS) and os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    sys.exit(main())
