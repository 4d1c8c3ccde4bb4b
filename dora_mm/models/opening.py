"""Opening a model: its folder or hub repository, and one sentence for whatever a library raises while it is loaded."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from dora_mm.config.paths import CONFIG, HUB_NAME, INDEX, find_path
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.formats.files.variants import choose_variant, of_variant
from dora_mm.models.hub import check_hub, local_copy, named, unreachable
from dora_mm.utils.guards import ElsewhereError, guarded, is_panic
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.progress import Progress

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")  # ends of files
LONGEST_REASON = 500  # characters; transformers' message about shapes has 60 lines
OWN_CODE = "code in its own folder, which is not run (trust_remote_code is never used)"
# httpx and requests, which huggingface_hub uses in different releases, and their common bases
LIBRARIES = ("diffusers.utils.logging", "transformers.utils.logging")  # each has bars of its own
_CONNECTION = {"TransportError", "ConnectionError", "Timeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}


@contextmanager
def opening(
    name: str, problem: str, *, key: str = "", revision: str | None = None, loads: bool = True
) -> Iterator[None]:
    """A context in which other libraries load something of a model: their errors become one sentence.

    Libraries raise anything for files that are missing, damaged or of another kind of model: tokenizers, for one, a
    plain Exception, or a panic, which is none. Their bars of loading, a moment each, are left out; those of downloads
    stay. What the files ask for of code and of other places is refused; see `dora_mm.utils.guards`.

    Args:
        name: What is loaded: a local path, or a hub name.
        problem: What it means if it cannot be, such as "<path> cannot be loaded".
        key: The config key that names it; empty where there is none.
        revision: A commit, branch or tag of a hub model; None: its main branch.
        loads: Whether files are read; else something is built of what was read before.

    Raises:
        UnreachableError: It is on the hub, and the hub cannot be reached.
        ValueError: The body raised anything else.
    """
    start = f"{key}: " if key else ""
    if loads:
        check_hub(name, revision, key=key)
    try:
        repository = "" if Path(name).exists() else name if HUB_NAME.fullmatch(name) else None
        with guarded(repository), without_bars(), Progress(f"loading {name}", hidden=not loads):
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if elsewhere := next((cause for cause in _causes(error) if isinstance(cause, ElsewhereError)), None):
            raise ValueError(f"{start}{problem}: {elsewhere}") from error
        if not Path(name).exists() and any(_is_connection(cause) for cause in _causes(error)):
            raise unreachable(name, revision, key) from error
        needs_remote_code = "trust_remote_code=True" in str(error)  # nothing here could pass it
        reason = f"it needs {OWN_CODE}" if needs_remote_code else " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(f"{start}{problem}: {reason}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Turns off the bars with which diffusers and transformers load weights, but not those of downloads."""
    found = [sys.modules[name] for name in LIBRARIES if name in sys.modules]
    shown = [library for library in found if library.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for library in shown:
        library.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # transformers turns these off with its own
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def check_revision(path: str, revision: str | None) -> None:
    """Checks that `model.revision` is that of a hub model.

    Raises:
        ValueError: The model is local.
    """
    if revision and Path(path).exists():
        raise ValueError(f"model.revision: {path} is not a model of the hub, so it has no revisions: leave it out.")


def opened_folder(path: str, revision: str | None = None, *, key: str = "") -> ModelFolder:
    """The folder of a model, by its JSON files; of a hub model these alone are downloaded, where they are not here.

    Args:
        path: A local folder, or a hub name.
        revision: A commit, branch or tag of a hub model; None: its main branch.
        key: The config key that names it, for messages; empty where there is none.

    Raises:
        UnreachableError: It is on the hub, and the hub cannot be reached.
        ValueError: There is no such repository.
    """
    if Path(path).exists():
        return ModelFolder(Path(path))
    from huggingface_hub import snapshot_download

    wanted = [INDEX, CONFIG, f"*/{CONFIG}", "scheduler/scheduler_config.json"]
    with opening(path, f"{named(path, revision)} cannot be read from the hub", key=key, revision=revision):
        return ModelFolder(Path(snapshot_download(path, revision=revision, allow_patterns=wanted)))


def base_of(adapter: Path) -> str | None:
    """The base model that the header of an adapter names, where it is on this machine; else None.

    Where its denoiser was in a file of its own, it is that file.

    Args:
        adapter: The file, its folder or its run directory.

    Raises:
        ValueError: There is no adapter, or it cannot be read.
    """
    header = read_metadata(find_file(adapter))
    name = parse_json(header.get("base_settings", "{}"), "base_settings").get("denoiser") or header.get("base_model")
    if not isinstance(name, str):
        return None
    found = find_path(name) or (local_copy(name, header.get("base_revision")) if HUB_NAME.fullmatch(name) else None)
    return found and str(found)


def loaded_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a folder that diffusers or transformers read: of weights, only safetensors of one variant.

    Args:
        folder: The folder of a network, a tokenizer or a scheduler.
        variant: The variant, see `choose_variant`; None: that which the folder has.
    """
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "README"))]
    files = {file.name: file for file in files if file.suffix not in WEIGHTS or file.suffix == ".safetensors"}
    chosen = choose_variant([files]) if variant is None else variant
    return [files[name] for name in of_variant(files, chosen)]


def is_weights(file: Path) -> bool:
    """Whether a file has weights, or is the index of files that have them."""
    return file.suffix in WEIGHTS or file.name.endswith(".index.json")


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit of a hub repository as it was loaded, from the hub's cache on this machine.

    Args:
        path: What was loaded.
        revision: The revision that was loaded; None: the main branch.

    Returns:
        The commit's hash; None for what is local, and for a repository that is not in the cache.
    """
    found = None if Path(path).exists() else local_copy(path, revision)
    return found and found.name


def _is_connection(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or bool(names & _CONNECTION)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
