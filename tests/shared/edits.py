"""Edits of the files of a model's folder, one at a time."""

from collections.abc import Iterator
from pathlib import Path

UNREAD = ("README.md", ".gitattributes")  # files of a repository that no loading reads


def edits(folder: Path) -> Iterator[str]:
    """Edits each file of a folder in turn, and restores it: the last bit of weights, a line break behind others.

    Yields:
        The path of the edited file in the folder, at last those of files that are added, which nothing reads.
    """
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        before = file.read_bytes()
        is_weights = file.suffix == ".safetensors"
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if is_weights else before + b"\n")
        try:
            yield file.relative_to(folder).as_posix()
        finally:
            file.write_bytes(before)
    for name in UNREAD:
        (folder / name).write_text("for people\n")
        yield name
        (folder / name).unlink()


def named(file: str) -> str | None:
    """How a message names an edited file of a model; None: it is not read."""
    if file in UNREAD:
        return None
    if not file.endswith(".safetensors"):
        return f"{file} of the model"
    component = file.rpartition("/")[0]
    return f"the weights of {component or 'the model'}"
