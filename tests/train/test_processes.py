"""Joining processes; two of them are in tests/pipelines/test_two_processes.py."""

import ast
import os
import re
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator

from dora_mm.config.training import TrainConfig
from dora_mm.train.processes import SWITCHES, join_processes, main_process_first

TRAIN = TrainConfig(steps=1, batch_size=1)


def test_a_single_process_is_the_main_one():
    accelerator = join_processes(TRAIN)
    assert accelerator.num_processes == 1
    with main_process_first(accelerator):
        assert accelerator.is_main_process


def test_processes_that_cannot_train_together_are_refused(monkeypatch):
    Accelerator(cpu=True)  # as on a device for which accelerate knows a single process only
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but on cpu only 1 can train together"):
        join_processes(TRAIN)


OTHERS = {
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    **dict.fromkeys(SWITCHES, "true"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_config_decides_and_not_the_variables_of_accelerate(name, monkeypatch, caplog):
    """One that accumulates divided the loss a second time; switches wrap the model in a second way."""
    monkeypatch.setenv(name, OTHERS[name])
    accelerator = join_processes(TRAIN)
    parameter = torch.nn.Parameter(torch.ones(()))
    accelerator.backward(parameter * 3)
    assert parameter.grad == 3
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend == "NO"
    assert accelerator.distributed_type == "NO"
    assert name not in os.environ or name not in SWITCHES
    (message,) = caplog.messages
    assert message.startswith(f"The config decides how to train, so these variables have no effect: {name}=")


def test_nothing_is_said_of_what_accelerate_launch_sets_as_the_config_does(monkeypatch, caplog):
    launched = {"MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "NO", "USE_CPU": "true", "USE_FSDP": "False"}
    for name, value in launched.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert join_processes(TRAIN.model_copy(update={"mixed_precision": "bf16"})).mixed_precision == "bf16"
    assert caplog.messages == []


MACHINE = {  # variables of accelerate that stay as they are, and why; a name with _ at its end is the start of several
    "ACCELERATE_USE_CPU": "which device computes is no key of a config",
    "ACCELERATE_TORCH_DEVICE": "which device computes is no key of a config",
    "ACCELERATE_CPU_AFFINITY": "the cores that a process runs on",
    "ACCELERATE_USE_SAGEMAKER": "how the processes were started",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "how the processes were started",
    "ACCELERATE_DEBUG_MODE": "compares the shapes of what processes send each other, and changes none",
    "ACCELERATE_DEBUG_RDV_FILE": "of accelerate's own tests of its launcher",
    "ACCELERATE_LOG_LEVEL": "messages of accelerate",
    "ACCELERATE_ENABLE_RICH": "tracebacks",
    "ACCELERATE_DYNAMO_": "settings of a backend that is not used",
    "ACCELERATE_FP8_": "of mixed precision fp8, which no config has",
    "ACCELERATE_DEEPSPEED_": "settings of a plugin that is not made",
    "ACCELERATE_CONFIG_DS_FIELDS": "settings of a plugin that is not made",
    "ACCELERATE_GRADIENT_CLIPPING": "read by DeepSpeed's plugin alone, which is not made",
    "ACCELERATE_ALLOW_CP_STANDALONE": "read with a ParallelismConfig alone, which is not made",
    "ACCELERATE_BYPASS_DEVICE_MAP": "leaves out an error for models on several devices, which prepare_model never gets",
}


def test_every_variable_that_accelerate_reads_is_known():
    """A release that reads another one needs a decision: is it the config's or the machine's?"""
    read, known = variables_of(Path(accelerate.__file__).parent), [*OTHERS, *MACHINE]
    assert [name for name in read if not any(is_meant(name, by) for by in known)] == []
    assert [by for by in known if not any(is_meant(name, by) or is_meant(by, name) for name in read)] == []


def is_meant(name: str, by: str) -> bool:
    return name.startswith(by) if by.endswith("_") else name == by


def variables_of(package: Path) -> list[str]:
    """Names of variables, and starts of such names, in all that a program may run: not in its commands and tests."""
    found = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in ("commands", "test_utils"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return sorted(text for text in found if re.fullmatch("ACCELERATE_[A-Z0-9_]+", text))
