"""The folder of a model of transformers: its config and class, its weights, and a copy of it with other weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dora_mm.formats.files.model_class import reading_part
from dora_mm.formats.files.variants import choose_variant, with_variant
from dora_mm.models.foreign import converted, instead_of, why_foreign
from dora_mm.models.hub import local_copy
from dora_mm.models.identity import ModelIdentity, digests_of
from dora_mm.models.opening import is_weights, opening, without_bars
from dora_mm.utils.digest import weights_digest
from dora_mm.utils.folders import BEGUN, check_entry
from dora_mm.utils.json_text import read_json
from dora_mm.utils.tensor_writer import write_tensor_file

DTYPES = ("float32", "bfloat16", "float16")
SPEECH_WEIGHTS = {  # the parts that speak, by the model type of the part that reads and writes text
    "qwen2_5_omni_thinker": ("talker.", "token2wav."),
    "qwen3_omni_moe_thinker": ("talker.", "code2wav."),
}
SPEAKERS = "spk_dict.pt"  # of Qwen2.5-Omni: the voices of what speaks
DTYPE_KEYS = ("dtype", "torch_dtype")  # of a config.json, by version of transformers


def read_config(path: str, revision: str | None = None, *, key: str = "") -> PretrainedConfig:
    """Reads the config of a model of transformers: of what reads and writes text, where it also speaks.

    Args:
        path: A folder of `save_pretrained`, or a hub name.
        revision: A commit, branch or tag of a hub model; None is its main branch.
        key: The config key that names it, for messages; empty where there is none.

    Raises:
        UnreachableError: It is on the hub, and the hub cannot be reached.
        ValueError: There is no config, or it is none of transformers' architectures.
    """
    with opening(path, f"{path} is not a model of transformers, by its config.json", key=key, revision=revision):
        try:
            found = reading_part(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False))
            found.get_text_config().to_dict()  # a part of a config.json may be anything
            return found
        except OSError:  # there is none, or the hub cannot be reached
            raise
        except Exception as error:  # of configs that are for other code, transformers raises anything
            raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
            raise ValueError(why_foreign(raw) or str(error)) from error


def model_class(config: PretrainedConfig, path: str) -> Any:
    """The class that saved a model, from `architectures` of its config.

    transformers' auto classes choose by the type of the config alone, so that AutoModelForImageTextToText loads a
    BlipForQuestionAnswering as a captioner without a word.

    Args:
        config: The model's config.
        path: Its folder or name, for messages.

    Raises:
        ValueError: The config names no class, or one that transformers lacks.
    """
    names = getattr(config, "architectures", None) or []
    if not names:
        raise ValueError(f"{path} does not name its class: its config.json has no architectures")
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"{path}: architectures in its config.json is no list of names: {names!r:.100}")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"{path} is a {names[0]}, a class that transformers {transformers.__version__} does not have; "
            f"{instead_of(config.to_dict())}"
        )
    return found


def empty_model(path: str, revision: str | None = None) -> nn.Module:
    """Builds the model from its config alone, on the meta device: for its structure and numbers of parameters.

    Raises:
        ValueError: As `read_config` and `model_class`; or the config does not fit the class.
    """
    config = read_config(path, revision)
    kind = model_class(config, path)
    with opening(path, f"the {kind.__name__} of {path} cannot be built"), torch.device("meta"):
        return kind(config)


def load_weights(kind: Any, path: str, **settings: Any) -> tuple[Any, list[str]]:
    """Loads a model, from safetensors alone, and checks that no weight is missing or of another shape.

    transformers is told to ignore mismatched shapes because its own message about them has 60 lines.

    Args:
        kind: Its class of transformers.
        path: A local folder or a hub name.
        **settings: Further arguments of `from_pretrained`.

    Returns:
        The model, and the names of weights that it has no place for.

    Raises:
        ValueError: There is no model, it is damaged, incomplete or of another kind; the message names `model.path`.
    """
    checks = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    if (folder := local_copy(path, settings.get("revision"))) and (variant := choose_variant([os.listdir(folder)])):
        settings["variant"] = variant
    with opening(path, f"{path} cannot be loaded", key="model.path", revision=settings.get("revision")):
        model, report = kind.from_pretrained(path, trust_remote_code=False, **checks, **settings)
    config = model.config.to_dict()
    other = converted(config) if "auto_map" in config else None  # the weights may be for the code in the folder
    hint = f"; use its version for transformers, {other}" if other else ""
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more weights" if missing[1:] else ""
        raise ValueError(f"model.path: {path} is incomplete: it lacks {missing[0]}{others}{hint}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, needed = mismatched[0]
        raise ValueError(
            f"model.path: {path} has a {name} of shape {tuple(found)}, and its config.json needs {tuple(needed)}" + hint
        )
    return model, sorted(report["unexpected_keys"])


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads the weights of a model in a local folder."""
    variant = choose_variant([os.listdir(folder)])
    single, index = (folder / with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if single.is_file() or not index.is_file():
        return [single]
    return [folder / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, by the index of a model in several files.

    Raises:
        ValueError: It cannot be read, or names a file that is not beside it.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or any(not isinstance(f, str) or Path(f).name != f for f in found.values()):
        raise ValueError(f"{index} does not say which files beside it have the weights")
    return found


def has_weights(path: str, revision: str | None = None) -> bool:
    """Whether all weights of a model are on this machine, in its local folder or in the hub's cache."""
    folder = local_copy(path, revision)
    return folder is not None and all(file.is_file() for file in weight_files(folder))


def identity_of(path: str, commit: str | None) -> ModelIdentity:
    """The identity of a model of transformers that could be loaded.

    A commit would not do: a folder with the same weights has none, and one that edits a README has others.

    Args:
        path: Its local folder or hub name.
        commit: The commit of a hub model; None for a local one.
    """
    folder = local_copy(path, commit)
    assert folder is not None
    return ModelIdentity({"base_digest": weights_digest(weight_files(folder))}, digests_of(folder))


def saved_dtype(path: str, config: PretrainedConfig) -> str:
    """The dtype of a model's weights, as its config says.

    Raises:
        ValueError: It says none, or one that is not loaded here.
    """
    name = str(config.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"the config.json of {path} has no dtype of {', '.join(DTYPES)}: choose one by --dtype")
    return name


def write_copy(model: Any, source: Path, folder: Path) -> None:
    """Writes a model with the files of the folder that it was loaded from: the same but for the weights.

    Every file but the weights is copied, since transformers writes configs and processors that its earlier versions
    cannot read, or read as other models. `config.json` is only changed where the dtype is another one, or weights that
    were tied are different now.

    Args:
        model: The model, loaded by `from_pretrained`, without adapters.
        source: The local folder that it was loaded from; of a hub model, that in the cache.
        folder: An empty folder.

    Raises:
        ValueError: Only some of the weights that were tied are different now; or a file is a link to another place.
    """
    for _ in _others(source):  # a link is refused before gigabytes are written
        pass
    untied = _is_untied(model)
    files = weight_files(source)
    shards = {"max_shard_size": max(file.stat().st_size for file in files)} if len(files) > 1 else {}
    with without_bars():
        model.save_pretrained(folder, **shards)
    for file in folder.iterdir():
        if not is_weights(file) and file.name != BEGUN:
            file.unlink()
    if model.config.model_type in SPEECH_WEIGHTS:
        _add_weights(SPEECH_WEIGHTS[model.config.model_type], source, folder)
    for file in _others(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(file, target)
    _edit_config(folder / "config.json", str(model.dtype).removeprefix("torch."), untied)


def _add_weights(prefixes: tuple[str, ...], source: Path, folder: Path) -> None:
    """Copies the weights of the parts of a whole model that its reading part is without, in files of their own.

    Args:
        prefixes: What the names of these weights begin with.
        source: The folder of the whole model.
        folder: That of the reading part, whose weights have the names that they have in the whole model.
    """
    written = weight_files(folder)
    parts = [file for file in weight_files(source) if _names_in(file, prefixes)]
    if not parts:  # it is the reading part alone
        return
    total, map_of = len(written) + len(parts), {}
    for number, file in enumerate([*written, *parts], 1):
        target = folder / f"model-{number:05d}-of-{total:05d}.safetensors"
        if number > len(written):
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in _names_in(file, prefixes)}
            write_tensor_file(target, tensors, {"format": "pt"})
        elif file != target:
            file.rename(target)
        map_of |= dict.fromkeys(_names_in(target), target.name)
    size = sum((folder / name).stat().st_size for name in set(map_of.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(map_of.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names_in(file: Path, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The names of the tensors of a file that begin with one of these."""
    with safe_open(file, framework="pt") as opened:
        return [name for name in opened.keys() if name.startswith(prefixes)]  # noqa: SIM118


def _is_untied(model: Any) -> bool:
    """Whether the only two weights that the config ties are different now."""
    pairs = list(model.all_tied_weights_keys.items())
    different = [(a, b) for a, b in pairs if model.get_parameter(a) is not model.get_parameter(b)]
    if different and len(pairs) > 1:
        raise ValueError(
            f"the adapter changes only one of {' and '.join(different[0])}, which this model ties, and it ties others, "
            "too: config.json has one key for all of them, so no folder can hold that"
        )
    return bool(different)


def _others(source: Path) -> Iterator[Path]:
    """All files but weights and adapters, and those of subfolders without weights (of templates, tokenizers).

    Raises:
        ValueError: One is a link to another place, and no copy of it is made.
    """
    for entry in source.iterdir():
        if entry.name.startswith((".", "adapter_")):
            continue
        if entry.is_file() and (entry.name == SPEAKERS or not is_weights(entry)):
            yield check_entry(entry, source)
        elif entry.is_dir() and not any(map(is_weights, entry.rglob("*"))):
            check_entry(entry, source)
            yield from (check_entry(file, source) for file in entry.rglob("*") if file.is_file())


def _edit_config(file: Path, dtype: str, untied: bool) -> None:
    old = json.loads(file.read_text(encoding="utf-8"))
    new = _with_dtype(old, dtype)
    if not any(new.get(key) for key in DTYPE_KEYS):
        new["torch_dtype"] = dtype  # which all versions read
    if untied:
        thinker = new.get("thinker_config", new)
        for part in (new, thinker, thinker.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    if new != old:
        file.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def _with_dtype(values: Any, dtype: str) -> Any:
    """A config with another dtype, of all its parts that name one."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [_with_dtype(value, dtype) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: dtype if key in DTYPE_KEYS and value in DTYPES else _with_dtype(value, dtype)
        for key, value in values.items()
    }
