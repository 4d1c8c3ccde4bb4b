"""The device used where the caller names none, and the name of what computes."""

import os
import platform
from pathlib import Path

import torch
from torch import distributed


def default_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU), else the CPU; one per process where several were started.

    Raises:
        ValueError: This machine has fewer accelerators than processes.
    """
    if "LOCAL_RANK" in os.environ and not (distributed.is_available() and distributed.is_initialized()):
        return _own_device(int(os.environ["LOCAL_RANK"]))
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device


def hardware_name() -> str:
    """The name of the GPU that torch finds, else the processor's, whose rounding differs from that of another kind.

    Virtual machines often say the make alone, so family and model stand behind it where Linux has them.
    """
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """The processor and the widest instructions that torch uses, such as "AMD EPYC, family 26, model 2, AVX512"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = about.get("model name", platform.processor() or platform.machine())
    kind = [f"{key.split()[-1]} {about[key]}" for key in ("cpu family", "model") if key in about]
    return ", ".join([name, *kind, torch.backends.cpu.get_cpu_capability()])


def _own_device(index: int) -> torch.device:
    """The device of a process that was started with others; accelerate would make a process group for it."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    if index >= (count := torch.accelerator.device_count()):
        raise ValueError(f"more processes were started on this machine than it has devices: start {count}")
    if index:
        torch.get_device_module(found).set_device(index)
    return torch.device(found.type, index)
