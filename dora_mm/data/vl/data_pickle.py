"""Plain containers in a pickle file: read without running code, since only their own operations are known here."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dora_mm.utils.json_text import read_bounded

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
