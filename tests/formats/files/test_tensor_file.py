"""Files that are read tensor by tensor, against the safetensors library; damaged ones give one sentence."""

import json
import math
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.utils.json_text import read_json

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), max_size=5))
def test_it_reads_what_the_library_writes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    written = {f"t{i}": (torch.rand(shape) * 3).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
    safetensors.torch.save_file(written, path, metadata={"a": "ü"})
    file = TensorFile(path)
    assert file.metadata == {"a": "ü"}
    assert file.entries.keys() == written.keys()
    for key, tensor in written.items():
        read = file.read(key)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


def test_rows(tmp_path):
    tensor = torch.randn(6, 2, 3, dtype=torch.float16)
    safetensors.torch.save_file({"x": torch.zeros(5), "y": tensor}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.read_entry(file.entries["y"].rows(1, 4)).equal(tensor[1:4])


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{" * 100_000, "not valid JSON"),
        (b"[" * 1_000_000, "its header is not a JSON object"),
        (b'{"x": ' + b"9" * 10_000 + b"}", "does not describe x"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},}', "not valid JSON"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} {}', "something follows it"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"0" * 2000 + b"8]}}", "does not describe x"),
        (b"\xff\xfe", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        ([], "its header is not a JSON object"),
        ({"__metadata__": {"a": 1}}, "not a table of texts"),
        ({"__metadata__": {"a": "\ud800"}}, "not valid JSON"),
        ({"x": 1}, "does not describe x"),
        ({"x": entry(dtype="F13")}, "x has the unknown dtype F13"),
        ({"x": entry(dtype=["F32"])}, "unknown dtype"),
        ({"x": entry(shape=(-2,))}, "does not describe x"),
        ({"x": entry(shape=(True,))}, "does not describe x"),
        ({"x": entry(shape=(2.0,))}, "does not describe x"),
        ({"x": entry(shape=(2**64,))}, "does not describe x"),
        ({"x": entry(shape=(1,) * 1000)}, "does not describe x"),
        ({"x": entry(shape=(2**62, 2**62))}, "does not fit its shape"),
        ({"x": entry(offsets=(0, 4))}, "does not fit its shape"),
        ({"x": entry(offsets=(4, 12))}, "does not fit its shape"),
        ({"x": entry(), "y": entry()}, "does not fit its shape"),
        ({"x": {"dtype": "F32"}}, "does not describe x"),
        ({}, r"has 18 bytes, and its header describes 10"),
        ({"x": entry(shape=(8,), offsets=(0, 32))}, "its header describes"),
        ({"y" * 900: entry(dtype="F13")}, "unknown dtype F13"),
        ({"y" * 100_000: entry()}, r"no module has the name of its tensor y{200} ... \(100000 characters\)"),
        ({"a\x1b[2J\nb": entry()}, r"no module has the name of its tensor a\\x1b\[2J\\nb"),
        ({"a\u202eb": entry()}, r"no module has the name of its tensor a\\u202eb"),
        (b'{"x": %(x)s, "x": %(x)s}' % {b"x": json.dumps(entry()).encode()}, "its header has x twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "its header has a twice"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    path = write(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=rf"^{path} cannot be read as a safetensors file: .*{message}") as raised:
        TensorFile(path)
    assert len(str(raised.value)) < 600


def test_lengths_that_are_not_there(tmp_path):
    for length in (2**63, 2**64 - 1, 100):
        with pytest.raises(ValueError, match="shorter than its header says"):
            TensorFile(write(tmp_path / "x.safetensors", {}, bytes(8), length))
    for content in (b"", b"1234567"):
        (tmp_path / "y.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="shorter than its header says"):
            TensorFile(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="No such file"):
        TensorFile(tmp_path / "none.safetensors")
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    with pytest.raises(ValueError, match="its header has 8589934592 bytes, and at most"):
        TensorFile(tmp_path / "sparse.safetensors")


def test_named_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="it is a (folder|pipe) or a device, not a file"):
            TensorFile(path)
    with pytest.raises(ValueError, match="is a (folder|pipe) or a device, not a file"):
        read_json(tmp_path / "x.safetensors")


def test_values_that_are_not_finite_are_found_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("dora_mm.formats.files.tensor_file._PIECE", 64)
    tensors = {"int": torch.arange(9), "empty": torch.empty(0, 3), "one": torch.tensor(1.0)}
    for number, dtype in enumerate(DTYPES[:4]):
        for place, value in ((0, math.inf), (70, math.nan), (99, -math.inf), (99, 0.0)):
            tensor = torch.randn(10, 10).to(dtype)
            tensor.view(-1)[place] = value
            tensors[f"{number} {place} {value}"] = tensor
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    expected = {key for key, tensor in tensors.items() if not tensor.isfinite().all()}
    assert len(expected) == 12
    assert set(TensorFile(tmp_path / "x.safetensors").not_finite()) == expected
    for key, tensor in tensors.items():
        assert (first_not_finite([(key, tensor)]) == key) == (key in expected)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    """The library maps files into memory, and such a one ends its process (SIGBUS)."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2**20)}, path)
    file = TensorFile(path)
    os.truncate(path, 4096)
    for read in (lambda: file.read("x"), file.not_finite, lambda: list(file.data())):
        with pytest.raises(ValueError, match="cannot be read: it ends too early"):
            read()


@pytest.mark.parametrize("name", ["x.bin", "x.ckpt", "x.pt", "x.pth", "x.pkl"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle, which can run any code when it is opened"):
        TensorFile(tmp_path / name)


@given(st.data())
def test_flipped_bytes_give_a_file_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    safetensors.torch.save_file({"a": torch.randn(3, 2), "b": torch.randn(4)}, path, metadata={"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
    problem = ""
    read = []
    try:
        file = TensorFile(path)
        read = [file.read(key) for key in file.entries]
    except ValueError as error:
        problem = str(error)
    assert not problem or problem.startswith(f"{path} cannot be read")
    assert sum(tensor.nbytes for tensor in read) <= len(content)


def test_a_large_file_is_read_lazily(tmp_path):
    size = 2**32  # a file of 4 GB, most of which does not exist on disk
    header = {"big": entry("U8", (size,), (0, size)), "small": entry(offsets=(size, size + 8))}
    path = write(tmp_path / "x.safetensors", header)
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + size + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = TensorFile(path)
    assert file.read("small").equal(torch.zeros(2))
    assert file.map("small").equal(torch.zeros(2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
