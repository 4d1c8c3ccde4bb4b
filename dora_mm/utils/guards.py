"""Guards of what a model's files ask of the libraries that read them: code, other models, patterns that panic.

Files of models come from anybody. transformers and diffusers run no Python file of a folder as long as
`trust_remote_code` is off, but a config can still name a kernel of the hub, which is native code, or another model to
load. The few functions of theirs by which that happens are replaced, and refuse it while a model is opened here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled

# The keys of configs by which transformers chooses an implementation, which may be a kernel of the hub; and the key by
# which a config says which of its keys stand for which attributes
IMPLEMENTATION_KEYS = frozenset(
    f"{before}{kind}_implementation{after}"
    for kind in ("attn", "experts")
    for before in ("", "_")
    for after in ("", "_internal")
) | {"attribute_map"}
LIBRARIES = ("transformers", "diffusers")
MAIN_PAGE = ("", "/")


class ElsewhereError(OfflineModeIsEnabled):
    """A model's files name a repository of the hub that nobody asked for. Libraries then look into the hub's cache."""


def without_implementations(config: Any) -> Any:
    """The content of a config file without the keys that choose an implementation, in all of its parts."""
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if key not in IMPLEMENTATION_KEYS}
        return {key: without_implementations(value) for key, value in kept.items()}
    if isinstance(config, list | tuple):
        return type(config)(map(without_implementations, config))
    return config


@contextmanager
def guarded(repository: str | None) -> Iterator[None]:
    """A context in which libraries open a model: its files get at no code, no other model, and no other place.

    Args:
        repository: The hub's name of the model, `owner/name`: nothing else is asked of the hub; empty: nothing at all;
            None: whatever the libraries ask for.
    """
    if not sys.modules.keys().isdisjoint(LIBRARIES):
        _guard_libraries()
    _guard_session()
    _opened.append(repository)
    try:
        yield
    finally:
        _opened.pop()


_opened: list[str | None] = []  # the repositories of the models that are being opened, the innermost last


@functools.cache
def _guard_libraries() -> None:
    """Replaces functions of transformers, which diffusers calls, too."""
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, modeling_utils
    from transformers.integrations import hub_kernels

    _replace(PreTrainedConfig, "from_dict", _of_clean_config)
    _replace(hub_kernels, "get_kernel", _of_allowed_kernels)
    _replace(PreTrainedModel, "set_use_kernels", _of_own_layers)
    _replace(modeling_utils, "maybe_load_adapters", _of_the_same_model)
    _replace(ProcessorMixin, "get_possibly_dynamic_module", _of_no_models)
    for name in ("_encode_plus", "_decode", "convert_tokens_to_string", "_add_tokens"):
        _replace(PreTrainedTokenizerFast, name, _of_no_panic)


def _replace(owner: Any, name: str, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function of a module, or a method of a class, by one that calls it."""
    found: Any = inspect.getattr_static(owner, name)
    kind: Any = type(found) if isinstance(found, classmethod | staticmethod) else None
    function: Any = found.__func__ if kind else found
    replacement: Any = functools.wraps(function)(guard(function))
    setattr(owner, name, kind(replacement) if kind else replacement)


# --- configs and kernels ----------------------------------------------------------------------------------------------

_kernels: set[str] = set()  # those that runs of this process have named
FLASH = "flash"  # in the names of implementations and of the kernels that transformers takes for them


def allow_kernels(attn_implementation: str | None) -> None:
    """Allows the kernel that `model.attn_implementation` names, and those that transformers takes for its name."""
    if attn_implementation:
        _kernels.add(attn_implementation.rpartition("|")[2].partition(":")[0].partition("@")[0].strip())


def _of_clean_config(function: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: type, config_dict: Any, **kwargs: Any) -> Any:
        return function(cls, without_implementations(config_dict) if _opened else config_dict, **kwargs)

    return from_dict


def _of_allowed_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    def get_kernel(kernel_name: str, *args: Any, **kwargs: Any) -> Any:
        of_flash = kernel_name.startswith("kernels-community/") and FLASH in kernel_name
        if kernel_name not in _kernels and not (of_flash and any(FLASH in name for name in _kernels)):
            raise FileNotFoundError(  # where a class can do without, transformers takes it for a kernel that is missing
                f"the model asks for the kernel {kernel_name}, native code of the hub, which only "
                "model.attn_implementation can name"
            )
        return function(kernel_name, *args, **kwargs)

    return get_kernel


def _of_own_layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without it transformers 5.25 takes norms, activations and more of any model from the hub, if kernels is there."""

    def set_use_kernels(self: Any, use_kernels: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, use_kernels and not _opened, *args, **kwargs)

    return set_use_kernels


# --- other models -----------------------------------------------------------------------------------------------------


def _of_the_same_model(function: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_load_adapters(path: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(path, *args, **kwargs)
        if _opened and found[1] != path:
            raise ValueError(f"{path} is an adapter for {str(found[1])!r:.100}, and no model: name the model itself")
        return found

    return maybe_load_adapters


def _of_no_models(function: Callable[..., Any]) -> Callable[..., Any]:
    def get_possibly_dynamic_module(module_name: Any) -> Any:
        found = function(module_name)
        from torch import nn

        if _opened and isinstance(found, type) and issubclass(found, nn.Module):
            raise ValueError(f"the processor's files name a model to load, a {found.__name__}, which is not done here")
        return found

    return get_possibly_dynamic_module


_redirected: set[str] = set()  # addresses of repositories that were renamed


def _guard_session() -> None:
    hooks = getattr(get_session(), "event_hooks", {"request": [], "response": []})
    for kind, hook in (("request", _check_request), ("response", _note_redirect)):
        if hook not in hooks[kind]:
            hooks[kind].append(hook)


def _check_request(request: Any) -> None:
    repository, url = (_opened[-1] if _opened else None), str(request.url)
    if repository is None or not url.startswith(constants.ENDPOINT) or url in _redirected:
        return
    path = request.url.path
    if path not in MAIN_PAGE and not (repository and f"/{repository}/" in f"{path}/"):
        raise ElsewhereError(f"the model's files name something else of the hub, which is not asked for: {path}")


def _note_redirect(response: Any) -> None:
    location = response.headers.get("location")
    if location and str(response.request.url).startswith(constants.ENDPOINT):
        _redirected.add(str(response.request.url.join(location)))


# --- panics -----------------------------------------------------------------------------------------------------------


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of Rust code, as of tokenizers, which is no Exception for Python."""
    return type(error).__name__ == "PanicException"


def _of_no_panic(function: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the tokenizer.json of {self.name_or_path} cannot read a text: {reason}") from None

    return guarded
