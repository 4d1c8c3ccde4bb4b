"""Small models that PEFT has adapted, with trained values, and what they compute."""

import copy
import inspect

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_mm
from tests.shared.reference import relative_error

KINDS = {
    "Linear": lambda: nn.Linear(160, 128),
    "Linear without bias": lambda: nn.Linear(160, 128, bias=False),
    "Conv1D": lambda: Conv1D(128, 160),
    "Embedding": lambda: nn.Embedding(160, 128, padding_idx=3),
    "Conv1d": lambda: nn.Conv1d(40, 160, 3, stride=2, padding=1),
    "Conv2d": lambda: nn.Conv2d(16, 128, 3, padding=1),
    "Conv3d": lambda: nn.Conv3d(6, 104, 3, stride=2, bias=False),
}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float64: 2.0**-53}


def adapted(kind, adapters=1, *, upcast=True, dtype=torch.float32, **settings):
    """A PeftModel of one layer, `layer`, with trained adapters `0`, `1`, ..., all active."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layer", KINDS[kind]() if isinstance(kind, str) else kind)
    given = {"r": 8, "lora_alpha": 16, "use_dora": True, "fan_in_fan_out": kind == "Conv1D"}
    given |= {"init_lora_weights": kind == "Embedding", **settings}
    config = peft.LoraConfig(target_modules=["layer"], **given)
    model = peft.get_peft_model(net.to(dtype), config, adapter_name="0", autocast_adapter_dtype=upcast)
    for number in range(1, adapters):
        add_adapter(model, str(number), config, upcast)
    model.base_model.set_adapter([str(number) for number in range(adapters)])
    train(model)
    return model


def add_adapter(model, name, config, upcast):
    if "autocast_adapter_dtype" in inspect.signature(model.add_adapter).parameters:
        model.add_adapter(name, config, autocast_adapter_dtype=upcast)
    else:  # PEFT 0.18
        model.add_adapter(name, config)
        model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=upcast)


def train(model, seed=0):
    """Draws what differs from a fresh adapter."""
    drawn = torch.Generator().manual_seed(seed)
    own = [(name, parameter) for name, parameter in model.named_parameters() if "lora" in name]
    with torch.no_grad():
        for name, parameter in own:
            noise = torch.randn(parameter.shape, generator=drawn)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif not parameter.any():
                parameter.add_(0.05 * noise)


def fused(model):
    """A copy that runs fused."""
    twin = copy.deepcopy(model)
    report = dora_mm.fuse_peft(twin)
    assert report.fused
    assert not report.stock
    return twin


def example(kind, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(1)
    if kind == "Embedding":
        return torch.randint(0, 160, (3, 50), generator=drawn)
    channels = {"Conv1d": 40, "Conv2d": 16, "Conv3d": 6}.get(kind)
    size = (3, channels, *(9,) * int(kind[4])) if channels else (3, 50, 160)
    return torch.randn(size, generator=drawn).to(dtype).requires_grad_()


def computed(model, x, autocast=False, run=None):
    """The output, and the gradients of the input and of all trained parameters."""
    inputs = [x] if x.requires_grad else []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = (model if run is None else run)(x)
    dY = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, own, dY.to(y.dtype), allow_unused=True)  # PEFT 0.19 trains all adapters
    return [y.detach(), *(torch.zeros_like(p) if t is None else t for p, t in zip(own, found, strict=True))]


def assert_as_exact(found, theirs, exact):
    """The bound of every implementation of the layer, with PEFT's own for the formula in the same dtypes."""
    for ours, own, right in zip(found, theirs, exact, strict=True):
        assert ours.dtype == own.dtype
        assert ours.shape == own.shape
        assert relative_error(ours, right) <= 2 * relative_error(own, right) + UNIT[ours.dtype]
