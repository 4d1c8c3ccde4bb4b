"""What a run has read is compared when it is read again, by content alone."""

import os

import pytest

from dora_mm.data import seen
from dora_mm.data.seen import SeenFiles, content_name, read_as
from dora_mm.train.state_file import read_state, write_state
from dora_mm.utils.messages import ChangedFileError


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    return path


def resumed(files: SeenFiles, file) -> SeenFiles:
    """As a process that goes on from a checkpoint."""
    write_state(file.with_name("state.safetensors"), {"files": files.state_dict()})
    found = SeenFiles()
    found.load_state_dict(read_state(file.with_name("state.safetensors"))["files"])
    return found


def test_a_changed_file_is_named_also_after_a_resume(file):
    files = SeenFiles()
    assert files.read(file) == files.read(file) == b"one"
    os.utime(file, (5, 5))
    again = resumed(files, file)
    assert again.read(file) == b"one"
    state = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # of the same size and time
    for found in (files, again, resumed(again, file)):
        with pytest.raises(ChangedFileError, match=r"a\.png is not as it was when this run read it first: restore it"):
            found.read(file)
    assert not issubclass(ChangedFileError, ValueError)  # for which rows may be left out


def test_data_that_are_moved_with_the_run_are_the_same(file, tmp_path, monkeypatch):
    files = SeenFiles()
    files.read(file)
    for folder, content in (("moved", b"one"), ("changed", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(content)
    monkeypatch.chdir(tmp_path / "moved")
    assert resumed(files, file).read(tmp_path / "moved" / "a.png") == b"one"
    monkeypatch.chdir(tmp_path / "changed")
    with pytest.raises(ChangedFileError):
        resumed(files, file).read(tmp_path / "changed" / "a.png")


def test_what_was_read_before_a_checkpoint_was_loaded_is_compared_with_it(file):
    files, later = SeenFiles(), SeenFiles()
    files.read(file)
    file.write_bytes(b"two")
    later.read(file)
    with pytest.raises(ChangedFileError, match="a file of the data is not as it was"):
        later.load_state_dict(files.state_dict())


def test_many_files_take_24_bytes_each(file, monkeypatch):
    monkeypatch.setattr(seen, "MOST_NEW", 7)
    files, digests = SeenFiles(), {file.with_name(f"{n}.png"): bytes([n]) * 32 for n in range(100)}
    for path, digest in digests.items():
        files.compare(path, digest)
    assert len(files) == 100
    assert sum(tensor.nbytes for tensor in files.state_dict().values()) == 2400
    again = resumed(files, file)
    for path, digest in digests.items():
        again.compare(path, digest)
        again.compare(path, b"x" * 32, "features")  # something else
        with pytest.raises(ChangedFileError, match=f"{path}, features, is not"):
            again.compare(path, digest, "features")


def test_processes_tell_each_other_what_they_have_read(file):
    one, other = SeenFiles(), SeenFiles()
    one.read(file)
    other.add(one.unshared())
    assert one.unshared() == other.unshared() == {}
    file.write_bytes(b"two")
    with pytest.raises(ChangedFileError):
        other.read(file)


def test_a_large_file_is_hashed_once_for_each_of_its_states(file, monkeypatch):
    files, hashed, compute = SeenFiles(), [], seen.file_digest
    monkeypatch.setattr(seen, "file_digest", lambda path: hashed.append(path) or compute(path))
    for _ in range(3):
        files.check(file)
    os.utime(file, (5, 5))
    files.check(file)
    assert len(hashed) == 2
    file.write_bytes(b"two")
    with pytest.raises(ChangedFileError):
        files.check(file)


def test_a_copy_of_an_embedded_image_says_itself_what_it_is(file):
    copy = file.with_name(content_name(b"one", "png"))
    copy.write_bytes(b"one")
    assert SeenFiles().read(copy) == b"one"
    copy.write_bytes(b"two")
    with pytest.raises(ChangedFileError, match=f"{copy.name}, a copy of an embedded image, is damaged: delete it"):
        SeenFiles().read(copy)


def test_a_file_that_has_to_have_a_digest(file):
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert read_as(file, digest) == b"one"
    file.write_bytes(b"two")
    with pytest.raises(ChangedFileError, match=str(file)):
        read_as(file, digest)
