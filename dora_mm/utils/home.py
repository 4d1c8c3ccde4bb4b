"""The home folder, which not every process has: without HOME it is that of the user, and a container may know none."""

import os
from pathlib import Path

SHORT = "~"  # how paths in it begin


def expanded(path: str | Path, prefix: str = "") -> Path:
    """A path that a person has typed, with `~` or `~name` replaced by the home folder.

    Args:
        path: The path.
        prefix: The beginning of the message where there is no such folder, such as the key that holds the path.

    Raises:
        ValueError: There is none.
    """
    found = os.path.expanduser(path)
    if found.startswith(SHORT):
        user = Path(found).parts[0][1:]
        why = f"there is no user {user}" if user else "this user has no home folder: set HOME"
        raise ValueError(f"{prefix}{path}: {why}, or write the path out")
    return Path(found)


def cache_folder() -> Path | None:
    """The folder of our caches, in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    try:
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dora_mm"
    except ValueError:
        return None
