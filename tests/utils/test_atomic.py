"""Files appear complete or not at all."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dora_mm.utils.atomic import append_text, save_tensors, write_atomically, write_tensor_file, write_text
from dora_mm.utils.partials import partial_of


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


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    weight = torch.randn(4, 6)
    save_tensors(tmp_path / "a.safetensors", {"a": weight.T, "b": weight.T[:2], "c": weight}, {"key": "value"})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], weight.T)
    assert torch.equal(found["b"], weight.T[:2])


def test_tensor_files_get_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_same_tensors_and_entries_are_the_same_bytes_in_any_order(tmp_path):
    tensors = {"b": torch.zeros(3, dtype=torch.bfloat16), 'a "é\\\x01\x7f': torch.ones(2), "c": torch.arange(3)}
    header = {f"{letter} é": f'"\\\n\x01{letter}' for letter in "qwertzuiop"}
    for name in ("one", "other"):
        save_tensors(tmp_path / name, tensors, header)
        tensors, header = dict(reversed(tensors.items())), dict(reversed(header.items()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == header
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())


def test_a_file_that_has_this_content_already_keeps_its_time(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    os.utime(path, (5, 5))
    write_text(path, "old")
    assert path.stat().st_mtime == 5
    write_text(path, "new")
    assert (path.read_text(), path.stat().st_mtime == 5) == ("new", False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_link_leads_to_is_not_written_to(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("whole", "appended", partial_of(tmp_path / "whole").name):
        (tmp_path / name).symlink_to(target)
    write_text(tmp_path / "whole", "text")
    assert (tmp_path / "whole").read_text() == "text"
    with pytest.raises(OSError, match="symbolic links"):
        append_text(tmp_path / "appended", "text")
    assert target.read_text() == "precious"


def test_files_of_tensors_have_the_permissions_of_other_files(tmp_path):
    write_tensor_file(tmp_path / "tensors.safetensors", {"a": torch.ones(2)}, {})
    write_text(tmp_path / "text", "a")
    assert (tmp_path / "tensors.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode
