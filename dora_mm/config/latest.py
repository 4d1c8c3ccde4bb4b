"""`runs/NAME/latest` in a path: the highest number in `runs/NAME` that has the wanted files.

Commands and configs replace it with the number before anything is recorded, so that what they write and print stays
true when there are more runs. No such folder or link is ever made.
"""

from pathlib import Path
from typing import NamedTuple

from dora_mm.utils.home import expanded

LATEST = "latest"


class Wanted(NamedTuple):
    """The kind of a run: its name in messages, and file patterns of which a run must match one."""

    title: str
    patterns: tuple[str, ...]


RUN = Wanted("a config.yaml", ("config.yaml",))
ADAPTER = Wanted("an adapter", ("adapter/*.safetensors", "*.safetensors"))
CHECKPOINT = Wanted("a checkpoint", ("checkpoints/step-*",))
IMAGES = Wanted("images", ("manifest.jsonl", "samples/*.png", "sheet*.png"))


def numbered(path: str, wanted: Wanted = RUN, *, new: bool = False) -> str:
    """A path with `latest` replaced by a number; unchanged without `latest`, or if it exists with that name.

    Args:
        path: The path, such as `runs/my_style/latest` or `runs/my_style/latest/sheet.png`.
        wanted: What the run must have, where the path ends there.
        new: Whether what follows in the path may be missing, since it is written.

    Raises:
        ValueError: There are runs, and none of them has it.
    """
    parts = Path(path).parts
    index = parts.index(LATEST) if LATEST in parts else 0
    if not index or expanded(path).exists():
        return path
    before, after = Path(*parts[:index]), Path(*parts[index + 1 :])
    inside = not new and after.parts
    patterns = (str(after),) if inside else wanted.patterns
    folder = expanded(before)
    found = [run for run in folder.iterdir() if run.name.isdecimal() and run.is_dir()] if folder.is_dir() else []
    runs = sorted(found, key=lambda run: int(run.name), reverse=True)
    for run in runs:
        if any(True for pattern in patterns for _ in run.glob(pattern)):
            return str(before / run.name / after)
    if runs:
        raise ValueError(f"{path}: no run in {before} has {after if inside else wanted.title}")
    return path


def numbered_adapters(text: str) -> str:
    """As `numbered`, of adapters with their strengths: `runs/a/latest:0.7+runs/b/latest:0.3`."""
    if LATEST not in text:
        return text
    return "+".join(map(_numbered_adapter, text.split("+")))


def _numbered_adapter(text: str) -> str:
    path, colon, strength = text.strip().rpartition(":")
    if not colon or "/" in strength:  # no strength
        return numbered(text.strip(), ADAPTER)
    return f"{numbered(path, ADAPTER)}:{strength}"
