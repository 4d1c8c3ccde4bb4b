"""Files appear complete or not at all."""

import os

import pytest

from dora_mm.utils import partials
from dora_mm.utils.atomic import append_text, write_atomically, write_text


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def full_disk(partial):
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_file_that_has_this_content_already_keeps_its_time(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    os.utime(path, (5, 5))
    write_text(path, "old")
    assert path.stat().st_mtime == 5
    write_text(path, "new")
    assert (path.read_text(), path.stat().st_mtime == 5) == ("new", False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_link_leads_to_is_not_written_to(tmp_path, monkeypatch):
    names = iter(["taken", "free"])
    monkeypatch.setattr(partials.secrets, "token_hex", lambda size: next(names))
    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("whole", "appended", f".whole.{partials.machine()}-taken.partial"):
        (tmp_path / name).symlink_to(target)
    write_text(tmp_path / "whole", "text")
    assert (tmp_path / "whole").read_text() == "text"
    with pytest.raises(OSError, match="symbolic links"):
        append_text(tmp_path / "appended", "text")
    assert target.read_text() == "precious"
