"""`make bench`: times a DoRA layer, and complete training steps, against their peers on this machine.

All contenders of a case share one base weight and take turns in one process: in every round each runs once, after a
change of its parameters. The median over the rounds is reported with its quartiles.
"""

import argparse
import gc
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import peft
import torch
from torch import nn
from tqdm import tqdm

import dora_mm
from dora_mm.utils.devices import hardware_name
from dora_mm.utils.folders import new_folder
from tests.benchmarks.contenders import (
    CONTENDERS,
    Case,
    Contenders,
    Model,
    can_compile,
    change,
    compiled,
    contending_layers,
    fixed_bases,
    kept,
    set_layers,
    trained,
)
from tests.benchmarks.contenders import contenders as all_contenders
from tests.benchmarks.results_table import Result, plot, table, write_results
from tests.benchmarks.timing import alternate, peak_bytes, saved_bytes, seconds_of, summary
from tests.shared.full_size import random_unet

# (name, out, in, tokens, rank of the quick run). Tokens are those of a 1024 px image; cross-attention has 77 per image.
LAYERS = (
    ("SDXL 640", 640, 640, 4096, 16),
    ("SDXL 1280, 4096 tokens", 1280, 1280, 4096, 16),
    ("SDXL 1280, 1024 tokens", 1280, 1280, 1024, 16),
    ("SDXL cross-attention", 1280, 2048, 308, 16),
    ("bart-base", 768, 768, 1000, 128),
)
LLM = (("8B LLM, attention", 4096, 4096, 512, 16), ("8B LLM, up", 14336, 4096, 512, 16))
RANKS = (8, 16, 64, 128, 384)


def layer_cases(extent: str) -> list[Case]:
    """The layers to time.

    Args:
        extent: "quick": five shapes at one rank each; "default": these and the LLM's at two ranks; "all": at all ranks.
    """
    if extent == "quick":
        return [Case(*layer) for layer in LAYERS]
    ranks = RANKS if extent == "all" else (16, 128)
    return [Case(*layer[:4], rank) for layer in (*LAYERS, *LLM) for rank in ranks]


COMPILED = {f"{name}, compiled": compiled(CONTENDERS[name]) for name in ("PEFT LoRA", "PEFT DoRA")}


# --- one layer -------------------------------------------------------------------------------------------------------


def bench_layer(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    progress: tqdm,
    contenders: Contenders = CONTENDERS,
    autocast: bool = False,
) -> list[Result]:
    """Measures forward pass, forward and backward pass ("step"), saved memory and peak memory of every contender.

    Args:
        case: The layer.
        device: Where it runs.
        dtype: The dtype of the base weight and the input.
        repeats: The number of rounds.
        progress: Advanced by one after every round.
        contenders: Each builds its layer from the base layer and the rank.
        autocast: Whether forward passes run under autocast to bfloat16.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # a function that was compiled for eight sizes runs the next ones uncompiled
    base = nn.Linear(case.num_in, case.num_out, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(case.num_tokens, case.num_in, device=device, dtype=dtype).requires_grad_()
    dY = torch.randn(case.num_tokens, case.num_out, device=device, dtype=torch.bfloat16 if autocast else dtype)
    layers = {name: build(base, case.rank).to(device) for name, build in contenders.items()}
    results = []
    with fixed_bases(layers.values()):
        for measure in ("forward", "step"):
            runs = {
                name: partial(time_layer, under(autocast, layer), layer, x, dY if measure == "step" else None, device)
                for name, layer in layers.items()
            }
            for name, seconds in alternate(runs, repeats, progress.update).items():
                results.append(Result(case.name, case.rank, name, measure, *summary(seconds), len(seconds)))
        for name, layer in layers.items():
            forward = under(autocast, layer)
            saved = saved_bytes(partial(forward, x), layer, x)
            peak = peak_bytes(lambda forward=forward: forward(x).backward(dY), device)
            for measure, size in (("saved", saved), ("peak", peak)):
                results.append(Result(case.name, case.rank, name, measure, size, size, size, 1))
    return results


def under(autocast: bool, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, which runs under autocast to bfloat16 where that is wanted."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, torch.bfloat16)(function) if autocast else function


def time_layer(
    forward: Callable[..., torch.Tensor],
    layer: nn.Module,
    x: torch.Tensor,
    dY: torch.Tensor | None,
    device: torch.device,
) -> float:
    change(trained(layer))
    x.grad = None
    if dY is None:
        return seconds_of(lambda: forward(x), device)
    return seconds_of(lambda: forward(x).backward(dY), device)


# --- training steps --------------------------------------------------------------------------------------------


def bart(device: torch.device, dtype: torch.dtype):
    """bart-base, the language model of VL-BART: an input of 20 words and 36 regions, and an answer of 5 words."""
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.device(device):
        config = BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
                            encoder_attention_heads=12, decoder_attention_heads=12)  # fmt: skip
        model = BartForConditionalGeneration(config).requires_grad_(False).eval()
        inputs = torch.randn(16, 56, 768, dtype=dtype)
        labels = torch.randint(4, config.vocab_size, (16, 5))
    return model, lambda: model(inputs_embeds=inputs, labels=labels).loss


def llama(device: torch.device, dtype: torch.dtype):
    """LLaMA with one billion parameters, on 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                             num_key_value_heads=8, vocab_size=32000)  # fmt: skip
        model = LlamaForCausalLM(config).requires_grad_(False)
        ids = torch.randint(0, config.vocab_size, (1, 512))
    return model, lambda: model(ids, labels=ids).loss


ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj", "o_proj"]


def unet_model(side: int, *, passes: int = 1, checkpointing: bool = False) -> Model:
    suffix = (", checkpointing" if checkpointing else "") + (f", {passes} passes" if passes > 1 else "")
    build = partial(random_unet, side=side, checkpointing=checkpointing)
    return Model(f"SDXL UNet, {side} px{suffix}", build, "sdxl-unet", passes=passes, checkpointing=checkpointing)


def models(extent: str, device: torch.device) -> list[Model]:
    if extent == "quick":
        return []
    language = [
        Model("bart-base, 16 pictures", bart, ["q_proj", "v_proj"], 128),
        Model("LLaMA 1B, 512 tokens", llama, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ]
    if device.type == "cuda":
        return [unet_model(1024, checkpointing=True), *language]
    more = [unet_model(512, checkpointing=True), unet_model(256, passes=4, checkpointing=True)]
    return [unet_model(256), *language, *(more if extent == "all" else ())]


def bench_model(
    model: Model, device: torch.device, dtype: torch.dtype, repeats: int, progress: tqdm, autocast: bool = False
) -> list[Result]:
    """Measures a training step and its peak memory for every contender but the frozen base.

    All contenders adapt the same modules on top of the same weights; their layers are put into the model before each
    run.

    Args:
        model: The model.
        device: Where it runs.
        dtype: The dtype of the base weights.
        repeats: The number of rounds.
        progress: Advanced by one after every round.
        autocast: Whether forward passes run under autocast to bfloat16.
    """
    torch.manual_seed(0)
    network, loss = model.build(device, dtype)
    network.to(dtype)
    adapting = {name: build for name, build in CONTENDERS.items() if name != "frozen"}
    layers = contending_layers(network, model.targets, model.rank, adapting)

    forward = under(autocast, loss)

    def passes(name: str) -> None:
        with kept(name, network, model.passes * (2 if model.checkpointing else 1)):
            for _ in range(model.passes):
                forward().backward()

    def step(name: str, measure: Callable[..., float] = seconds_of) -> float:
        set_layers(network, layers[name])
        change([p for layer in layers[name].values() for p in trained(layer)])
        return measure(partial(passes, name), device)

    with fixed_bases(layer for adapted in layers.values() for layer in adapted.values()):
        found = alternate({name: partial(step, name) for name in layers}, repeats, progress.update)
        results = [Result(model.name, model.rank, name, "step", *summary(s), len(s)) for name, s in found.items()]
        for name in layers:
            gc.collect()
            size = step(name, peak_bytes)
            results.append(Result(model.name, model.rank, name, "peak", size, size, size, 1))
    return results


# --- the command -----------------------------------------------------------------------------------------------------

MIXED = "bfloat16_float32"  # of the base, of PEFT's adapters
REPEATS = {"quick": 15, "default": 9, "all": 15}
MODEL_REPEATS = {"quick": 0, "default": 7, "all": 7}


def main(given: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints the table, and writes results.csv, machine.json, table.md and times.png."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.bench_peers", description=(__doc__ or "").split("\n")[0]
    )
    extents = parser.add_mutually_exclusive_group()
    for name, what in (("quick", "only single layers, in under two minutes"), ("all", "all ranks")):
        extents.add_argument(f"--{name}", action="store_const", const=name, dest="extent", default="default", help=what)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", MIXED, "autocast"),
        help=f"bfloat16 is the default on a GPU; {MIXED} has weights in bfloat16 and PEFT's adapters in float32, as "
        "PEFT makes them; autocast is bfloat16 over weights in float32",
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="of all adapters; of single layers only")
    parser.add_argument("--output", metavar="FOLDER", help="a new folder; default: a numbered folder in runs/bench")
    arguments = parser.parse_args(given)
    try:
        folder = new_folder("bench", arguments.output)
    except ValueError as error:
        parser.error(str(error))
    measure(folder, arguments.extent, arguments.dtype, arguments.dropout)


def measure(folder: Path, extent: str, dtype: str | None, dropout: float = 0.0) -> None:
    """Measures everything.

    Args:
        folder: Where the results go.
        extent: "quick" (layers only, under two minutes on two cores), "default" (at most half an hour), or "all".
        dtype: The name of a torch dtype, MIXED or autocast; None selects float32 on a CPU and bfloat16 on a GPU.
        dropout: Of the adapters of single layers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    autocast = dtype == "autocast"
    found = torch.float32 if autocast else getattr(torch, dtype.partition("_")[0])
    cases, steps = layer_cases(extent), models(extent, device)
    contenders = all_contenders(dropout=dropout, in_float32=dtype == MIXED)
    contenders |= COMPILED if extent != "quick" and can_compile(device) else {}
    (folder / "machine.json").write_text(json.dumps(machine(device, dtype), indent=2) + "\n")
    results: list[Result] = []
    rounds = 2 * (REPEATS[extent] + 1) * len(cases) + (MODEL_REPEATS[extent] + 1) * len(steps)
    with tqdm(total=rounds, unit="round") as progress:
        for case in cases:
            progress.set_postfix_str(f"{case.name}, rank {case.rank}")
            results += bench_layer(case, device, found, REPEATS[extent], progress, contenders, autocast)
            write_results(folder / "results.csv", results)
        for model in steps:
            progress.set_postfix_str(model.name)
            results += bench_model(model, device, found, MODEL_REPEATS[extent], progress, autocast)
            write_results(folder / "results.csv", results)
            gc.collect()
    text = table(results, machine(device, dtype))
    (folder / "table.md").write_text(text)
    plot(results, machine(device, dtype), folder / "times.png")
    print(text)
    print(f"Results are in {folder}.")


def machine(device: torch.device, dtype: str) -> dict[str, str | int]:
    return {"device": hardware_name(), "threads": torch.get_num_threads(), "dtype": dtype, "torch": torch.__version__,
            "peft": peft.__version__, "dora_mm": dora_mm.__version__, "system": platform.system()}  # fmt: skip


if __name__ == "__main__":
    main()
