"""Times a training step of a vision-language model against the same step with PEFT's layers, and batched answers.

    python -m samples.build tiny-vlm
    python -m tests.benchmarks.bench_vlm build/tiny-vlm [results/<machine>]

All linear layers of the language model are adapted, at rank 8 with batches of 4 and at rank 16 with batches of 8. A
step is a batch of questions of VQA on one picture each, with its forward and backward pass and AdamW; the contenders
take turns in one process, on one thread and on two. All have the loss of train_vl, which computes logits where
something is learned, so that the layers alone differ.
"""

import copy
import itertools
import statistics
import sys
import time
from pathlib import Path

import peft
import torch

from dora_mm import fixed_parameters
from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM, VLMBatch
from tests.benchmarks.results_table import time_row, write_times

ROUNDS, NEW_TOKENS = 9, 16
THREADS = (1, 2)
STEPS = ((8, 4), (16, 8))  # (rank, batch)
LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VQA = SourceConfig(
    format="vqa_v2",
    file="samples/vl/vqa/v2_OpenEnded_mscoco_val2014_questions.json",
    annotations="samples/vl/vqa/v2_mscoco_val2014_annotations.json.gz",
    images="samples/vl/images",
    limit=32,
)


class Ours:
    """Trains with the code of train_vl."""

    def __init__(self, folder: str, rank: int, method: str):
        self.vlm = VLM(VLMModelConfig(path=folder))
        settings = {"rank": rank, "method": method, "parts": ["text.attn", "text.mlp"]}
        config = VLAdapterConfig.model_validate(settings)
        self.parameters = list(
            adapt(self.vlm.networks, self.vlm.target_maps, config, seed=0, backend="torch").parameters.values()
        )
        self.model = self.vlm.model.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, batch: VLMBatch) -> float:
        started = time.perf_counter()
        with fixed_parameters(self.model, num_passes=1):
            self.vlm.loss(batch, torch.Generator()).mean.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


class Theirs(Ours):
    """Trains PEFT's layers, which get_peft_model puts into the same model, with the same loss."""

    def __init__(self, folder: str, rank: int, *, use_dora: bool):
        self.vlm = VLM(VLMModelConfig(path=folder))
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, use_dora=use_dora)
        self.model = peft.get_peft_model(self.vlm.model, config).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)


def time_steps(folder: str, examples: list[Example], rank: int, size: int) -> dict[str, list[float]]:
    contenders = {
        "PEFT LoRA": Theirs(folder, rank, use_dora=False),
        "PEFT DoRA": Theirs(folder, rank, use_dora=True),
        "our LoRA": Ours(folder, rank, "lora"),
        "our DoRA": Ours(folder, rank, "dora"),
    }
    targets = [(example.answers[0], 1.0) for example in examples[:size]]
    batch = contenders["our DoRA"].vlm.batch("vqa", examples[:size], VQA.images, targets)
    ((inputs, labels, _),) = batch.groups
    shape = f"{tuple(inputs['input_ids'].shape)} tokens, {int((labels != IGNORED).sum())} with loss"
    print(f"a step at rank {rank} has {shape}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 2):
        for name in contenders if turn % 2 else reversed(contenders):
            seconds = contenders[name].step(copy.copy(batch))
            if turn >= 2:
                times[name].append(seconds)
    for name in ("PEFT DoRA", "our LoRA", "our DoRA"):
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["PEFT LoRA"], strict=True)]
        print(f"{name} / PEFT LoRA: {statistics.median(ratios):.3f} (by round {min(ratios):.3f} to {max(ratios):.3f})")
    return {f"rank {rank}, batch {size}: {name}": found for name, found in times.items()}


def time_answers(folder: str, examples: list[Example], max_new_tokens: int) -> dict[str, list[float]]:
    """Until all have max_new_tokens (no answer ends before), which is what batches of long answers cost."""
    vlm = VLM(VLMModelConfig(path=folder))
    answers = VLMAnswers(vlm.prompts, vlm.network)
    settings = answers.settings(max_new_tokens, 1)
    settings.min_new_tokens = max_new_tokens
    times: dict[str, list[float]] = {f"{max_new_tokens} tokens, {how}": [] for how in ("batches of 8", "one by one")}
    for _ in range(3):
        for name, size in zip(times, (8, 1), strict=True):
            started = time.perf_counter()
            for start in range(0, 16, size):
                answers.generate("vqa", settings, examples[start : start + size], VQA.images)
            times[name].append(time.perf_counter() - started)
    return times


def main(folder: str, results: Path | None) -> None:
    examples = list(open_table(VQA, Path("build/tables"), on_bad_data="stop"))
    times: dict[str, list[float]] = {}
    for threads, (rank, size) in itertools.product(THREADS, STEPS):
        torch.set_num_threads(threads)
        steps = time_steps(folder, examples, rank, size)
        times |= {f"threads {threads}, {name}": found for name, found in steps.items()}
    for max_new_tokens in (2, 4, NEW_TOKENS):
        times |= time_answers(folder, examples, max_new_tokens)
    rows = [time_row(name, found) for name, found in times.items()]
    for row in rows:
        print("{name:<44} {median_s:8.3f} s  ({min_s:.3f} to {max_s:.3f})".format(**row))
    for tokens in (2, 4, NEW_TOKENS):
        batched, single = (
            statistics.median(times[f"{tokens} tokens, {how}"]) for how in ("batches of 8", "one by one")
        )
        print(f"{tokens} tokens: one by one / batched {single / batched:.2f}")
    if results is not None:
        write_times(results, "vlm", rows, "peft")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
