"""Compiles every launch of a step for GPUs that are not in this machine, and reports what each kernel takes.

    python -m tests.kernels.compile_ahead [--all] [--output FILE.csv]

A step of a layer runs on tensors without memory, its launches are recorded, and each is compiled with the types,
constants and divisibilities that Triton would see. `--all` takes every card of the table, all ranks and sides, and
needs an hour; without it, a choice for the tests. (fp16 compiles as bf16 does.) The reports are in
tests/benchmarks/results/compile_ahead/.

It is a separate script, since the interpreter that the other tests use is selected when triton is imported.
"""

import argparse
import contextlib
import csv
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dora_mm import backend, kernels
from dora_mm.core import Adapter
from dora_mm.core.ops import LINEAR, GroupedOp
from dora_mm.core.passes import Options, PassCache
from dora_mm.kernels import (
    adapter_grads,
    dora_linear,
    gpus,
    grouped_dots,
    grouped_matmul,
    grouped_norm,
    grouped_outer,
    low_rank_add,
    low_rank_matmul,
    operands,
    output_grad,
)
from dora_mm.kernels import row_norm as norms
from dora_mm.peft.formula import Scaled, row_factors


class Target(NamedTuple):
    """A GPU to compile for.

    Attributes:
        name: As NVIDIA and AMD call it.
        gpu: The same for Triton.
        gpu_spec: What is chosen for it.
        shared: The KiB of shared memory that a block may have (CUDA C++ Programming Guide; CDNA 3 and RDNA 3 ISA).
    """

    name: str
    gpu: GPUTarget
    gpu_spec: gpus.GPU
    shared: int


def nvidia(capability: int, shared: int) -> Target:
    gpu_spec = gpus.gpu_of((capability // 10, capability % 10))
    return Target(f"sm_{capability}", GPUTarget("cuda", capability, 32), gpu_spec, shared)


TARGETS = [nvidia(80, 163), nvidia(86, 99), nvidia(89, 99), nvidia(90, 227), nvidia(100, 227), nvidia(120, 99)]
TARGETS += [
    Target(name, GPUTarget("hip", name, lanes), gpus.AMD, 64) for name, lanes in (("gfx942", 64), ("gfx1100", 32))
]
EVEN, ODD = (4096, 4096, 1280), (577, 1004, 1285)  # tokens, in, out
NUM_EXPERTS, FEW_ROWS = 16, 64
KERNELS = {module: f"_{module.__name__.rpartition('.')[2]}" for module in (
    adapter_grads, grouped_dots, grouped_matmul, grouped_norm, grouped_outer, low_rank_add, low_rank_matmul, operands,
    output_grad, norms,
)}  # fmt: skip
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "mfma", "wmma")


class Case(NamedTuple):
    """A layer and its input."""

    dtype: torch.dtype
    rank: int
    sizes: tuple[int, int, int]
    has_bias: bool


CHOICE = [
    Case(torch.bfloat16, 8, ODD, True),
    Case(torch.bfloat16, 64, EVEN, False),
    Case(torch.float32, 16, EVEN, True),
]
ALL = [
    Case(*case)
    for case in itertools.product((torch.bfloat16, torch.float32), (4, 8, 16, 32, 64, 128), (EVEN, ODD), (False, True))
]


class Recorder:
    """Stands for a kernel, and records what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of(case: Case, gpu_spec: gpus.GPU) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches of a step of the layer on a GPU: with either product, and with and without n0 and the output."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), found)))
        for module in (low_rank_matmul, kernels.common, gpus):
            stack.enter_context(mock.patch.object(module, "gpu", return_value=gpu_spec))
        stack.enter_context(mock.patch.object(dora_linear, "INTERPRETED", True))
        for vendor in (False, True):
            chosen = vendor or case.dtype == torch.float32
            stack.enter_context(
                mock.patch.object(dora_linear, "vendor_is_faster", lambda *_, chosen=chosen, **__: chosen)
            )
            step(case, knows_base=vendor)
            step_of_experts(case, knows_base=vendor)
        stack.enter_context(mock.patch.dict(backend.CHOSEN, {False: dora_linear.TRITON}))
        step_of_peft(case)
    return found


def step(case: Case, *, knows_base: bool) -> None:
    tokens, num_in, num_out = case.sizes

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=True)

    x, W0 = tensor(tokens, num_in, dtype=case.dtype), tensor(num_out, num_in, dtype=case.dtype).detach()
    bias = tensor(num_out, dtype=case.dtype).detach() if case.has_bias else None
    own = tensor(case.rank, num_in), tensor(num_out, case.rank), tensor(num_out)
    cache = PassCache(n0=own[2].detach() if knows_base else None)
    y = dora_linear.TRITON(x, W0, bias, [Adapter(*own)], Options(cache=cache, save_output=knows_base))
    torch.autograd.grad(y, [x, *own], torch.empty_like(y))


def step_of_experts(case: Case, *, knows_base: bool) -> None:
    """A pass of a stack of weights (E, O, I), or (E, I, O), for many rows and for few."""
    tokens, num_in, num_out = case.sizes

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=True)

    x = tensor(tokens if knows_base else FEW_ROWS, num_in, dtype=case.dtype)
    sizes = (num_out, num_in) if knows_base else (num_in, num_out)
    W0 = tensor(NUM_EXPERTS, *sizes, dtype=case.dtype).detach()
    own = tensor(NUM_EXPERTS, case.rank, num_in), tensor(NUM_EXPERTS, num_out, case.rank), tensor(NUM_EXPERTS, num_out)
    cache = PassCache(n0=own[2].detach() if knows_base else None)
    ends = torch.empty(NUM_EXPERTS, dtype=torch.int32, device="meta")
    options = Options(GroupedOp(ends), cache=cache, save_output=knows_base)
    y = dora_linear.TRITON(x, W0 if knows_base else W0.mT, None, [Adapter(*own)], options)
    torch.autograd.grad(y, [x, *own], torch.empty_like(y))


def step_of_peft(case: Case) -> None:
    """A pass of a layer of PEFT that runs fused, with A, B and m in fp32: under autocast, and without it."""
    tokens, num_in, num_out = case.sizes

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=True)

    y, W0 = tensor(tokens, num_out, dtype=case.dtype), tensor(num_out, num_in, dtype=case.dtype).detach()
    bias = tensor(num_out, dtype=case.dtype).detach() if case.has_bias else None
    A, B, m = tensor(case.rank, num_in), tensor(num_out, case.rank), tensor(num_out)
    for dtype in {case.dtype, torch.float32}:
        h = tensor(tokens, case.rank, dtype=dtype)
        rows = row_factors(W0, A.detach(), B.detach(), m.detach(), bias, 2.0, transposed=False)
        z = Scaled.apply(LINEAR, y, bias, h, B, m, None, rows, 2.0, case.dtype)
        torch.autograd.grad(z, [y, h, B, m], torch.empty_like(z))


def specialized(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, int], str]:
    """What Triton makes of a launch: the source, the options of the compiler, and a key that is the same for launches
    of the same code."""
    compiler = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants: dict[str, Any] = {name: value for name, value in options.items() if name not in compiler}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else args[index]
        signature[name] = "constexpr"
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return source, compiler, repr((kernel.__name__, signature, constants, sorted(attributes), compiler))


def report(found: Any, target: Target) -> dict[str, Any]:
    """Resources of a compiled kernel: registers per thread, bytes of the stack to which a thread spills what does not
    fit into them, bytes of shared memory and what a block may have, and the instruction that multiplies."""
    row: dict[str, Any] = {"shared": found.metadata.shared, "limit": target.shared * 1024}
    text = found.asm.get("ptx", found.asm.get("amdgcn", ""))
    row["product"] = next((name for name in TENSOR_CORES if name in text), "")
    if "cubin" in found.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    else:
        registers, stack = (
            int(re.findall(rf"{name}:?\s+(\d+)", text)[-1]) for name in (r"\.vgpr_count", r"\.vgpr_spill_count")
        )
    return {"registers": registers, "stack": stack, **row}


def rows_of(targets: list[Target], cases: list[Case]) -> Iterator[dict[str, Any]]:
    """A row per target and kernel; launches that compile to the same code have one."""
    for target in targets:
        seen = set()
        for case in cases:
            for kernel, args, options in launches_of(case, target.gpu_spec):
                source, compiler, key = specialized(kernel, args, options)
                if key in seen:
                    continue
                seen.add(key)
                start = time.perf_counter()
                found = triton.compile(source, target=target.gpu, options=compiler)
                yield {
                    "triton": triton.__version__, "card": target.name, "kernel": kernel.__name__.strip("_"),
                    "flags": " ".join(n for n, v in options.items() if v is True), "dtype": TYPES[case.dtype],
                    "rank": case.rank, "sides": " x ".join(map(str, case.sizes)), "bias": case.has_bias,
                    **report(found, target), "seconds": f"{time.perf_counter() - start:.1f}",
                }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--cards", nargs="*", help="names of GPUs; those of the tests by default")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    names = given.cards or ([t.name for t in TARGETS] if given.all else ["sm_80", "sm_89", "sm_90"])
    found = []
    writer = None
    with given.output.open("w", newline="") if given.output else contextlib.nullcontext() as file:
        for row in rows_of([t for t in TARGETS if t.name in names], ALL if given.all else CHOICE):
            found.append(row)
            if file is not None:
                writer = writer or csv.DictWriter(file, list(row))
                if len(found) == 1:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
    print(json.dumps(found))
