"""Whole training steps, AdamW included: SDXL's UNet, Z-Image's transformer, blocks of an 8B LLM: entries of `make gpu`.

All contenders adapt the same modules on top of the same random weights. They take turns in one model.
"""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dora_mm.core import fixed_parameters
from tests.benchmarks.contenders import (
    CONTENDERS,
    Contenders,
    Model,
    can_compile,
    contending_layers,
    fixed_bases,
    set_layers,
    trained,
)
from tests.benchmarks.full_size import FULL_SIZE, SMALL_SIZE, random_unet
from tests.benchmarks.gpu_run import Row, Run, compared, many_compiled, report
from tests.benchmarks.timing import alternate, peak_bytes, seconds_of

DTYPE = torch.bfloat16
ADAPTED: Contenders = {name: build for name, build in CONTENDERS.items() if name != "frozen"}
# Llama-3.1-8B, four blocks of its 32. What stands before and after them is the same for all.
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Z-Image's transformer, where it differs from the defaults of diffusers' class, which are those of the published model.
Z_IMAGE_TINY: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 4, 8],
    "axes_lens": [600, 64, 64],
}
WARM_UP = 3  # a compiled layer that keeps something from one step to the next is compiled again in the second
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_unet(run: Run) -> None:
    """Measures a step on one 1024 px image, with gradient checkpointing and without, and writes unet.csv."""
    side, size = (64, SMALL_SIZE) if run.dry else (1024, FULL_SIZE)
    rows: list[Row] = []
    for checkpointing in (False, True):
        name = f"SDXL UNet, {side} px{', checkpointing' if checkpointing else ''}"
        build = partial(random_unet, side=side, checkpointing=checkpointing, size=size)
        model = Model(name, build, "sdxl-unet", checkpointing=checkpointing)
        if not run.is_cut(name):
            rows += bench_model(run, model, blocks=None)
            run.save("unet.csv", rows)


def run_z_image(run: Run) -> None:
    """Measures a step on one 1024 px image (4,096 tokens) and 64 tokens of text, with checkpointing: z_image.csv."""
    side, size = (64, Z_IMAGE_TINY) if run.dry else (1024, {})
    build = partial(z_image_transformer, side=side, size=size)
    model = Model(f"Z-Image, {side} px, checkpointing", build, "z-image", checkpointing=True)
    run.save("z_image.csv", bench_model(run, model, blocks=None))


def z_image_transformer(
    device: torch.device, dtype: torch.dtype, *, side: int, size: dict[str, Any]
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Z-Image's transformer with random weights, and a loss of one image."""
    from diffusers import ZImageTransformer2DModel

    with torch.device(device):
        network: Any = ZImageTransformer2DModel(**size).requires_grad_(False)
        nn.Module.to(network, dtype)
        image = torch.randn(network.config.in_channels, 1, side // 8, side // 8, dtype=dtype)
        text, time = torch.randn(64, network.config.cap_feat_dim, dtype=dtype), torch.full((1,), 0.5)
    network.train().enable_gradient_checkpointing()
    return network, lambda: network([image], time, [text], return_dict=False)[0][0].float().square().mean()


def run_llm(run: Run) -> None:
    """Measures a step on 2048 tokens, with all linear layers adapted, and writes llm.csv."""
    size, num_blocks, num_tokens = (LLAMA_TINY, 1, 24) if run.dry else (LLAMA_8B, 4, 2048)
    build = partial(llama_blocks, size=size, num_blocks=num_blocks, num_tokens=num_tokens)
    blocks = "layers"
    if not run.dry and not can_compile(run.device):
        run.leave_out("compiled blocks: torch.compile does not work here")
        blocks = None
    model = Model(f"8B LLM, {num_blocks} blocks, {num_tokens} tokens", build, LINEAR)
    with many_compiled():
        rows = bench_model(run, model, blocks)
    run.save("llm.csv", rows)


def llama_blocks(
    device: torch.device, dtype: torch.dtype, *, size: dict[str, Any], num_blocks: int, num_tokens: int
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Decoder blocks of a LLaMA with random weights, and a loss on embedded tokens."""
    from transformers import LlamaConfig, LlamaModel

    with torch.device(device):
        model = LlamaModel(LlamaConfig(**size, num_hidden_layers=num_blocks, vocab_size=8)).requires_grad_(False)
        nn.Module.to(model, dtype)
        embedded = torch.randn(1, num_tokens, size["hidden_size"], dtype=dtype)
    model.train()
    return model, lambda: model(inputs_embeds=embedded, use_cache=False).last_hidden_state.float().square().mean()


@dataclass
class Trainee:
    """One contender in a model that may be shared: its layers are put in before each step."""

    network: nn.Module
    loss: Callable[[], torch.Tensor]
    layers: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    num_passes: (
        int | None
    )  # forward passes per step within which our layers may keep what they computed; None for peers

    def step(self, measure: Callable[..., float], device: torch.device) -> float:
        set_layers(self.network, self.layers)
        return measure(self.train, device)

    def train(self) -> None:
        kept: Any = contextlib.nullcontext()
        if self.num_passes:
            kept = fixed_parameters(self.network, num_passes=self.num_passes)
        with kept:
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def bench_model(run: Run, model: Model, blocks: str | None) -> list[Row]:
    """Measures a step and its peak memory.

    Args:
        run: The entry.
        model: The model.
        blocks: The path of a list of blocks, which are compiled one by one for further contenders; None compiles none.
    """
    trainees: dict[str, Trainee] = {}
    with contextlib.ExitStack() as stack:
        for name, trainee in candidates(run, model, blocks):
            stack.enter_context(fixed_bases(trainee.layers.values()))
            with run.trying(name, model.name):
                for _ in range(run.rounds(WARM_UP)):
                    trainee.step(seconds_of, run.device)
                trainees[name] = trainee
        steps = {name: partial(t.step, seconds_of, run.device) for name, t in trainees.items()}
        times = alternate(steps, run.rounds(11), int, run.is_late)
        gc.collect()
        peaks = {name: [t.step(peak_bytes, run.device)] for name, t in trainees.items()}
    rows = compared(times, model.name, model.rank, "step", DTYPE)
    rows += compared(peaks, model.name, model.rank, "peak", DTYPE)
    report(rows)
    return rows


def candidates(run: Run, model: Model, blocks: str | None):
    """Yields contenders by name: first all in one model, then, with `blocks`, each in a compiled model of its own."""
    network, loss = built(run, model)
    for name, layers in contending_layers(network, model.targets, model.rank, ADAPTED).items():
        yield name, trainee_of(run, model, name, network, loss, layers)
    if blocks is None:
        return
    for name, build in run.to_compile(ADAPTED).items():
        if run.is_cut(f"{name}, compiled, {model.name}"):
            continue
        network, loss = built(run, model)
        layers = contending_layers(network, model.targets, model.rank, {name: build})[name]
        set_layers(network, layers)
        for block in network.get_submodule(blocks).children():
            block.compile(dynamic=False, backend=run.compiler)
        yield f"{name}, compiled", trainee_of(run, model, name, network, loss, layers)


def built(run: Run, model: Model) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    return model.build(run.device, DTYPE)


def trainee_of(
    run: Run,
    model: Model,
    name: str,
    network: nn.Module,
    loss: Callable[[], torch.Tensor],
    layers: dict[str, nn.Module],
) -> Trainee:
    parameters = [p for layer in layers.values() for p in trained(layer)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=run.device.type == "cuda")
    num_passes = (2 if model.checkpointing else 1) if name.startswith("our") else None
    return Trainee(network, loss, layers, optimizer, num_passes)
