"""Whether each optimizer resumes in every bit on a GPU, those of 8 bits above all: an entry of `make gpu`."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_mm.config.training import OptimizerConfig
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.train.checkpoint import load_checkpoint, save_checkpoint
from dora_mm.train.optim import build_optimizer
from tests.benchmarks.gpu import is_there
from tests.benchmarks.gpu.run import Row, Run, show

STEPS, SAVED = 6, 3


def run(run: Run) -> None:
    """Trains a layer, and again from a checkpoint in the middle. A dry run leaves out what needs a GPU."""
    rows: list[Row] = []
    for name, kind in OPTIMIZERS.items():
        if run.dry and (kind.needs_gpu or kind.install):
            continue
        if not is_there(package := kind.import_path.partition(":")[0].partition(".")[0]):
            run.leave_out(f"{name}: it needs {package}")
            continue
        with run.trying("our loop", name), tempfile.TemporaryDirectory() as folder:
            whole, resumed = (trained(run, name, Path(folder), resume=resume) for resume in (False, True))
            differing = [key for key, value in whole.items() if not torch.equal(value, resumed[key])]
            if differing:
                run.fail(f"{name}: after resuming, other bits in {', '.join(differing)}")
            rows.append({"optimizer": name, "tensors": len(whole), "differing": len(differing)})
    run.save(rows)
    if rows:
        show(rows)


def trained(run: Run, name: str, folder: Path, *, resume: bool) -> dict[str, torch.Tensor]:
    """The weights and the state of the optimizer after all steps."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, device=run.device)  # enough numbers for a state of 8 bits
    parameters: dict[str, nn.Parameter] = dict(layer.named_parameters())
    optimizer: Any = build_optimizer(parameters, OptimizerConfig(name=name, lr=1.0 if name == "prodigy" else 0.01))  # type: ignore[arg-type]
    first = load_checkpoint(folder / f"step-{SAVED:06d}", parameters, {"optimizer": optimizer}) if resume else 0
    for step in range(first, STEPS):
        drawn = torch.Generator().manual_seed(step)
        x = torch.randn(32, 128, generator=drawn, device="cpu").to(run.device)
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if not resume and step + 1 == SAVED:
            save_checkpoint(folder, SAVED, parameters, {"optimizer": optimizer}, keep=1)
    found = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items() if value is not None}
    return found
