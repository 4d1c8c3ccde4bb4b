"""Result files in the form of PEFT's `method_comparison`, whose readers take ours, too."""

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from dora_mm.utils.atomic import write_text
from tests.benchmarks.gpu import ROOT
from tests.benchmarks.gpu.run import installed

PEERS = ROOT / "tests/benchmarks/results/peers/peft"
NOT_ARGUMENTS = ("peft_type", "auto_mapping", "peft_version", "inference_mode")


@dataclass
class Trained:
    """What a training has measured, in PEFT's names and units: seconds and bytes."""

    status: str = "failed"  # "success", or "canceled"
    error_msg: str = ""
    train_time: float = 0.0  # with the preparation of inputs and the test, without validation, as PEFT counts it
    total_time: float = 0.0
    memory_max: int = 0
    memory_log: list[int] = field(default_factory=list)  # reserved after each step
    file_size: int = 0
    num_trainable_params: int = 0
    num_total_params: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def published(task: str, name: str) -> dict[str, Any]:
    """A result file of PEFT's own comparison."""
    return json.loads((PEERS / task / f"{name}.json").read_text())


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """The adapter of a result file, of its settings that this release of PEFT knows and that are set."""
    known = {each.name for each in fields(LoraConfig) if each.init} - set(NOT_ARGUMENTS)
    return LoraConfig(**{key: value for key, value in settings.items() if key in known and value not in (None, {}, [])})


def result(
    name: str, created: str, train_config: dict[str, Any], adapter: LoraConfig, trained: Trained, about: dict[str, Any]
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        name: Of the experiment.
        created: When the training began, as in ISO 8601.
        train_config: PEFT's settings of the training.
        adapter: The adapter that was trained.
        trained: The measurements.
        about: `model_info` and `dataset_info`: which revisions were read, None where that is not known.
    """
    log = trained.memory_log or [0]
    return {
        "run_info": {
            "created_at": created,
            "total_time": trained.total_time,
            "experiment_name": name,
            "peft_branch": None,  # a release, not a checkout
            "peft_worktree_is_dirty": None,
            "train_config": train_config,
            "peft_config": plain(adapter.to_dict()),
            "error_msg": trained.error_msg,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(np.mean(log)),
            "accelerator_memory_max": trained.memory_max,
            "accelerator_memory_reserved_99th": int(np.percentile(log, 99)),
            **{key: value for key, value in asdict(trained).items() if key in ("train_time", "file_size")},
            "num_trainable_params": trained.num_trainable_params,
            "num_total_params": trained.num_total_params,
            "status": trained.status,
            "metrics": trained.metrics,
        },
        "meta_info": {
            **about,
            "package_info": packages("diffusers" if "resolution" in train_config else "bitsandbytes"),
        }
        | {"system_info": system(), "pytorch_info": torch.__config__.show()},
    }


def plain(value: Any) -> Any:
    """Settings as JSON has them: sets are sorted lists."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return sorted(value) if isinstance(value, set) else value


def packages(extra: str) -> dict[str, str | None]:
    """The versions of what a training ran with; a commit only where a checkout was imported, which ours alone is."""
    found: dict[str, str | None] = {}
    for name in ("transformers", "peft", "datasets", extra, "torch"):
        found |= {f"{name}-version": installed(name), f"{name}-commit-hash": None}
    return found | {"dora_mm-version": installed("dora_mm"), "dora_mm-commit-hash": commit()}


def commit() -> str | None:
    """The commit of this checkout, None without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def system() -> dict[str, str]:
    """The machine, with its GPU."""
    names = ("system", "release", "version", "machine", "processor")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none, a dry run"
    return {name: getattr(platform, name)() for name in names} | {"accelerator": gpu}


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a result file, which appears complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
