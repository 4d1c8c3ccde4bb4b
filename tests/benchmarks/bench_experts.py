"""Times a training step of a mixture of experts whose experts are adapted, against PEFT's LoRA on the same parameters.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_experts [results/experts/<machine>.csv]

"layer" is the experts of one layer of Qwen3-VL-30B-A3B at their sizes: 128 experts, 8 for each token; a step is its
forward and backward pass with a given gradient. "model" is a small text model of the same class with random weights,
and a sum as its loss. All contenders of a case share one set of base weights and take turns in one process; the trained
parameters change before each step, as in training. The product of the base is `grouped_mm`, which transformers takes.
PEFT's DoRA refuses such parameters. A and B of its LoRA have the dtype of the base, in which it is fastest, and ours
float32. "saved" are the bytes that autograd keeps from the forward pass, "peak" is memory at the peak of a step, both
beyond weights. Needs 12 GB in float32.
"""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts, Qwen3VLMoeTextModel

from dora_mm import backend
from dora_mm.core import TORCH, DoRASpec, Forward, inject
from tests.benchmarks.contenders import change, fixed_bases, kept, trained
from tests.benchmarks.gpu.run import Run, compared, report
from tests.benchmarks.results_table import write_times
from tests.benchmarks.timing import alternate, peak_bytes, saved_bytes, seconds_of

ROUNDS, RANK, CPU = 5, 16, torch.device("cpu")
TARGETS = ("experts.gate_up_proj", "experts.down_proj")
CONTENDERS = ("frozen", "PEFT LoRA", "our LoRA", "our DoRA")
DTYPES = (torch.float32, torch.bfloat16)
REAL = Qwen3VLMoeTextConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
SMALL = Qwen3VLMoeTextConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32, num_experts=16, num_experts_per_tok=4,
)  # fmt: skip


class Holder(nn.Module):
    """The experts of a layer, with a router whose choice is random, and the same for every contender."""

    def __init__(self, config: Qwen3VLMoeTextConfig, experts: nn.Module):
        super().__init__()
        self.config, self.experts = config, experts

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.Generator().manual_seed(0)
        scores = torch.rand(len(x), self.config.num_experts, generator=stream)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        return self.experts(x, chosen.to(x.device), (weights / weights.sum(1, keepdim=True)).to(x))


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: For the rows.
        config: The sizes.
        num_tokens: The rows of x.
        is_model: Whether it is the text model; otherwise the experts of a layer.
    """

    name: str
    config: Qwen3VLMoeTextConfig
    num_tokens: int
    is_model: bool = False

    def build(self, dtype: torch.dtype, device: torch.device = CPU) -> Callable[[], nn.Module]:
        """Returns what builds modules over the same base weights."""
        torch.manual_seed(0)
        self.config._experts_implementation = "grouped_mm"
        first = self.module().to(device, dtype)
        for name, parameter in first.named_parameters():
            parameter.requires_grad_(False)
            if "norm" not in name:
                parameter.normal_(std=0.02)
        weights = dict(first.named_parameters())

        def again() -> nn.Module:
            with torch.device("meta"):
                module = self.module()
            for name in dict(module.named_parameters()):
                owner, _, own = name.rpartition(".")
                setattr(module.get_submodule(owner), own, nn.Parameter(weights[name].data, requires_grad=False))
            for path, buffer in first.named_buffers():  # of rotary embeddings
                owner, _, own = path.rpartition(".")
                setattr(module.get_submodule(owner), own, buffer)
            return module

        return again

    def module(self) -> nn.Module:
        if self.is_model:
            return Qwen3VLMoeTextModel(self.config)
        return Holder(self.config, Qwen3VLMoeTextExperts(self.config))

    def input(self, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """x (T, width), or (1, T, width) of the model: embeddings that need a gradient, as of a layer before."""
        sizes = (*([1] if self.is_model else []), self.num_tokens, self.config.hidden_size)
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()


CASES = (
    Case("model, 16 experts, 256 tokens", SMALL, 256, is_model=True),
    Case("layer, 128 experts, 64 tokens", REAL, 64),
    Case("layer, 128 experts, 256 tokens", REAL, 256),
)
ON_GPU = tuple(Case(f"layer, 128 experts, {number} tokens", REAL, number) for number in (256, 4096, 16384))
TINY = Case("layer, tiny", SMALL, 8)


def adapted(contender: str, module: nn.Module, forward: Forward = TORCH) -> nn.Module:
    """The module with adapters of a contender on the parameters of its experts."""
    if contender == "PEFT LoRA":
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=[*TARGETS])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no modules are targeted
            return peft.inject_adapter_in_model(config, module)
    if contender.startswith("our"):
        inject(
            module,
            [name.removesuffix("_proj") for name in TARGETS],
            DoRASpec(RANK, method=contender.removeprefix("our ").lower()),
            forward=forward,
        )
    return module


def output(case: Case, module: nn.Module, x: Tensor) -> Tensor:
    return module(inputs_embeds=x).last_hidden_state if case.is_model else module(x)


def step(case: Case, name: str, module: nn.Module, x: Tensor, dY: Tensor) -> None:
    with kept(name, module, 1):
        torch.autograd.grad(output(case, module, x), [x, *trained(module)], dY, allow_unused=True)


def measure(
    case: Case, dtype: torch.dtype, rounds: int = ROUNDS, device: torch.device = CPU, forward_of_layers: Forward = TORCH
) -> Iterator[dict[str, object]]:
    """The rows of a case: seconds of a forward pass and of a step, bytes saved and at the peak."""
    build, x = case.build(dtype, device), case.input(dtype, device)
    dY = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    modules = {name: adapted(name, build(), forward_of_layers).train() for name in CONTENDERS}

    def timed(name: str, action: Callable[[], object]) -> float:
        change(trained(modules[name]))
        return seconds_of(action, device)

    def forward(name: str) -> None:
        with kept(name, modules[name], 1):
            output(case, modules[name], x)

    found: dict[str, dict[str, list[float]]] = {}
    with fixed_bases([m for n, m in modules.items() if n.startswith("our")]):
        for what, action in (
            ("forward", forward),
            ("step", lambda name: step(case, name, modules[name], x, dY)),
        ):
            runs = {name: partial(timed, name, partial(action, name)) for name in modules}
            found[what] = alternate(runs, rounds, gc.collect)
        for what in ("saved", "peak"):
            found[what] = {name: [memory(what, case, name, module, x, dY)] for name, module in modules.items()}
    for what, values in found.items():
        yield from compared(values, case.name, RANK, what, dtype)


def memory(what: str, case: Case, name: str, module: nn.Module, x: Tensor, dY: Tensor) -> float:
    if what == "peak":
        return peak_bytes(partial(step, case, name, module, x, dY), x.device)
    with kept(name, module, 1):
        return saved_bytes(partial(output, case, module, x), module, x)


def run(run: Run) -> None:
    """The entry of `make gpu`."""
    for case in (TINY,) if run.dry else ON_GPU:
        if not run.is_cut(case.name):
            with run.trying("experts", case.name):
                forward = backend.select(run.backend or "torch")
                rows = list(measure(case, run.dtype, run.rounds(7), run.device, forward))
                run.save(rows)
                report(rows)


def main(results: Path | None) -> None:
    rows: list[dict[str, object]] = []
    for case in CASES:
        for dtype in DTYPES:
            found = list(measure(case, dtype))
            report(found)
            rows += found
            if results is not None:
                write_times(results.parent, results.stem, rows, "transformers", "peft")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
