"""Models of the hub: whether it answers, and what of it is on this machine. Imports nothing large."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dora_mm.config.paths import HUB_NAME
from dora_mm.utils.home import SHORT
from dora_mm.utils.shell import quoted

LONGEST_WAIT = 5.0  # seconds for an answer of the hub


class UnreachableError(ValueError):
    """A repository is not on this machine, and the hub cannot be reached."""


def named(path: str, revision: str | None) -> str:
    """A model in a message."""
    return f"{path} (revision {revision})" if revision else path


def unreachable(path: str, revision: str | None, key: str) -> UnreachableError:
    """The error for a model that would have to be downloaded.

    Args:
        path: The hub name.
        revision: A commit, branch or tag; None: the main branch.
        key: The config key or argument that names it; empty where there is none.
    """
    start = f"{key}: " if key else ""
    return UnreachableError(
        f"{start}{named(path, revision)} is not on this machine, and the hub (huggingface.co) cannot be reached: go "
        "online once, or name a local folder instead"
    )


def check_hub(path: str, revision: str | None = None, *, key: str = "") -> None:
    """Checks that a hub model can be had: it is on this machine, at least in part, or the hub answers.

    Libraries ask the hub five times for every file, half a minute each.

    Args:
        path: A local path, which needs no hub, or a hub name.
        revision: A commit, branch or tag; None: the main branch.
        key: The config key or argument that names it; empty where there is none.

    Raises:
        UnreachableError: It cannot.
        ValueError: It would have no place on this machine.
    """
    if not HUB_NAME.fullmatch(path) or Path(path).exists():
        return
    if not hub_answers():
        if local_copy(path, revision) is None:
            raise unreachable(path, revision, key)
    elif not has_cache():
        start = f"{key}: " if key else ""
        raise ValueError(
            f"{start}{named(path, revision)} is a model of the hub, and this user has no home folder to keep it in: "
            "set HF_HOME to a folder"
        )


def has_cache() -> bool:
    """Whether models of the hub have a place on this machine; without a home folder its name still begins with `~`."""
    from huggingface_hub import constants

    return not constants.HF_HUB_CACHE.startswith(SHORT)


@cache
def hub_answers() -> bool:
    """Whether the hub answers; where it does not, what is on this machine is loaded without asking it again."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=LONGEST_WAIT)
    except Exception:  # of httpx or requests, by release: no name, no route, too late, or offline by a variable
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def hub_files(path: str, revision: str | None = None) -> dict[str, int]:
    """The files of a repository of the hub, with their sizes in bytes."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(path, revision=revision, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in found}


def download(path: str, revision: str | None, files: list[str]) -> Path:
    """Downloads files of a repository of the hub, as far as they are not on this machine; returns their folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=files))


def local_copy(path: str, revision: str | None = None) -> Path | None:
    """A local path as it is, or the folder of a hub repository in the cache; None if it was never downloaded.

    Args:
        path: A local folder or file, or the name of a repository, `owner/name`.
        revision: A commit, branch or tag of the repository; None: its main branch.
    """
    if Path(path).exists():
        return Path(path)
    if not has_cache():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def check_named_by(file: str, path: str | None, revision: str | None = None) -> None:
    """Checks that a model that a file names, and not the person, needs no download: anybody may have written the file.

    Args:
        file: The file, for the message.
        path: A local path, a hub name, or None.
        revision: A commit, branch or tag; None: the main branch.

    Raises:
        ValueError: Nothing of it is on this machine.
    """
    if path and HUB_NAME.fullmatch(path) and local_copy(path, revision) is None:
        raise ValueError(
            f"{file} names the model {named(path, revision)}, which is not on this machine, and a file starts no "
            f"download: name it yourself (--set model.path={quoted(path)}), or get it first "
            f"(hf download {quoted(path)})"
        )
