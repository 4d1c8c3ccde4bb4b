"""Numbered folders, as runs have them."""

from pathlib import Path


def claim_number(parent: Path) -> Path:
    """Claims the next number by creating its folder, so that two runs that start together get different numbers.

    Args:
        parent: Holds the numbered folders; it is created if it is missing.

    Returns:
        The new folder, such as `parent`/003.
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
