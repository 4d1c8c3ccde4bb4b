"""Folders appear complete or not at all."""

import pytest

from dora_mm.utils.folders import claim_number, written_at_once


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

    with pytest.raises(OSError, match="folder"):
        write()
    assert (final / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_numbers_go_on(tmp_path):
    assert claim_number(tmp_path / "runs").name == "001"
    (tmp_path / "runs" / "007").mkdir()
    assert claim_number(tmp_path / "runs").name == "008"
