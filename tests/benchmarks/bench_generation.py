"""Times a pass in eval mode: one token, as in decoding, and a prompt, by the bare model and with each kind of adapter.

    python -m tests.benchmarks.bench_generation [--rounds N] [--tokens N ...] [--label NAME] [--output FOLDER]

A Llama of 4 layers, 768 wide, adapters of rank 16 in all linear layers, without a key-value cache, on one thread. All
contenders share base weights and take turns in one process. LABEL.csv gets the median of the rounds with its quartiles,
and its ratio to PEFT's LoRA.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import dora_mm
from dora_mm.utils.devices import hardware_name
from tests.benchmarks.results_table import write_rows

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 1000}
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {  # dtype of the base, whether PEFT's adapters are cast up to float32, as it does unless told otherwise
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, adapters in float32": (torch.bfloat16, True),
}


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=12, num_key_value_heads=12)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def with_peft(dtype: torch.dtype, upcast: bool, use_dora: bool) -> nn.Module:
    config = peft.LoraConfig(r=RANK, use_dora=use_dora, target_modules=TARGETS)
    return trained(peft.get_peft_model(llama(dtype), config, autocast_adapter_dtype=upcast))


def fused(dtype: torch.dtype, upcast: bool) -> nn.Module:
    model = with_peft(dtype, upcast, use_dora=True)
    dora_mm.fuse_peft(model)
    return model


def ours(dtype: torch.dtype, merge: bool) -> nn.Module:
    model = llama(dtype)
    dora_mm.inject(model, targets=TARGETS, spec=dora_mm.DoRASpec(rank=RANK))
    trained(model)
    if merge:
        dora_mm.merge(model)
    return model


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """B differs from 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


Context = Callable[[], contextlib.AbstractContextManager[Any]]


def contenders(kind: str) -> dict[str, tuple[nn.Module, Context]]:
    """The models by name, each with the context that its passes are made in."""
    dtype, upcast = DTYPES[kind]
    models = {
        "bare model": llama(dtype),
        "PEFT LoRA": with_peft(dtype, upcast, use_dora=False),
        "PEFT DoRA": with_peft(dtype, upcast, use_dora=True),
        "PEFT DoRA in DoraCaching": with_peft(dtype, upcast, use_dora=True),
        "PEFT DoRA, fused": fused(dtype, upcast),
        "our DoRA": ours(dtype, merge=False),
        "our DoRA, merged": ours(dtype, merge=True),
    }
    caching = getattr(peft.helpers, "DoraCaching", contextlib.nullcontext)
    return {name: (model, caching if "Caching" in name else contextlib.nullcontext) for name, model in models.items()}


def measure(kind: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    ids, models = torch.randint(0, SIZES["vocab_size"], (1, tokens)), contenders(kind)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    passes = 3 if tokens < 16 else 1
    with torch.no_grad():
        for _ in range(rounds):
            for name, (model, context) in models.items():
                with context():
                    model(ids, use_cache=False)  # fills a cache that is emptied where its context ends
                    start = time.perf_counter()
                    for _ in range(passes):
                        model(ids, use_cache=False)
                    seconds[name].append((time.perf_counter() - start) / passes)
    base = statistics.median(seconds["PEFT LoRA"])
    return [row(kind, tokens, name, found, base) for name, found in seconds.items()]


def row(kind: str, tokens: int, name: str, seconds: list[float], base: float) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "dtype": kind, "tokens": tokens, "contender": name, "ms": f"{1e3 * median:.2f}", "low": f"{1e3 * low:.2f}",
        "high": f"{1e3 * high:.2f}", "ratio": f"{median / base:.2f}", "rounds": len(seconds),
        "machine": hardware_name(), "cores": os.cpu_count(), "torch": torch.__version__, "peft": peft.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--label", default="now", help="the name of the CSV file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "generation")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in DTYPES:
        for tokens in given.tokens:
            rows += measure(kind, tokens, given.rounds)
            for each in rows[-7:]:
                print("  ".join(str(value) for value in list(each.values())[:7]), flush=True)
    write_rows(given.output / f"{given.label}.csv", rows)


if __name__ == "__main__":
    main()
