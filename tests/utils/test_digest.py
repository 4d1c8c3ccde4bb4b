import os

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.data.seen import SeenFiles
from dora_mm.utils import digest
from dora_mm.utils.digest import file_digest, files_digest, module_digest, weights_digest
from dora_mm.utils.messages import ChangedFileError


def test_the_digest_changes_with_dtype_and_values():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
    before = module_digest(module)
    assert module_digest(module) == before
    assert module_digest(module.to(torch.bfloat16)) != before
    module.to(torch.float32)
    with torch.no_grad():
        module[1].bias[0] = 1e-30
    assert module_digest(module) != before


def test_the_digest_of_weights_does_not_depend_on_their_files(tmp_path):
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.arange(5), "c": torch.zeros(0, 2)}
    together, first, second = (tmp_path / f"{name}.safetensors" for name in ("together", "first", "second"))
    save_file(tensors, together, {"format": "pt"})
    save_file({"a": tensors["a"], "c": tensors["c"]}, second)
    save_file({"b": tensors["b"]}, first)
    assert weights_digest([together]) == weights_digest([first, second]) == weights_digest([second, first])
    save_file({"b": -tensors["b"]}, first)
    assert weights_digest([together]) != weights_digest([first, second])


def test_the_digest_of_a_large_file_is_remembered_by_its_place_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, read = tmp_path / "model.safetensors", []
    save_file({"a": torch.zeros(100)}, file)
    small = files_digest([file])
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(digest, "REMEMBERED", 100)
    compute = digest.file_digest
    monkeypatch.setattr(digest, "file_digest", lambda path: read.append(path) or compute(path))
    assert [files_digest([file]), files_digest([file]), len(read)] == [small, small, 1]
    assert weights_digest([file]) not in (small, compute(file))  # kept beside the other one
    (memory,) = [m for m in (tmp_path / "cache/dora_mm/digests").iterdir() if m.read_text() == compute(file)]
    memory.write_text("half a dig")
    assert [files_digest([file]), len(read)] == [small, 2]
    save_file({"a": torch.ones(100)}, file)
    assert [files_digest([file]) == small, len(read)] == [False, 3]
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made there
    assert [files_digest([file]) == small, len(read)] == [False, 4]


def edit_in_place(file):
    """Other bytes in the same file, whose size and time stay."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"1")
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of some file systems has steps of 10 ms
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def test_an_edit_in_place_whose_time_was_put_back_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "REMEMBERED", 100)
    file, seen = tmp_path / "model.safetensors", SeenFiles()
    save_file({"a": torch.zeros(100)}, file)
    before = files_digest([file]), weights_digest([file]), file_digest(file)
    seen.check(file)
    edit_in_place(file)
    after = files_digest([file]), weights_digest([file]), file_digest(file)
    assert [one == other for one, other in zip(before, after, strict=True)] == [False] * 3
    with pytest.raises(ChangedFileError):
        seen.check(file)
