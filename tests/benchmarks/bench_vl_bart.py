"""Times a training step of VL-BART against PEFT's, and answering in batches against one question at a time.

    python -m tests.benchmarks.bench_vl_bart [results/<machine>]

The size of bart-base with random weights in fp32, and the setting of the paper: q and v of all attentions at rank 128;
the visual embedding, biases and norms are trained as well. A pass has 8 questions with 20 tokens of text, 36 of an
image and answers of 4 tokens; the optimizer is AdamW. A step is one pass, or four with accumulated gradients
(train.gradient_accumulation_steps: 4). The contenders take turns.
"""

import copy
import functools
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
from transformers import BartConfig

from dora_mm import DoRASpec, adapter_parameters, fixed_parameters, inject
from dora_mm.adapting.networks import parameters_by_name
from dora_mm.config.models import VLBartModelConfig
from dora_mm.models.vl.vl_bart.loading import BART_BASE, config_of, from_bart, load_vl_bart
from dora_mm.models.vl.vl_bart.model import VLBart, VLInputs
from tests.benchmarks.results_table import time_row, write_times

ROUNDS = {1: 15, 4: 7}  # number of rounds, by the number of passes per step
TARGETS = r"model\.(encoder|decoder)\.layers\.\d+\.(self_attn|encoder_attn)\.(q|v)_proj"
EXTRA_TRAINABLE = ("visual_embedding", "biases", "norms")


def base() -> VLBart:
    torch.manual_seed(0)
    return from_bart(BartConfig(**BART_BASE), 50_465, 2048, "image").requires_grad_(False)


def embedded() -> VLBart:
    path = "samples/tiny-vl"
    return load_vl_bart(VLBartModelConfig(family="vl_bart", path=path), config_of(path).feature_dim, 0)[0]


def ours(model: VLBart):
    extra = parameters_by_name(model, EXTRA_TRAINABLE)
    inject(model, "bart", DoRASpec(rank=128, alpha=128))
    return model, [*extra.values(), *adapter_parameters(model).values()]


def peers(model: VLBart, *, use_dora: bool):
    extra = list(parameters_by_name(model, EXTRA_TRAINABLE).values())
    config = peft.LoraConfig(r=128, lora_alpha=128, target_modules=TARGETS, use_dora=use_dora)
    wrapped = peft.get_peft_model(model, config)
    return wrapped, [*extra, *(p for p in wrapped.parameters() if p.requires_grad)]


def frozen(model: VLBart):
    """No adapters, only the extra trainable parameters."""
    return model, list(parameters_by_name(model, EXTRA_TRAINABLE).values())


def inputs(batch: int, num_words: int = 50_000, feature_dim: int = 2048) -> VLInputs:
    ids = torch.randint(5, num_words, (batch, 20))
    return VLInputs(ids, torch.ones(batch, 56, dtype=torch.long), torch.randn(batch, 1, 49, feature_dim))


class Contender:
    def __init__(self, built):
        self.model, self.parameters = built
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, batch: VLInputs, labels: torch.Tensor, passes: int) -> float:
        started = time.perf_counter()
        with fixed_parameters(self.model, num_passes=passes):
            for _ in range(passes):
                self.model(**batch._asdict(), labels=labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


CONTENDERS = {
    "frozen": frozen,
    "PEFT LoRA": functools.partial(peers, use_dora=False),
    "PEFT DoRA": functools.partial(peers, use_dora=True),
    "our DoRA": ours,
}


def time_steps() -> dict[str, list[float]]:
    model = base()
    contenders = {name: Contender(build(copy.deepcopy(model))) for name, build in CONTENDERS.items()}
    batch, labels = inputs(8), torch.randint(5, 50_000, (8, 4))
    times: dict[str, list[float]] = {label(name, passes): [] for passes in ROUNDS for name in CONTENDERS}
    for passes, rounds in ROUNDS.items():
        for turn in range(rounds + 2):
            for name in CONTENDERS if turn % 2 else reversed(CONTENDERS):
                seconds = contenders[name].step(batch, labels, passes)
                if turn >= 2:
                    times[label(name, passes)].append(seconds)
    return times


def label(name: str, passes: int) -> str:
    return name if passes == 1 else f"{name}, {passes} passes"


def time_answers(name: str, model: VLBart) -> dict[str, list[float]]:
    model.eval()
    batch = inputs(32, model.config.vocab_size, model.config.feature_dim)
    sizes = {f"{name}, one batch": 32, f"{name}, one by one": 1}
    times: dict[str, list[float]] = {case: [] for case in sizes}
    for _ in range(5):
        for case, size in sizes.items():
            started = time.perf_counter()
            for start in range(0, 32, size):
                model.answer_ids(VLInputs(*(part[start : start + size] for part in batch)), max_length=6)
            times[case].append(time.perf_counter() - started)
    return times


def main(folder: Path | None) -> None:
    models = {"32 answers": base(), "32 answers, embedded model": embedded()}
    answers = {name: time_answers(name, model) for name, model in models.items()}
    times = {**time_steps(), **{name: found for both in answers.values() for name, found in both.items()}}
    rows = [time_row(name, found) for name, found in times.items()]
    for row in rows:
        print("{name:<42} {median_s:8.3f} s  ({min_s:.3f} to {max_s:.3f})".format(**row))
    for passes in ROUNDS:
        for peer in ("PEFT DoRA", "PEFT LoRA"):
            pairs = zip(times[label(peer, passes)], times[label("our DoRA", passes)], strict=True)
            ratios = [theirs / ours for theirs, ours in pairs]
            spread = f"by round {min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{label(peer, passes)} / our DoRA: {statistics.median(ratios):.3f} ({spread})")
    for name, both in answers.items():
        batched, single = (statistics.median(found) for found in both.values())
        print(f"{name}: one by one / batched {single / batched:.2f}")
    if folder is not None:
        write_times(folder, "vl_bart", rows, "peft")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
