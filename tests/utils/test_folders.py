"""Folders appear complete or not at all."""

import os
import shutil

import pytest

from dora_mm.utils.atomic import reserve, write_atomically, write_text
from dora_mm.utils.folders import new_folder, written_at_once, written_together


def test_a_folder_appears_at_the_end(tmp_path):
    final = tmp_path / "new" / "folder"
    with written_at_once(final) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
        (partial / "private").touch(mode=0o600)
        assert not final.exists()
    assert (final / "inner" / "file").read_text() == "content"
    (tmp_path / "plain").touch()
    assert (final / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in final.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(tmp_path, error):
    def write() -> None:
        with written_at_once(tmp_path / "folder") as partial:
            (partial / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_by_now_is_kept(tmp_path):
    final = tmp_path / "folder"

    def write() -> None:
        with written_at_once(final) as partial:
            (partial / "file").write_text("new")
            final.mkdir()
            (final / "file").write_text("old")

    with pytest.raises(ValueError, match="folder exists already"):
        write()
    assert (final / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_numbers_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch = lambda folder: (folder / "file").touch()  # noqa: E731
    assert new_folder("a", fill=touch).name == "001"
    (tmp_path / "runs" / "a" / "007").mkdir()
    (tmp_path / "runs" / "a" / "007" / "file").touch()
    assert new_folder("a", fill=touch).name == "008"


def test_two_that_start_together_get_different_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def claim_late(partial, path):
        if path.name == "001":
            path.mkdir()
            (path / "theirs").touch()
        reserve(partial, path)

    monkeypatch.setattr("dora_mm.utils.folders.reserve", claim_late)
    assert new_folder("a", fill=lambda folder: (folder / "ours").touch()).name == "002"


def test_a_named_folder_is_there_with_its_content_or_not_at_all(tmp_path):
    def stop(folder):
        (folder / "file").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_folder("a", str(tmp_path / "X"), stop)
    assert list(tmp_path.iterdir()) == []
    new_folder("a", str(tmp_path / "X"), lambda folder: (folder / "file").touch())
    with pytest.raises(ValueError, match="output .*X exists already"):
        new_folder("a", str(tmp_path / "X"))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_none(tmp_path, monkeypatch, has_links):
    def no_links(one, other):
        raise OSError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "file"
    for _ in range(2):  # the same content is no obstacle
        write_atomically(file, lambda partial: partial.write_text("one"), is_new=True)
    with pytest.raises(ValueError, match="file exists already"):
        write_atomically(file, lambda partial: partial.write_text("two"), is_new=True)
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_files_of_a_folder_that_exists(tmp_path):
    """A kill between two is repeated; a file of a person's is an error, and then none is written."""
    (tmp_path / "other").touch()
    (tmp_path / "b").write_text("b")

    def write(b):
        with written_together(tmp_path, last="a") as partial:
            (partial / "a").write_text("a")
            (partial / "b").write_text(b)

    with pytest.raises(ValueError, match="b exists already"):
        write("c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "other"]
    write("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "other"]


def test_a_folder_that_is_removed_while_it_is_filled_is_not_there_with_a_part_of_its_files(tmp_path):
    def fill(folder):
        (folder / "first").touch()
        shutil.rmtree(tmp_path / "out")
        write_text(folder / "second", "made with its parents")

    with pytest.raises(ValueError, match="out was removed while files were written to it"):
        new_folder("", str(tmp_path / "out" / "new"), fill)
    assert not list((tmp_path / "out").iterdir())


def test_an_empty_folder_keeps_its_permissions(tmp_path):
    """It was replaced by a new one, which everybody may read."""
    folder = tmp_path / "private"
    folder.mkdir(0o700)
    with written_together(folder, "a") as partial:
        (partial / "a").write_text("x")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["a"]
