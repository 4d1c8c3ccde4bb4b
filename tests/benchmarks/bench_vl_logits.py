"""Memory and time of the loss of eight rows with pictures of different sizes, at a vocabulary of 152,000.

    python -m tests.benchmarks.bench_vl_logits

A tiny Qwen2-VL computes the losses of rows whose answers have 82 tokens, and their gradients, in three ways: with the
logits of all columns in which some row has a target, with those of target tokens alone, and these in chunks. Memory is
that of the processor's allocations, beyond the model's.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.head import TargetLosses, cross_entropy, target_logits
from tests.shared.data.vlm_rows import save_noise
from tests.shared.peaks import peak_bytes
from tests.shared.vl import tiny_vlm as tiny

VOCABULARY, ROWS, TOKENS, ROUNDS = 152_000, 8, 82, 3
Loss = Callable[[Any, Tensor], Tensor]


def prepared(folder: Path) -> tuple[VLM, dict[str, Tensor], Tensor]:
    """The model and a batch of rows, whose pictures grow."""
    vlm = VLM(VLMModelConfig(path=str(tiny.build("qwen2_vl", folder / "model")), max_pixels=1 << 20))
    vlm.model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    vlm.model.requires_grad_(False)
    vlm.model.model.language_model.layers.requires_grad_(True)
    examples = []
    for row in range(ROWS):
        save_noise(folder / f"{row}.png", row, 168, 280 * (row + 1))
        examples.append(Example(str(row), (f"{row}.png",), "What is it?", ("a " * TOKENS,), (1.0,)))
    rows = [vlm.rows.row("vqa", example, str(folder), example.answers[0]) for example in examples]
    for row in rows:
        row.labels[: len(row.labels) - TOKENS] = IGNORED
    inputs, labels = vlm.rows.collate(rows)
    return vlm, dict(inputs), labels


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        vlm, inputs, labels = prepared(Path(folder))
    form, model = vlm.network.form, vlm.model
    losses = TargetLosses(form, model)

    def of_columns(inputs: Any, labels: Tensor) -> Tensor:
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        targets = labels[:, 1:][:, columns]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def of_tokens(inputs: Any, labels: Tensor) -> Tensor:
        return cross_entropy(*target_logits(form, model, inputs, labels)).sum()

    def in_chunks(inputs: Any, labels: Tensor) -> Tensor:
        return losses(inputs, labels)[0].sum()

    learned = labels[:, 1:] != IGNORED
    print(f"{int(learned.sum())} target tokens, {ROWS * int(learned.any(0).sum())} logits of their columns")
    print("way                  loss       peak   time")
    for name, loss in {"columns": of_columns, "target tokens": of_tokens, "in chunks": in_chunks}.items():
        print(f"{name:<15}  {measured(loss, inputs, labels)}")


def measured(loss: Loss, inputs: Any, labels: Tensor) -> str:
    """The loss, the peak of memory of it and its gradients, and the median of their times."""
    values, times = [], []

    def step() -> None:
        value = loss(inputs, labels)
        value.backward()
        values.append(float(value.detach()))

    peak = peak_bytes(step)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return f"{values[0]:.3f}  {peak / 1e6:6,.0f} MB  {statistics.median(times):.2f} s"


if __name__ == "__main__":
    main()
