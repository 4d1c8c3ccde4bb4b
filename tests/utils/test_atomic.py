"""Files appear complete or not at all."""

import pytest
import torch
from safetensors.torch import load_file

from dora_mm.utils.atomic import save_tensors, write_atomically


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
