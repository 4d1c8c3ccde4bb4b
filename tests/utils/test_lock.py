"""One writer per folder, on one machine and on several that share a file system without locks."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_mm.utils import atomic, lock
from dora_mm.utils.atomic import write_atomically, write_text
from dora_mm.utils.lock import LOCK, FolderLock, check_lock, only_writer

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from pathlib import Path
from dora_mm.utils import lock
from dora_mm.utils.atomic import write_atomically, write_text
lock.HEARTBEAT = 0.05
folder = Path(sys.argv[1])
try:
    with lock.only_writer(folder):
        for number in range(100_000):
            write_text(folder / "written", str(number))
            time.sleep(0.01)
except ValueError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def writer(tmp_path):
    """A process that writes to a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "written").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def elsewhere(monkeypatch):
    """As if this process ran on another machine, which does not see the locks of this one."""
    monkeypatch.setattr(lock, "HOST", "elsewhere")
    monkeypatch.setattr(lock, "machine", lambda: "another")
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)


def refused(folder) -> str:
    with pytest.raises(ValueError, match="has a writer already") as error, only_writer(folder):
        pass
    return str(error.value)


def test_a_second_writer_is_told_who_the_first_one_is(writer, tmp_path):
    assert f"{tmp_path} has a writer already, process {writer.pid} on {socket.gethostname()} (since 2" in refused(
        tmp_path
    )


def test_the_lock_ends_with_its_process(writer, tmp_path):
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    (tmp_path / ".written.1a2b3c4d-17.partial").touch()
    with only_writer(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "written"]
        assert "has a writer already" in refused(tmp_path)  # also in the same process
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_a_process_that_was_stopped_writes_nothing_after_another_machine_has_taken_over(
    writer, tmp_path, elsewhere, caplog
):
    assert "last sign of life was 0 s ago" in refused(tmp_path)
    os.kill(writer.pid, signal.SIGSTOP)
    os.waitpid(writer.pid, os.WUNTRACED)  # until all of its threads have stopped
    old = (tmp_path / LOCK).stat().st_mtime - 50
    os.utime(tmp_path / LOCK, (old, old))
    assert re.search("last sign of life was 5[0-2] s ago", refused(tmp_path))
    old -= 11
    os.utime(tmp_path / LOCK, (old, old))
    with only_writer(tmp_path):
        (warning,) = (record.message for record in caplog.records)
        assert re.search(rf"Taking over .*: process {writer.pid} on .* has been silent for 6\d s", warning)
        write_text(tmp_path / "written", "mine")
        os.kill(writer.pid, signal.SIGCONT)
        message = writer.communicate(timeout=30)[1]
        assert writer.returncode == 1
        assert f"process {os.getpid()} on elsewhere" in message
        assert "has taken it over" in message
        assert (tmp_path / "written").read_text() == "mine"
        check_lock(tmp_path / "written")  # the other one has left it


@pytest.fixture
def no_locks(monkeypatch):
    """As on a file system without locks."""

    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("process", [os.getpid(), 2**30], ids=["a number of another", "a number of none"])
def test_without_locks_of_the_file_system_the_sign_of_life_counts(tmp_path, no_locks, monkeypatch, process):
    """The number of a process means another one in each container, or none."""
    with monkeypatch.context() as other:
        other.setattr("os.getpid", lambda: process)
        living = FolderLock(tmp_path)
    assert "After 60 s without one it counts as dead." in refused(tmp_path)
    living._released.set()  # it dies, and leaves the file
    old = (tmp_path / LOCK).stat().st_mtime - 61
    os.utime(tmp_path / LOCK, (old, old))
    with only_writer(tmp_path):
        check_lock(tmp_path / "written")


def test_a_lock_of_another_machine_with_the_same_name_is_not_taken_for_a_dead_one(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)  # the locks of the other one are not seen
    monkeypatch.setattr(lock, "machine", lambda: "another")
    assert f"process {writer.pid} on {socket.gethostname()}" in refused(tmp_path)


def test_signs_of_life_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with only_writer(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 10
        while not (tmp_path / LOCK).stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_a_write_elsewhere_does_not_depend_on_the_lock(tmp_path):
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        write_text(tmp_path / "other", "text")
        with pytest.raises(ValueError, match=r"its .lock is gone, .* writes nothing more"):
            write_text(tmp_path / "run" / "folder" / "file", "text")
    assert not (tmp_path / "run" / "folder").exists()


@pytest.mark.parametrize("name", ["file", "folder/file"])
def test_a_folder_that_is_removed_while_it_is_written_to_is_not_made_anew(tmp_path, monkeypatch, name):
    (tmp_path / "run").mkdir()

    def vanish(path):  # behind the first check of a write
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "run")

    with only_writer(tmp_path / "run"):
        monkeypatch.setattr(atomic, "check_lock", vanish)
        with pytest.raises(ValueError, match=r"its .lock is gone"):
            write_text(tmp_path / "run" / name, "text")
    assert not (tmp_path / "run").exists()


def test_who_is_stopped_while_it_writes_finds_its_file_gone(tmp_path, elsewhere, monkeypatch):
    def taken_over(partial):
        partial.unlink()
        (tmp_path / LOCK).write_text('{"host": "there", "machine": "0", "process": 7, "since": "now", "token": "1"}')

    with only_writer(tmp_path), pytest.raises(ValueError, match=r"process 7 on there .* has taken it over"):
        write_atomically(tmp_path / "file", taken_over)


@pytest.mark.parametrize("link", [os.symlink, os.link, lambda target, path: os.mkfifo(path)])
def test_a_lock_that_is_a_link_writes_to_no_other_file(tmp_path, link):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "run").mkdir()
    link(target, tmp_path / "run" / LOCK)
    with pytest.raises(ValueError, match=r"\.lock is a link to another file, or none of ours: remove it"):
        FolderLock(tmp_path / "run")
    assert target.read_text() == "precious"
    (tmp_path / "run" / LOCK).unlink()
    os.symlink(tmp_path / "missing", tmp_path / "run" / LOCK)
    with pytest.raises(ValueError, match="is a link"), only_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "missing").exists()


def test_a_folder_behind_a_link_is_protected_like_others(tmp_path):
    """Galleries are written under the real path of a run, and macOS has /tmp behind a link."""
    (tmp_path / "real" / "run").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "runs")
    with only_writer(tmp_path / "runs" / "run"):
        shutil.rmtree(tmp_path / "real" / "run")
        for root in ("runs", "real"):
            with pytest.raises(ValueError, match=r"its \.lock is gone"):
                write_text(tmp_path / root / "run" / "folder" / "file", "text")
    assert list((tmp_path / "real").iterdir()) == []
