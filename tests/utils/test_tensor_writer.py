"""Files of safetensors are those of the library, and a kill leaves nothing that the next writer does not remove."""

import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from dora_mm.utils.atomic import write_text
from dora_mm.utils.lock import only_writer
from dora_mm.utils.tensor_writer import DTYPES, save_tensors, write_tensor_file


def test_files_are_those_of_the_library(tmp_path):
    tensors = {
        f"{place} {name}": torch.ones(3, 1).to(getattr(torch, name)) for place, name in enumerate(DTYPES.values())
    }
    tensors |= {"none": torch.ones(0, 4), "one": torch.tensor(2.5), "é": torch.arange(3), "a": torch.ones(1)}
    save_tensors(tmp_path / "file", tensors, {"a": "é"})
    assert (tmp_path / "file").read_bytes() == save(tensors, {"a": "é"})


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no such signal")
def test_what_is_killed_in_the_middle_of_a_file_leaves_nothing_when_it_is_repeated(tmp_path):
    import resource

    if not (child := os.fork()):
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends it while it writes the byte behind the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            save_tensors(tmp_path / "file", {"a": torch.zeros(100_000)}, {})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert list(tmp_path.iterdir())
    with only_writer(tmp_path):
        save_tensors(tmp_path / "file", {"a": torch.zeros(100_000)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dtype_that_is_not_written_is_refused_by_name(tmp_path):
    """It was a KeyError, for example where the weights of a whole model are copied."""
    with pytest.raises(ValueError, match=r"^a\.scale is of torch\.complex128, which is not written$"):
        save_tensors(tmp_path / "file", {"a.scale": torch.ones(1, dtype=torch.complex128)}, {})
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_conjugated_when_they_are_read(tmp_path):
    turned = torch.tensor([1 + 2j, 3 - 1j]).conj()
    save_tensors(tmp_path / "file", {"a": turned, "b": turned.imag}, {})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["a"], turned)
    assert torch.equal(found["b"], turned.imag)


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


def test_files_of_tensors_have_the_permissions_of_other_files(tmp_path):
    write_tensor_file(tmp_path / "tensors.safetensors", {"a": torch.ones(2)}, {})
    write_text(tmp_path / "text", "a")
    assert (tmp_path / "tensors.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode
