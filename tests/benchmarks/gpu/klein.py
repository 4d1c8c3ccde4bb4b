"""The step of FLUX.2 klein for which PEFT publishes times of its own, eager and compiled: an entry of `make gpu`.

Two pictures of 512 px, LoRA of rank 64 on 80 modules (76,677,120 parameters), checkpointing. PEFT's own comparison has
0.757 s for its LoRA and 1.459 s for its DoRA on an L40S. The weights are random, which changes no time.
"""

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from dora_mm import targets as maps
from dora_mm.adapting import compiled
from tests.benchmarks.contenders import Model, can_compile, contending_layers, fixed_bases, set_layers
from tests.benchmarks.gpu.layers import STEP, WARM_UP
from tests.benchmarks.gpu.models import ADAPTED, bench_model, trainee_of
from tests.benchmarks.gpu.run import Run, compared, report
from tests.benchmarks.timing import alternate, seconds_of

BASE_4B: dict[str, Any] = {  # FLUX.2-klein-base-4B, 3,875,544,576 parameters
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
TINY: dict[str, Any] = BASE_4B | {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}
PUBLISHED = [  # what PEFT adapts of it: all of the blocks but `to_out` of the single ones
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv_mlp_proj", "linear_in", "linear_out"),
]
RANK, BATCH, SIDE, TOKENS = 64, 2, 512, 512


def run(run: Run) -> None:
    """Measures the contenders in turns, then each with its blocks compiled as `train.compile` does."""
    side, size, tokens = (64, TINY, 8) if run.dry else (SIDE, BASE_4B, TOKENS)
    name = f"FLUX.2 klein base 4B, {side} px, batch {BATCH}, checkpointing"
    build = partial(transformer, side=side, size=size, tokens=tokens)
    model = Model(name, build, PUBLISHED, rank=RANK, checkpointing=True)
    bench_model(run, model)
    gc.collect()
    if not run.dry and not can_compile(run.device):
        run.leave_out("what is compiled: torch.compile does not work here")
        return
    for contender in ADAPTED[: 2 if run.dry else None]:  # tracing takes most of a dry run's time
        if not run.is_cut(f"{contender}, compiled"):
            with run.trying(f"{contender}, compiled", name):
                compiled_step(run, model, contender)
        gc.collect()


def transformer(
    device: torch.device, dtype: torch.dtype, *, side: int, size: dict[str, Any], tokens: int
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """The transformer with random weights, and a loss of a batch."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    with torch.device(device):
        network: Any = Flux2Transformer2DModel(**size).requires_grad_(False)
        nn.Module.to(network, dtype)
        patches = torch.randn(BATCH, network.config.in_channels, side // 16, side // 16, dtype=dtype)
        text = torch.randn(BATCH, tokens, network.config.joint_attention_dim, dtype=dtype)
        inputs = {
            "hidden_states": patches.flatten(2).mT.contiguous(),
            "encoder_hidden_states": text,
            "timestep": torch.full((BATCH,), 0.5, dtype=dtype),
            "guidance": None,
            "img_ids": Flux2KleinPipeline._prepare_latent_ids(patches).to(device),
            "txt_ids": Flux2KleinPipeline._prepare_text_ids(text).to(device),
        }
    network.train().enable_gradient_checkpointing()
    return network, lambda: network(**inputs, return_dict=False)[0].float().square().mean()


def compiled_step(run: Run, model: Model, contender: str) -> None:
    """Measures a contender in a model of its own, whose blocks are compiled; alone, and so without ratios."""
    torch.manual_seed(0)
    network, loss = model.build(run.device, run.dtype)
    layers = contending_layers(network, model.targets, model.rank, run.contenders(contender))[contender]
    trainee = trainee_of(run, model, contender, network, loss, layers)
    set_layers(network, layers)
    compiler = {"backend": run.compiler} if run.dry else compiled.COMPILER
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(compiled, "COMPILER", compiler))
        compiled.compile_blocks({"transformer": network}, {"transformer": maps.find("flux2")})
        stack.enter_context(fixed_bases(layers.values()))
        for _ in range(run.rounds(WARM_UP)):
            trainee.step(seconds_of, run.device)
        steps = {f"{contender}, compiled": partial(trainee.step, seconds_of, run.device)}
        rows = compared(alternate(steps, run.rounds(9), int, run.is_late), model.name, model.rank, STEP, run.dtype)
    run.save(rows)
    report(rows)
