"""The sheets of a training as entries of a manifest: one every so many steps, and the last."""

import re
from pathlib import Path
from typing import Any

import yaml

from dora_mm.sampling.manifest import MANIFEST, ManifestEntry, read_manifest
from dora_mm.utils import yaml12
from dora_mm.utils.run_directory import CONFIG, RunDirectory

SHEET = re.compile(r"step-(\d+)\.png")


def read_pictures(path: Path) -> list[ManifestEntry]:
    """The pictures of a run: those of its manifest, or the sheets of a training.

    Raises:
        ValueError: It has neither, or its manifest is damaged.
    """
    sheets = [] if (path / MANIFEST).is_file() else training_sheets(path)
    return sheets or read_manifest(path)


def training_sheets(path: Path) -> list[ManifestEntry]:
    """The sheets of a training by step, the first of the untrained model; none where it is no training."""
    run = RunDirectory(path)
    config = _config(path)
    files = ((file, SHEET.fullmatch(file.name)) for file in run.samples.glob("*.png"))
    found = [(int(match[1]), file) for file, match in files if match]
    last = (config.get("train") or {}).get("steps") or max((step for step, _ in found), default=0)
    found += [(last, run.sheet)] if run.sheet.is_file() else []
    if not config or not found:
        return []
    sample = config.get("sample") or {}
    common = {
        "prompt": " | ".join(sample.get("prompts") or ()),
        **{name: sample.get(name) for name in ("negative_prompt", "steps", "guidance", "seeds")},
        "model": config["model"]["path"],
    }
    return [
        ManifestEntry(
            row=number,
            file=file.relative_to(path).as_posix(),
            status="done",
            batch=0,
            settings={**common, "step": step},
        )
        for number, (step, file) in enumerate(sorted(found), 1)
    ]


def _config(path: Path) -> dict[str, Any]:
    """The config of a training on pictures; empty where there is none."""
    try:
        found = yaml12.read((path / CONFIG).read_text(encoding="utf-8")).value
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and "train" in found and "sample" in found else {}
