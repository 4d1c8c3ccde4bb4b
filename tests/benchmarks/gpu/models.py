"""Whole training steps, AdamW included, of SDXL's UNet, Z-Image's transformer and two LLaMAs: entries of `make gpu`.

All contenders adapt the same modules on top of the same random weights. They take turns in one model.
"""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from dora_mm import backend
from dora_mm import targets as maps
from dora_mm.adapting import compiled
from dora_mm.core import DoRASpec, adapter_parameters, fixed_parameters, inject
from tests.benchmarks.contenders import Model, can_compile, contending_layers, fixed_bases, kept, set_layers, trained
from tests.benchmarks.gpu.layers import PEAK, STEP, WARM_UP
from tests.benchmarks.gpu.run import Run, compared, report, show
from tests.benchmarks.timing import alternate, peak_bytes, seconds_of
from tests.shared.full_size import FULL_SIZE, SMALL_SIZE, random_unet

RANK = 16
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 5e5,
}
LLAMA_3_2_3B = LLAMA_3_8B | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}
LLAMA_TINY = LLAMA_3_8B | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
LLAMA_BYTES, FEW_BLOCKS = 40e9, 8  # that the whole model takes, 35 GB by estimate; blocks on a smaller card
ADAPTED = ("PEFT LoRA", "PEFT DoRA", "PEFT DoRA, fused", "our LoRA", "our DoRA")
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


def run_unet(run: Run) -> None:
    """Measures a step on one 1024 px image, with gradient checkpointing and without."""
    side, size = (64, SMALL_SIZE) if run.dry else (1024, FULL_SIZE)
    for checkpointing in (False, True)[run.dry :]:
        name = f"SDXL UNet, {side} px{', checkpointing' if checkpointing else ''}"
        build = partial(random_unet, side=side, checkpointing=checkpointing, size=size)
        model = Model(name, build, "sdxl-unet", checkpointing=checkpointing)
        if not run.is_cut(name):
            bench_model(run, model)


def run_z_image(run: Run) -> None:
    """Measures a step on one 1024 px image (4,096 tokens) and 64 tokens of text, with checkpointing."""
    side, size = (64, Z_IMAGE_TINY) if run.dry else (1024, {})
    build = partial(z_image_transformer, side=side, size=size)
    model = Model(f"Z-Image, {side} px, checkpointing", build, "z-image", checkpointing=True)
    bench_model(run, model)


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


def run_llama(run: Run) -> None:
    """Measures a step of LLaMA 3 8B on the rows and with the layers of configs/llm/llama3_8b.yaml, without dropout."""
    size, rows, length = (LLAMA_TINY, 2, 8) if run.dry else (LLAMA_3_8B, 16, 256)
    if not run.dry and torch.cuda.mem_get_info(run.device)[0] < LLAMA_BYTES:
        run.leave_out(f"all but {FEW_BLOCKS} of its 32 blocks: fewer than {LLAMA_BYTES / 1e9:.0f} GB are free")
        size = size | {"num_hidden_layers": FEW_BLOCKS}
    name = f"LLaMA 3 8B, {size['num_hidden_layers']} blocks, {rows} rows of {length} tokens, checkpointing"
    build = partial(random_llama, size=size, rows=rows, length=length)
    adapted = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    bench_model(run, Model(name, build, adapted, rank=32, checkpointing=True))


def run_peft(run: Run) -> None:
    """Measures the step for which PEFT publishes times of its own: Llama-3.2-3B, q and v at rank 32, 4 rows of 768.

    Its method comparison has 0.117 s for LoRA and 0.141 s for DoRA on an L40S, with rows of some 210 tokens.
    """
    size, rows, length = (LLAMA_TINY, 2, 8) if run.dry else (LLAMA_3_2_3B, 4, 768)
    build = partial(random_llama, size=size, rows=rows, length=length, checkpointing=False)
    bench_model(run, Model(f"Llama 3.2 3B, {rows} rows of {length} tokens", build, ["q_proj", "v_proj"], rank=32))


def random_llama(
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: dict[str, Any],
    rows: int,
    length: int,
    checkpointing: bool = True,
    kind: str = "llama",
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A Llama with random weights, which are made where they stay, and the loss of all tokens of some rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        config = AutoConfig.for_model(kind, **size)
        network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        ids = torch.randint(size["vocab_size"], (rows, length))
    network.train()
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network, lambda: network(input_ids=ids, labels=ids, use_cache=False).loss


def run_regional(run: Run) -> None:
    """Measures a step of the UNet with its blocks compiled, as `train.compile` does, in turns with one without."""
    if not run.dry and not can_compile(run.device):
        run.leave_out("all of it: torch.compile does not work here")
        return
    side, size = (64, SMALL_SIZE) if run.dry else (1024, FULL_SIZE)
    compiler = {"backend": run.compiler} if run.dry else compiled.COMPILER
    ours = (("our DoRA", "dora"), ("our LoRA", "lora"))[: 1 if run.dry else 2]  # tracing takes most of a dry run's time
    for contender, method in () if run.backend is None else ours:
        case = f"SDXL UNet, {side} px, regional"
        if run.is_cut(f"{contender}, {case}"):
            continue
        with run.trying(contender, case), contextlib.ExitStack() as stack:
            trainees = {}
            for name in (contender, f"{contender}, compiled"):
                trainees[name] = injected_unet(run, side, size, method)
                if name != contender:
                    stack.enter_context(mock.patch.object(compiled, "COMPILER", compiler))
                    compiled.compile_blocks({"unet": trainees[name].network}, {"unet": maps.find("sdxl-unet")})
                stack.enter_context(fixed_parameters(trainees[name].network, base_only=True))
            losses = [trainee.loss().item() for trainee in trainees.values()]  # the second one compiles here
            if abs(losses[1] - losses[0]) > 0.01 * losses[0]:
                run.fail(f"{contender}: the loss of compiled blocks is {losses[1]:.5f}, without it is {losses[0]:.5f}")
            for trainee in trainees.values():
                for _ in range(run.rounds(WARM_UP)):
                    trainee.step(seconds_of, run.device)
            steps = {name: partial(each.step, seconds_of, run.device) for name, each in trainees.items()}
            rows = compared(alternate(steps, run.rounds(9), int, run.is_late), case, RANK, STEP, run.dtype)
            run.save(rows)
            show(rows)


def injected_unet(run: Run, side: int, size: dict[str, Any], method: Any) -> "Trainee":
    """The UNet with our adapters in its attention."""
    torch.manual_seed(0)
    network, loss = random_unet(run.device, run.dtype, side=side, checkpointing=False, size=size)
    forward = backend.select(run.backend or "torch")
    inject(network, maps.find("sdxl-unet").select(), DoRASpec(RANK, RANK, method=method), forward=forward)
    parameters = list(adapter_parameters(network.train()).values())
    return Trainee("our", network, loss, {}, torch.optim.AdamW(parameters, lr=1e-4, fused=run.device.type == "cuda"), 1)


@dataclass
class Trainee:
    """One contender in a model that may be shared: its layers are put in before each step."""

    name: str
    network: nn.Module
    loss: Callable[[], torch.Tensor]
    layers: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    num_passes: int  # forward passes per step, in which our layers may keep what they compute

    def step(self, measure: Callable[..., float], device: torch.device) -> float:
        set_layers(self.network, self.layers)
        return measure(self.train, device)

    def train(self) -> None:
        with kept(self.name, self.network, self.num_passes):
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def bench_model(run: Run, model: Model) -> None:
    """Measures a step and its peak memory, of all contenders in one model, and saves both."""
    torch.manual_seed(0)
    network, loss = model.build(run.device, run.dtype)
    built: dict[str, Trainee] = {}  # all of them over the layers of the model, before any takes their place
    for name, build in run.contenders(*ADAPTED).items():
        with run.trying(name, model.name):
            layers = contending_layers(network, model.targets, model.rank, {name: build})[name]
            built[name] = trainee_of(run, model, name, network, loss, layers)
    trainees: dict[str, Trainee] = {}
    with contextlib.ExitStack() as stack:
        for name, trainee in built.items():
            with run.trying(name, model.name):
                stack.enter_context(fixed_bases(trainee.layers.values()))
                for _ in range(run.rounds(WARM_UP)):
                    trainee.step(seconds_of, run.device)
                trainees[name] = trainee
        steps = {name: partial(t.step, seconds_of, run.device) for name, t in trainees.items()}
        if not trainees:
            return
        rows = compared(alternate(steps, run.rounds(9), int, run.is_late), model.name, model.rank, STEP, run.dtype)
        run.save(rows)
        gc.collect()
        peaks = {name: [t.step(peak_bytes, run.device)] for name, t in trainees.items()}
    found = compared(peaks, model.name, model.rank, PEAK, run.dtype)
    run.save(found)
    report(rows + found)


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
    num_passes = 2 if model.checkpointing else 1
    return Trainee(name, network, loss, layers, optimizer, num_passes)
