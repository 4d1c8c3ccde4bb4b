"""A step of the language models for which NeMo AutoModel publishes LoRA's, in its columns: an entry of `make gpu`.

All linear layers of the blocks at rank 16, full sequences of random tokens, no checkpointing and no clipping, as there.
Its adapters have a dropout of 0.1, ours none; its kernels are of Transformer Engine, which is not used here. Random
weights change no time.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.benchmarks.contenders import Model, contending_layers, fixed_bases, kept, set_layers
from tests.benchmarks.gpu.layers import WARM_UP
from tests.benchmarks.gpu.models import ADAPTED, LLAMA_3_8B, LLAMA_TINY, Trainee, random_llama, trainee_of
from tests.benchmarks.gpu.run import Row, Run, name_of, show
from tests.benchmarks.timing import alternate, peak_bytes, seconds_of, summary

QWEN_2_5_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1e6,
}
MODELS = {"Llama3 8B": ("llama", LLAMA_3_8B), "Qwen2.5 7B": ("qwen2", QWEN_2_5_7B)}  # by AutoModel's names
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, GLOBAL_BATCH, MICRO_BATCH, LENGTH, ROUNDS = 16, 32, 2, 4096, 5


def run(run: Run) -> None:
    """Measures a step of each contender in turns, for each model."""
    for name, (kind, size) in MODELS.items():
        if not run.is_cut(name):
            bench(run, name, kind, LLAMA_TINY if run.dry else size)
        gc.collect()


def bench(run: Run, name: str, kind: str, size: dict[str, Any]) -> None:
    """Measures one model, and saves a row for each contender."""
    total, micro, length = (4, 2, 8) if run.dry else (GLOBAL_BATCH, MICRO_BATCH, LENGTH)
    torch.manual_seed(0)
    build = partial(random_llama, kind=kind, size=size, rows=micro, length=length, checkpointing=False)
    model = Model(name, build, PROJECTIONS, rank=RANK)
    network, loss = model.build(run.device, run.dtype)
    ready, peaks = {}, {}
    for contender, trainee in trainees_of(run, model, network, loss).items():
        step = partial(global_step, trainee, total // micro)
        with run.trying(contender, name), fixed_bases(trainee.layers.values()):
            for _ in range(run.rounds(WARM_UP)):
                step()
            peaks[contender] = peak_bytes(step, run.device)
            ready[contender] = (trainee, step)
    if not ready:
        return
    steps = {contender: partial(timed, step, trainee, run.device) for contender, (trainee, step) in ready.items()}
    times = alternate(steps, run.rounds(ROUNDS), int, run.is_late)
    shape = {"gpus": 1, "gbs": total, "mbs": micro, "lbs": micro, "ga": total // micro, "seq_length": length}
    rows = []
    for contender, seconds in times.items():
        tflop = model_flops(network.config, total, length, num_trained(ready[contender][0])) / 1e12
        row = {"model": name, **shape, "contender": contender, "dtype": name_of(run.dtype)}
        rows.append(row | rates(seconds, tflop, total * length) | {"peak_bytes": peaks[contender]})
    run.save(rows)
    show(rows)


def trainees_of(run: Run, model: Model, network: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, Trainee]:
    """The contenders, all of them over the layers of one model."""
    first_alone = run.dry and model.name != next(iter(MODELS))  # the interpreter takes most of a dry run's time
    found: dict[str, Trainee] = {}
    for contender, build in run.contenders(*ADAPTED[: 1 if first_alone else None]).items():
        with run.trying(contender, model.name):
            layers = contending_layers(network, model.targets, model.rank, {contender: build})[contender]
            found[contender] = trainee_of(run, model, contender, network, loss, layers)
    return found


def num_trained(trainee: Trainee) -> int:
    return sum(parameter.numel() for group in trainee.optimizer.param_groups for parameter in group["params"])


def global_step(trainee: Trainee, num_passes: int) -> None:
    """An optimizer step over all micro-batches."""
    set_layers(trainee.network, trainee.layers)
    with kept(trainee.name, trainee.network, num_passes):
        for _ in range(num_passes):
            (trainee.loss() / num_passes).backward()
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()


def timed(step: Any, trainee: Trainee, device: torch.device) -> float:
    with fixed_bases(trainee.layers.values()):
        return seconds_of(step, device)


def rates(seconds: list[float], tflop: float, num_tokens: int) -> Row:
    """AutoModel's last three columns for the median of some steps, with the quartiles of the seconds."""
    median, low, high = summary(seconds)
    found: Row = {"step_seconds": median, "low": low, "high": high, "repeats": len(seconds)}
    return found | {"tflops_per_gpu": tflop / median, "tokens_per_second_per_gpu": num_tokens / median}


def model_flops(config: Any, rows: int, length: int, num_trained: int) -> float:
    """The operations of a step of adapters, as AutoModel counts them (`flops_utils.llama3_flops`, `benchmark.py`).

    Those of forward, of the gradients of activations, and a third part for weights, in the share that is trained. The
    operations of the adapters themselves are not in it.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    share = config.num_key_value_heads / heads
    per_token = 12 * width**2 * (1 + share) + 18 * width * config.intermediate_size + 6 * length * width
    per_token = config.num_hidden_layers * per_token + 6 * width * config.vocab_size
    return rows * length * per_token * (2 + num_trained / num_weights(config)) / 3


def num_weights(config: Any) -> int:
    """The frozen parameters of the model, norms and biases left out."""
    width, key_value = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    block = 2 * width**2 + 2 * width * key_value + 3 * width * config.intermediate_size
    return config.num_hidden_layers * block + 2 * width * config.vocab_size
