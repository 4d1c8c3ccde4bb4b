"""The Hugging Face hub: what is in its cache on this machine, and one sentence when it cannot be reached."""

import socket
from collections.abc import Iterator
from pathlib import Path

# httpx and requests, which huggingface_hub uses in different releases, and their common bases
_CONNECTION = {"TransportError", "ConnectionError", "Timeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}


class UnreachableError(ValueError):
    """A repository is not on this machine, and the hub cannot be reached."""


def unreachable(name: str, error: BaseException) -> str | None:
    """The message for a repository that cannot be downloaded; None if the error has another reason.

    Args:
        name: The repository, `owner/name`.
        error: What a library raised while loading it.
    """
    if Path(name).exists() or not any(_is_connection(cause) for cause in _causes(error)):
        return None
    return (
        f"{name} is not on this machine, and the hub (huggingface.co) cannot be reached: go online once, or name a "
        "local folder instead"
    )


def local_copy(path: str, revision: str | None = None) -> Path | None:
    """A local path as it is, or the folder of a hub repository in the cache; None if it was never downloaded.

    Args:
        path: A local folder or file, or the name of a repository, `owner/name`.
        revision: A commit, branch or tag of the repository; None: its main branch.
    """
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def commit_of(path: str, file: str, revision: str | None = None) -> str | None:
    """The commit of a hub repository as it was loaded, from the hub's cache on this machine.

    Args:
        path: What was loaded.
        file: A file of it that was loaded.
        revision: The revision that was loaded; None: the main branch.

    Returns:
        The commit's hash; None for a local folder, and for a file that is not in the cache.
    """
    if Path(path).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _is_connection(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or bool(names & _CONNECTION)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
