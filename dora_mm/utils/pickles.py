"""Pickle files, read without running code: plain containers, and the tensors of files that `torch.save` wrote.

Python's own reader runs here with a shorter table of operations. No class is looked up and no function is called but
those below, which make tensors from bytes of the file. What is made is never larger than the file.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from dora_mm.utils.json_text import check_no_device, read_bounded

MOST = 2**28  # bytes; the refs of RefCOCO have some 20 million
# What makes lists, tuples, dicts, texts, bytes, numbers, None and booleans, and nothing else: no class, function or
# object is looked up, made or called. Without the operations that make room for a size which the file only claims.
DATA_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
)
STORAGES = {  # dtypes by the names of torch's typed storages
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ARCHIVE = b"PK\x03\x04"  # how a file begins that is an archive
LEGACY = 0x1950A86A20F9469CFC6C, 1001  # the first values in a file that torch wrote before version 1.6


class _DataUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's own, written in Python, with a table of operations that is shorter; its memo is a dict, of any key."""

    dispatch: ClassVar[Mapping[int, Any]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in DATA_OPCODES}  # pyright: ignore[reportAttributeAccessIssue]

    def find_class(self, module: str, name: str) -> Any:
        raise AssertionError("no operation asks for it")


def read_data_pickle(path: Path) -> Any:
    """Reads a pickle file of plain containers, such as one that Python 2 wrote.

    Raises:
        ValueError: It cannot be read, is too large or damaged, or holds more than plain containers.
    """
    content = io.BytesIO(read_bounded(path, MOST))
    try:
        return _DataUnpickler(content, encoding="utf-8", errors="replace").load()
    except KeyError:
        raise ValueError(f"{path}: holds other things than lists, dicts, texts and numbers, and is not read") from None
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(f"{path}: is damaged, or no pickle file ({type(error).__name__})") from error


# --- tensors ---------------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """The file holds something else than tensors in plain containers."""


class _Storage(NamedTuple):
    """Numbers in the file.

    Attributes:
        dtype: Torch's name of their dtype.
        key: Their name in the file.
        count: How many there are.
    """

    dtype: str
    key: str
    count: int


class _View(NamedTuple):
    """A tensor over a storage that is not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable(NamedTuple):
    """One of the names that a file may mention."""

    module: str
    name: str


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    """What `torch._utils._rebuild_tensor_v2` is called with; gradients and hooks are left out."""
    are_sizes = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not are_sizes:
        raise _RefusedError("a tensor of other arguments")
    size = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if size > storage.count or (size and last >= storage.count):
        raise _RefusedError("a tensor that is larger than its numbers")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    """What `torch._utils._rebuild_parameter` is called with: the tensor."""
    return value


CALLED: dict[_Callable, Callable[..., Any]] = {
    _Callable("torch._utils", "_rebuild_tensor_v2"): _view,
    _Callable("torch._utils", "_rebuild_parameter"): _first,
    _Callable("collections", "OrderedDict"): dict,
}


class _TensorUnpickler(_DataUnpickler):
    """Knows also the names of storages and of three functions, which stand for others here, and calls these alone."""

    stack: list[Any]

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = _Callable(module, name)
        if found not in CALLED and (module != "torch" or name not in STORAGES):
            raise _RefusedError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *view = pid
        is_storage = kind == "storage" and isinstance(storage, _Callable) and storage.name in STORAGES
        if not is_storage or type(count) is not int or count < 0 or any(view):
            raise _RefusedError("a storage of other arguments")
        found = _Storage(STORAGES[storage.name], str(key), count)
        return self.storages.setdefault(found.key, found)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = CALLED.get(self.stack[-1]) if isinstance(self.stack[-1], _Callable) else None
        if function is None or not isinstance(arguments, tuple):
            raise _RefusedError("a call")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        """Leaves out attributes of a mapping, such as the versions of a state dict."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _RefusedError("an object with attributes")

    dispatch: ClassVar[Mapping[int, Any]] = {
        **_DataUnpickler.dispatch,
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in (pickle.GLOBAL, pickle.BINPERSID)},  # pyright: ignore[reportAttributeAccessIssue]
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
    }


def read_tensor_pickle(path: Path) -> Any:
    """Reads tensors in plain containers from a file that `torch.save` wrote, onto the processor.

    Raises:
        ValueError: It cannot be read, is damaged, or holds anything else.
    """
    check_no_device(path)
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(ARCHIVE)) == ARCHIVE
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _from_archive(file, size) if is_archive else _from_legacy(file)
    except _RefusedError as refused:
        raise ValueError(f"{path} holds more than tensors in plain containers ({refused}), and is not read") from None
    except KeyError:
        raise ValueError(f"{path} holds more than tensors in plain containers, and is not read") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(f"{path} is damaged, or no file of torch.save ({type(error).__name__})") from error


def _from_archive(file: BinaryIO, size: int) -> Any:
    """Reads an archive: the pickle, and a file for each storage, none of them compressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if sum(info.file_size for info in archive.infolist()) > size:
            raise _RefusedError("entries that share bytes, or are compressed")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise _RefusedError("numbers in another byte order")
        found = _TensorUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
        return _filled(found, lambda storage: archive.read(entries[f"data/{storage.key}"]))


def _from_legacy(file: BinaryIO) -> Any:
    """Reads a file from before archives: pickles one behind the other, then the storages in the order of the last."""
    magic, version, _ = (_DataUnpickler(file).load() for _ in range(3))
    if (magic, version) != LEGACY:
        raise _RefusedError("another format")
    reader = _TensorUnpickler(file)
    found, keys, content = reader.load(), _DataUnpickler(file).load(), {}
    for key in keys:
        storage = reader.storages[str(key)]
        if int.from_bytes(_exactly(file, 8), "little") != storage.count:
            raise _RefusedError("a storage of another size")
        content[storage.key] = _exactly(file, storage.count * _dtype(storage).itemsize)
    return _filled(found, lambda storage: content[storage.key])


def _exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise EOFError
    return found


def _dtype(storage: _Storage) -> Any:
    import torch  # here, so that commands which only write text need not load torch

    return getattr(torch, storage.dtype)


def _filled(value: Any, read: Callable[[_Storage], bytes]) -> Any:
    """A nested value with its tensors; each storage is read once, and each container filled once."""
    import torch

    storages: dict[str, bytearray] = {}
    done: dict[int, Any] = {}

    def tensor(view: _View) -> Any:
        storage, dtype = view.storage, _dtype(view.storage)
        if storage.key not in storages:
            storages[storage.key] = bytearray(read(storage))
        content = storages[storage.key]
        if len(content) < storage.count * dtype.itemsize:
            raise EOFError
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.as_strided(view.shape, view.strides, view.offset)

    def fill(each: Any) -> Any:
        if isinstance(each, _View):
            return tensor(each)
        if isinstance(each, _Callable | _Storage):
            raise _RefusedError(f"{each}")
        if not isinstance(each, dict | tuple | list):
            return each
        if id(each) not in done:
            is_dict = isinstance(each, dict)
            inner = {fill(k): fill(v) for k, v in each.items()} if is_dict else type(each)(map(fill, each))
            done[id(each)] = inner
        return done[id(each)]

    return fill(value)
