"""The steps that both checks share: random adapters, how far results are apart, and a training that is resumed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_mm.cli import main
from dora_mm.core import adapted_layers

CLOSE = 1e-4  # of the largest number: results of float32 in another order
STEPS = 4  # of a training, of which the resumed one does half first
log = logging.getLogger(__name__)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-6))


def failures(checks: Iterable[Callable[[], Iterable[str]]]) -> list[str]:
    """The sentences of all checks; one that raises is a sentence, too."""
    found: list[str] = []
    for check in checks:
        name = check.__name__.replace("_", " ").strip()
        try:
            found += check()
        except Exception as error:  # of code that is being checked
            log.debug("%s", name, exc_info=True)
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def randomize(networks: Iterable[nn.Module]) -> None:
    """Gives fresh adapters values as of a training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (layer for network in networks for layer in adapted_layers(network).values()):
            assert layer.lora_B is not None  # of method dora, which has both
            assert layer.magnitude is not None
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
            layer.magnitude.mul_(1 + 0.1 * torch.randn(layer.magnitude.shape, generator=generator))


def write_images(folder: Path, sides: Mapping[str, tuple[int, int]]) -> Path:
    """Images of noise by name, (height, width) each."""
    folder.mkdir()
    for seed, (name, side) in enumerate(sides.items()):
        noise = np.random.default_rng(seed).integers(0, 256, (*side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def resume_failures(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Trains at once, and with a stop in the middle, and compares the files.

    Args:
        folder: An empty folder.
        config: The config of a training, without `train` and `output`.
    """
    weights = []
    for name, steps in (("whole", STEPS), ("half", STEPS // 2)):
        train = {"steps": steps, "batch_size": 2, "checkpoint_every": 2}
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({**config, "train": train, "output": str(folder / name)}), encoding="utf-8")
        commands = [["train", str(file)]]
        if steps < STEPS:
            commands.append(["train", "--resume", str(folder / name), "--set", f"train.steps={STEPS}"])
        for command in commands:
            if text := _failed(command):
                return [f"training: dora-mm {command[0]} {command[1]} fails: {text}"]
        (written,) = (folder / name / "adapter").glob("*.safetensors")
        weights.append(load_file(written))
    unbroken, resumed = weights
    other = [name for name in unbroken if name not in resumed or not torch.equal(unbroken[name], resumed[name])]
    if other:
        return [f"resume: {len(other)} tensors of a resumed training are not those of one at once, such as {other[0]}"]
    return (
        [] if any(tensor.any() for name, tensor in unbroken.items() if "lora_B" in name) else ["training: no B changes"]
    )


def _failed(command: list[str]) -> str:
    """The end of a command's output if it fails; else ""."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return output.getvalue()[-600:] if main(command) else ""
