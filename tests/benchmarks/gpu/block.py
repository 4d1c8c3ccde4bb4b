"""A decoder block of an 8B LLM against its peers, eager, in a CUDA graph, compiled, and a profile of it: entries of
`make gpu`.

The block is that of Llama-3.1-8B in plain torch, with random weights, all seven linear layers adapted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.contenders import Build, can_compile, change, fixed_bases, trained
from tests.benchmarks.gpu.layers import GRAPH, STEP, WARM_UP, batch, bench, step
from tests.benchmarks.gpu.run import Row, Run, many_compiled, show
from tests.benchmarks.results_table import REFERENCE
from tests.benchmarks.timing import synchronize

RANK = 16
FUSED = "PEFT DoRA, fused"
CONTENDERS = ("frozen", REFERENCE, "PEFT DoRA", FUSED, "dense B@A", "our LoRA", "our DoRA")
COMPILED = (
    REFERENCE,
    "our DoRA",
    FUSED,
    "our LoRA",
    "PEFT DoRA",
    "dense B@A",
    "frozen",
)  # each takes long: in this order
TOP_KERNELS = 15
ACTIVITIES = {"cpu": [ProfilerActivity.CPU], "cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA]}


@dataclass(frozen=True)
class Size:
    """The sizes of a decoder block."""

    width: int
    mlp: int
    num_heads: int
    num_kv_heads: int

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The in and out sizes of the layers to adapt, by name."""
        narrow = self.width * self.num_kv_heads // self.num_heads
        attention = {"q": (self.width, self.width), "k": (self.width, narrow), "v": (self.width, narrow)}
        mlp = {"gate": (self.width, self.mlp), "up": (self.width, self.mlp), "down": (self.mlp, self.width)}
        return attention | {"o": (self.width, self.width)} | mlp


LLAMA_8B = Size(width=4096, mlp=14336, num_heads=32, num_kv_heads=8)
TINY = Size(width=32, mlp=48, num_heads=4, num_kv_heads=2)


class Block(nn.Module):
    """A decoder block around linear layers that somebody else has built.

    Args:
        size: The sizes.
        layers: The linear layers by the names of `Size.linear_layers`.
        num_tokens: The length of the input.
        dtype: That of the input and of the base weights.
    """

    def __init__(self, size: Size, layers: dict[str, nn.Module], num_tokens: int, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        norms = (nn.RMSNorm(size.width, eps=1e-5, dtype=dtype) for _ in range(2))
        self.norms = nn.ModuleList(norms).requires_grad_(False)
        self.head_size = size.width // size.num_heads
        rates = 5e5 ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        angles = torch.outer(torch.arange(num_tokens), rates).repeat(1, 2)
        self.register_buffer("cosine", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(dtype), persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x (T, width) -> (T, width)."""
        x_TD = x_TD + self.attention(self.norms[0](x_TD))
        h_TD = self.norms[1](x_TD)
        return x_TD + self.layers["down"](F.silu(self.layers["gate"](h_TD)) * self.layers["up"](h_TD))

    def attention(self, h_TD: Tensor) -> Tensor:
        q, k, v = (self.layers[n](h_TD).view(1, len(h_TD), -1, self.head_size).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)
        return self.layers["o"](y.transpose(1, 2).reshape(len(h_TD), -1))

    def rotated(self, q: Tensor) -> Tensor:
        """q or k (1, heads, T, head size) with its position."""
        first, second = q.chunk(2, dim=-1)
        return q * self.cosine + torch.cat((-second, first), dim=-1) * self.sine


def run(run: Run) -> None:
    """Measures the contenders at both lengths."""
    contenders = run.contenders(*CONTENDERS)
    for name, num_tokens in lengths(run):
        if not run.is_cut(name):
            build = builder(run, num_tokens)
            builds = {key: partial(build, layer) for key, layer in contenders.items()}
            bench(run, name, RANK, builds, *inputs(run, num_tokens))


def run_compiled(run: Run) -> None:
    """Compiles one contender after the other, and measures each beside the reference, which stays as it is."""
    if not run.dry and not can_compile(run.device):
        run.leave_out("all of it: torch.compile does not work here")
        return
    contenders = run.contenders(*(COMPILED[:2] if run.dry else COMPILED))
    for name, num_tokens in lengths(run):
        build = builder(run, num_tokens)
        reference = {REFERENCE: partial(build, contenders[REFERENCE])} if REFERENCE in contenders else {}
        for key, layer in contenders.items():
            if not run.is_cut(f"{key}, compiled, {name}"):
                torch.compiler.reset()
                builds = reference | {f"{key}, compiled": partial(compiled, run, build, layer)}
                with many_compiled():
                    bench(run, name, RANK, builds, *inputs(run, num_tokens), (STEP, STEP + GRAPH))


def lengths(run: Run) -> list[tuple[str, int]]:
    """The cases: their names and numbers of tokens."""
    return [(f"8B LLM, one block, {n} tokens", n) for n in ((8,) if run.dry else (2048, 8192))]


def inputs(run: Run, num_tokens: int) -> tuple[Tensor, Tensor]:
    width = size_of(run).width
    return batch(run, num_tokens, width, width, run.dtype)


def size_of(run: Run) -> Size:
    return TINY if run.dry else LLAMA_8B


def builder(run: Run, num_tokens: int) -> Callable[[Build], Block]:
    """A function that returns the block of a contender; all share their base weights."""
    torch.manual_seed(0)
    size = size_of(run)
    bases = {
        name: nn.Linear(*sizes, bias=False, device=run.device, dtype=run.dtype).requires_grad_(False)
        for name, sizes in size.linear_layers().items()
    }

    def build(layer: Build) -> Block:
        return Block(size, {name: layer(base, RANK) for name, base in bases.items()}, num_tokens, run.dtype)

    return build


def compiled(run: Run, build: Callable[[Build], Block], layer: Build) -> Block:
    block = build(layer)
    block.compile(dynamic=False, backend=run.compiler)
    return block


# --- one profile -----------------------------------------------------------------------------------------------------


def run_profile(run: Run) -> None:
    """Saves and prints what a step of our DoRA at the first length consists of, the longest kernels first."""
    _, num_tokens = lengths(run)[0]
    for layer in run.contenders("our DoRA").values():
        block, (x, dY) = builder(run, num_tokens)(layer).to(run.device), inputs(run, num_tokens)
        with fixed_bases([block]):
            for _ in range(run.rounds(WARM_UP)):
                step(block, x, dY)
            change(trained(block))
            with profile(activities=ACTIVITIES[run.device.type]) as recorded:
                step(block, x, dY)
                synchronize(run.device)
        rows = kernels(recorded, run.device)
        run.save(rows)
        show(rows)


def kernels(recorded: profile, device: torch.device) -> list[Row]:
    """A row for all kernels, and one for each of the longest; of a processor's operators in a dry run."""
    kind, time = DeviceType.CUDA, "self_device_time_total"
    if device.type == "cpu":
        kind, time = DeviceType.CPU, "self_cpu_time_total"
    found = [(e.key, e.count, getattr(e, time)) for e in recorded.key_averages() if e.device_type == kind]
    total = sum(us for _, _, us in found)
    top = sorted(found, key=lambda entry: -entry[2])[:TOP_KERNELS]
    every = ("all", sum(count for _, count, _ in found), total)
    return [
        {"kernel": name[:120], "calls": count, "microseconds": f"{us:.1f}", "share": f"{us / total:.3f}"}
        for name, count, us in (every, *top)
    ]
