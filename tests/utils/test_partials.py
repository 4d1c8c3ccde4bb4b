"""A half-written file belongs to a process while that lives, in any container, and is removed after its death."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_mm.utils import partials
from dora_mm.utils.atomic import write_text
from dora_mm.utils.partials import ABANDONED, partial_of, remove_dead

ROOT = Path(__file__).parents[2]
# Writes half of a file and of a folder, as a process whose number means here what the second argument says
WRITER = """
import os, signal, sys
from pathlib import Path
from dora_mm.utils import partials
os.getpid = lambda: int(sys.argv[2])
folder = Path(sys.argv[1])
with partials.partial_of(folder / "file") as file, partials.partial_of(folder / "folder", is_folder=True) as inside:
    file.write_text("half")
    (inside / "first").write_text("half")
    (folder / "begun").touch()
    signal.pause()
"""
NEW_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
NO_CONTAINERS = "needs the right to make namespaces"


def half_written(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in folder.glob(".*.partial"))


@pytest.fixture
def write_half(tmp_path):
    """A function that starts a process which writes half of a file and of a folder."""
    started = []

    def start(number: int, *before: str) -> subprocess.Popen:
        started.append(subprocess.Popen([*before, sys.executable, "-c", WRITER, str(tmp_path), str(number)], cwd=ROOT))
        while not (tmp_path / "begun").exists():
            assert started[-1].poll() is None
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def write_next_to(folder: Path) -> None:
    """Writes a file, as a process does that has written none there yet."""
    remove_dead.cache_clear()
    write_text(folder / "other", "text")


def test_what_another_container_writes_is_left_alone(tmp_path, write_half):
    process = write_half(2**30)  # no process here has that number
    write_next_to(tmp_path)
    assert half_written(tmp_path) == ["file", "folder"]
    process.kill()
    process.wait()
    write_next_to(tmp_path)
    assert half_written(tmp_path) == []


def test_what_a_dead_process_has_left_goes_although_its_number_is_given_again(tmp_path, write_half):
    process = write_half(os.getpid())
    process.send_signal(signal.SIGKILL)
    process.wait()
    write_next_to(tmp_path)
    assert half_written(tmp_path) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason=NO_CONTAINERS)
def test_two_namespaces_of_processes(tmp_path, write_half):
    if subprocess.run([*NEW_CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip(NO_CONTAINERS)
    write_half(3, *NEW_CONTAINER)
    program = "import sys\nfrom pathlib import Path\nfrom tests.utils.test_partials import write_next_to\n"
    code = f"{program}write_next_to(Path(sys.argv[1]))"
    subprocess.run([*NEW_CONTAINER, sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert half_written(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("has_locks", [True, False], ids=["of another machine", "without locks"])
def test_what_no_lock_tells_goes_by_its_age(tmp_path, monkeypatch, has_locks):
    def refuse(descriptor, how):
        raise OSError(37, "No locks available")

    def leave(name: str, age: float) -> None:
        folder = partials._new(tmp_path / name, is_folder=True, owner="another")
        (folder / "file").touch()
        for path in (folder / "file", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)

    for name, age in (("old", ABANDONED + 100), ("new", ABANDONED - 100)):
        leave(name, age)
    leave("written", ABANDONED + 100)
    os.utime(next(tmp_path.glob(".written.*/file")))  # a part of it was written just now
    if not has_locks:
        monkeypatch.setattr(partials.fcntl, "flock", refuse)
    write_next_to(tmp_path)
    assert half_written(tmp_path) == ["new", "written"]


def test_a_partial_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made, new = [], partials._new

    def removed_at_once(*about):
        made.append(new(*about))
        if len(made) == 1:
            remove_dead.cache_clear()
            remove_dead(tmp_path)  # by another process, which sees no lock yet
        return made[-1]

    monkeypatch.setattr(partials, "_new", removed_at_once)
    with partial_of(tmp_path / "folder", is_folder=True) as partial:
        assert [path.is_dir() for path in made] == [False, True]
        assert partial == made[1]
    assert list(tmp_path.iterdir()) == []


def test_where_a_locked_file_cannot_be_written_to_it_goes_by_its_age(tmp_path, monkeypatch):
    """On SMB nobody writes to a locked file but through the descriptor that locks it."""
    monkeypatch.setattr(partials, "_shuts_out", lambda partial: True)
    with partial_of(tmp_path / "file") as partial:
        remove_dead.cache_clear()
        remove_dead(tmp_path)
        assert list(tmp_path.iterdir()) == [partial]
        os.utime(partial, (partial.stat().st_mtime - ABANDONED - 100,) * 2)
        remove_dead.cache_clear()
        remove_dead(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_what_a_link_leads_to_stays(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / f".link.{partials.machine()}-1.partial").symlink_to(tmp_path / "precious")
    write_next_to(tmp_path)
    assert (tmp_path / "precious").is_dir()
