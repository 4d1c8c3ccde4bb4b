"""Which files of a folder or a pattern hold the rows of a split: by their names, as the library `datasets` finds them.

A snapshot of the hub has its splits in its README.md, or in the names of its files and folders. Hidden files are none
of its data, nor are archives and images beside tables that name them.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml

from dora_mm.config.vl_data import SourceConfig
from dora_mm.utils.folders import Links, check_entry

TEXTS = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), ".parquet", ".arrow", ".tar")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # each names the images beside it
NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = "-._ 0-9"  # around a keyword
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
MOST_PATTERN = 1000  # characters
Splits = dict[str, list[Path]]


def files_of_source(source: SourceConfig) -> list[Path]:
    """The files of a source with existing paths, in the order in which it names them.

    Raises:
        ValueError: As in `files_of`.
    """
    found = []
    for path in map(Path, source.files):
        of_rows = source.reader.splits_rows and (path.is_file() or not source.reader.hub)
        found += files_of(path, None if of_rows else source.split)
    return found


def files_of(path: Path, split: str | None = None) -> list[Path]:
    """The files that a path names: itself, or those of a split of a folder and its subfolders, or of a pattern.

    Args:
        path: A file, a folder or a pattern.
        split: The split; None: there is but one.

    Returns:
        The files in the order of their names; the path itself where a pattern fits none.

    Raises:
        ValueError: There are no data files, or none of the split; or, without `split`, it is unclear which are meant.
    """
    if path.is_file():
        if split:
            raise ValueError(f"{path} is one file: split {split!r} chooses among those of a folder or a pattern")
        return [path]
    if path.is_dir():
        splits, others = _splits_of_folder(path)
    else:
        matched = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
        if not matched:
            return [path]
        splits, others = _splits_by_name(_fixed_part(path), _data_files(matched) or matched)
    return _chosen(path, splits, others, split)


def check_links(path: Path, files: Iterable[Path], links: Links) -> None:
    """Checks that the files that `files_of` found in a folder or by a pattern are in the folder.

    Raises:
        ValueError: One is a link that leads out.
    """
    if not path.is_file():
        folder = path if path.is_dir() else _fixed_part(path)
        for file in files:
            check_entry(file, folder, links)


def _chosen(path: Path, splits: Splits, others: Sequence[Path], split: str | None) -> list[Path]:
    """The files of a split; `others` are in none."""
    if split:
        name = split if split in splits else next((name for name, words in KEYWORDS.items() if split in words), split)
        if name not in splits:
            raise ValueError(f"{path} has no split {split!r}: it has {', '.join(splits)}")
        return splits[name]
    if len(splits) > 1:
        named = ", ".join(f"{name} ({files[0].name}{', ...' * (len(files) > 1)})" for name, files in splits.items())
        raise ValueError(f"{path} has several splits: choose one, as in split: {next(iter(splits))}; there are {named}")
    (name,) = splits
    if others:
        raise ValueError(
            f"{path} has files of the split {name} ({splits[name][0].name}) and others of none ({others[0].name}): "
            f"give split: {name}, or a list or a pattern of the files"
        )
    return splits[name]


def _splits_of_folder(folder: Path) -> tuple[Splits, list[Path]]:
    """The files of a folder by their splits, and those that are in none."""
    if saved := _saved_splits(folder):
        return saved, []
    found = _data_files(folder.rglob("*"), folder)
    if not found:
        raise ValueError(f"{folder} is a folder without files that end in {', '.join(SUFFIXES)}")
    return _splits_of_readme(folder, found) or _splits_by_name(folder, found)


def _data_files(paths: Iterable[Path], folder: Path | None = None) -> list[Path]:
    """The data files of these paths, sorted: metadata files alone, if any; archives only if there is no other file."""
    found = sorted(path for path in paths if _is_data(path.relative_to(folder) if folder else Path(path.name)))
    found = [path for path in found if path.is_file()]
    metadata = [path for path in found if path.name in METADATA]
    return metadata or [path for path in found if path.suffix != ".tar"] or found


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) and part != ".." for part in path.parts)
    return path.name.lower().endswith(SUFFIXES) and path.name not in NO_DATA and not hidden


def _saved_splits(folder: Path) -> Splits:
    """The files of a folder that `save_to_disk` of `datasets` wrote; empty for another."""
    if (state := folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = _read(state, lambda found: [file["filename"] for file in found["_data_files"]])
        return {_read(state, lambda found: found["_split"]) or "train": [folder / Path(name).name for name in names]}
    if (saved := folder / "dataset_dict.json").is_file():
        names = _read(saved, lambda found: [Path(name).name for name in found["splits"]])
        splits = {name: _saved_splits(folder / name) for name in names}
        return {name: next(iter(files.values())) for name, files in splits.items() if files}
    return {}


def _read(path: Path, value: Callable[[Any], Any]) -> Any:
    """A value of a JSON file."""
    try:
        return value(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it is not as `save_to_disk` of the library datasets writes it") from None


# --- by the README.md and by names -----------------------------------------------------------------------------------


def _splits_of_readme(folder: Path, found: Sequence[Path]) -> tuple[Splits, list[Path]] | None:
    """The splits that a README.md gives in its header; None: it gives none.

    Raises:
        ValueError: It gives several data sets, of which none is the default.
    """
    configs = {str(one.get("config_name")): one for one in _configs(folder / "README.md")}
    subsets = {name: splits for name, one in configs.items() if (splits := _subset(folder, one, found))}
    if not subsets:
        return None
    defaults = [name for name in subsets if configs[name].get("default") or name == "default" or len(subsets) == 1]
    name = defaults[0] if defaults else ""
    if not name:
        example = next(iter(subsets[next(iter(subsets))].values()))[0].relative_to(folder)
        raise ValueError(
            f"{folder} has several data sets ({', '.join(list(subsets)[:8])}{', ...' if len(subsets) > 8 else ''}): "
            f"give the folder or a pattern of one, or a list of these (one has {example})"
        )
    return subsets[name], []


def _configs(readme: Path) -> list[dict[str, Any]]:
    """The `configs` in the header of a README.md."""
    if not readme.is_file():
        return []
    header = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return []
    configs = found.get("configs") if isinstance(found, Mapping) else None
    return [one for one in configs or [] if isinstance(one, dict)]


def _subset(folder: Path, config: Mapping[str, Any], found: Sequence[Path]) -> Splits:
    """The files of one data set of a README.md, by their splits."""
    root = folder / _inside(folder, str(config.get("data_dir") or ""))
    given = config.get("data_files")
    if given is None:
        inside = [path for path in found if path.is_relative_to(root)]
        return _splits_by_name(root, inside)[0] if config.get("data_dir") and inside else {}
    given = given if isinstance(given, list) else [given]
    splits: Splits = {}
    for one in given:
        name, paths = (one.get("split"), one.get("path")) if isinstance(one, dict) else ("train", one)
        for pattern in paths if isinstance(paths, list) else [paths]:
            matched = {root / path for path in glob(_inside(folder, str(pattern)), root_dir=root, recursive=True)}
            splits.setdefault(str(name), []).extend(path for path in found if path in matched)
    return {name: files for name, files in splits.items() if files}


def _inside(folder: Path, pattern: str) -> str:
    """A pattern of a README.md, which looks for files of its folder alone.

    Raises:
        ValueError: It leads to another folder, or is longer than any path.
    """
    if len(pattern) > MOST_PATTERN or pattern.startswith("/") or ".." in Path(pattern).parts:
        raise ValueError(f"{folder / 'README.md'} names files by {pattern!r:.100}, which is no pattern of its folder")
    return pattern


def _splits_by_name(root: Path, found: Sequence[Path]) -> tuple[Splits, list[Path]]:
    """The splits that names below a folder tell: of shards in data/, else of folders, else of files, or one of all."""
    names = {path: path.relative_to(root).as_posix() for path in found}
    shards = {path: match[1] for path, name in names.items() if (match := SHARD.fullmatch(name))}
    ways: list[Splits] = [
        {split: [path for path, own in shards.items() if own == split] for split in sorted(set(shards.values()))},
        _with_keyword({path: name.split("/")[:-1] for path, name in names.items()}, "$|"),
        _with_keyword({path: name.split("/")[-1:] for path, name in names.items()}, ""),
        {"train": list(found)},
    ]
    splits = next(way for way in ways if way)
    in_order = {name: splits[name] for name in (*KEYWORDS, *splits) if name in splits}
    named = {path for files in splits.values() for path in files}
    return in_order, [path for path in found if path not in named]


def _with_keyword(parts: Mapping[Path, Sequence[str]], end: str) -> Splits:
    """The files one of whose parts has the keyword of a split, between separators."""
    splits = {}
    for split, words in KEYWORDS.items():
        pattern = re.compile(rf"(?:^|[{SEPARATORS}])(?:{'|'.join(words)})(?:{end}[{SEPARATORS}])")
        if files := [path for path, names in parts.items() if any(map(pattern.search, names))]:
            splits[split] = files
    return splits


def _fixed_part(pattern: Path) -> Path:
    """The folder in front of the first part of a pattern with a wildcard."""
    return Path(*pattern.parts[: next(number for number, part in enumerate(pattern.parts) if has_magic(part))])
