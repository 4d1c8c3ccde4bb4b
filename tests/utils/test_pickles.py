"""Files of torch.save, read without torch.load: what torch itself reads, and nothing that could run or grow."""

import collections
import io
import pickle
import zipfile

import pytest
import torch
from torch import nn

from dora_mm.utils.pickles import read_tensor_pickle

WHOLE = torch.arange(12.0).view(3, 4)
CONTENT = {
    "transposed": WHOLE.t(),
    "rows": [WHOLE[1:], (1, None, True, float("inf"))],
    3: {"number": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.empty(0, 2)},
    "parameter": nn.Parameter(torch.ones(2)),
    "state dict": nn.Linear(2, 3).state_dict(),
    "ordered": collections.OrderedDict(a=torch.zeros(1, dtype=torch.bool)),
}


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(equal, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("is_archive", [True, False])
def test_it_reads_what_torch_reads(is_archive, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=is_archive)
    assert equal(read_tensor_pickle(path), torch.load(path, weights_only=True))


class Trap:
    def __reduce__(self):
        return print, ("sprung",)


class Attributes:
    pass


@pytest.mark.parametrize("value", [Trap(), Attributes(), {"a": Trap()}, torch.float32, torch.device("cpu"), {1}, 1j])
@pytest.mark.parametrize("is_archive", [True, False])
def test_anything_else_is_refused(value, is_archive, tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"weight": torch.ones(1), "other": value}, path, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(ValueError, match=r"x.pt holds more than tensors in plain containers"):
        read_tensor_pickle(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("end", [0, 5, 100, 700, -1])
@pytest.mark.parametrize("is_archive", [True, False])
def test_damaged_files_are_named(end, is_archive, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=is_archive)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"x.pt (is damaged|holds more)"):
        read_tensor_pickle(path)


def archive(path, content: bytes, storage: bytes = b"", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", storage)
    return path


def tensor_pickle(count: int, offset: int, shape, strides) -> bytes:
    """The pickle of one tensor, as torch writes it."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {})

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    Writer(stream, 2).dump(Tensor())
    return stream.getvalue()


def test_views_lie_inside_of_their_numbers(tmp_path):
    numbers = torch.arange(4.0).numpy().tobytes()
    found = read_tensor_pickle(archive(tmp_path / "x", tensor_pickle(4, 1, (3,), (1,)), numbers))
    assert found.tolist() == [1, 2, 3]
    wrong = [
        (4, 2, (3,), (1,)),
        (4, 0, (2**40,), (0,)),
        (4, -1, (1,), (1,)),
        (2**40, 0, (1,), (1,)),
        (4, 0, (2,), (-1,)),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"larger than its numbers|other arguments|is damaged"):
            read_tensor_pickle(archive(tmp_path / "x", tensor_pickle(*arguments), numbers))


def test_no_gigabyte_comes_from_a_kilobyte(tmp_path):
    zeros = archive(tmp_path / "x", tensor_pickle(2**20, 0, (2**20,), (1,)), bytes(2**22), zipfile.ZIP_DEFLATED)
    assert zeros.stat().st_size < 2**14
    with pytest.raises(ValueError, match="compressed"):
        read_tensor_pickle(zeros)
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]  # 2**60 lists, if each was made anew
    torch.save(nested, tmp_path / "y")
    found = read_tensor_pickle(tmp_path / "y")
    assert found[0] is found[1]
    endless: list = []
    endless.append(endless)
    torch.save(endless, tmp_path / "z")
    with pytest.raises(ValueError, match="z is damaged"):
        read_tensor_pickle(tmp_path / "z")
