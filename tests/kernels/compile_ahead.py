"""Compiles every kernel for GPUs that are not in this machine, and prints the registers and spills of each as JSON.

It is a separate script, since the interpreter that the other tests use is selected when triton is imported.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dora_mm.kernels import low_rank_add, low_rank_matmul, magnitude_grad, row_norm, row_sums
from dora_mm.kernels.common import MIN_DOT, rank_block, tiles

# A100, RTX 40 and H100, with the KiB of shared memory that a block may have (CUDA C++ Programming Guide)
CAPABILITIES = {80: 163, 89: 99, 90: 227}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SIZES = ("M", "N", "K", "R", "num_out", "num_in", "num_tokens", "rank")
FLOATS = ("scaling", "cancelled", "small_gain", "large_bias")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def ones(*names):
    """Strides of 1, which are constants to Triton and determine how memory is read."""
    return dict.fromkeys(names, 1)


def kernels():
    """Yields name, kernel, types of the pointers, constants and options of every variant in use, at rank 64."""
    four = {"num_warps": 4}
    for dtype, short in TYPES.items():
        pointers = {"W0": short, "A": "fp32", "B": "fp32", **dict.fromkeys(("n0", "magnitude", "norm", "gain"), "fp32")}
        blocks = {"BLOCK_O": row_norm.BLOCK_O, "BLOCK_I": row_norm.BLOCK_I, "BLOCK_R": MIN_DOT}
        yield f"row_norm {short}", row_norm._row_norm, pointers, blocks | ones("stride_wi"), four
        half = {"x": short, "W": short, "h": short, "B": "fp32", "gain": "fp32", "bias": short, "y": short}
        for way, strides in (("GAIN_OUT", ("stride_wk", "stride_br")), ("GAIN_IN", ("stride_wn", "stride_bn"))):
            chosen = dict(tiles(dtype))
            options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
            flags = {"GAIN_OUT": way == "GAIN_OUT", "GAIN_IN": way == "GAIN_IN", "HAS_BIAS": way == "GAIN_OUT"}
            constants = {
                **flags,
                "HAS_BRANCH": True,
                "BLOCK_R": rank_block(64, dtype),
                "GROUP": low_rank_matmul.GROUP,
                **chosen,
                **ones("stride_xk", *strides),
            }
            yield f"low_rank_matmul {way} {short}", low_rank_matmul._low_rank_matmul, half, constants, options
        add = {"P": "fp32", "h": short, "B": "fp32", "gain": "fp32", "bias": short, "y": short}
        constants = {"HAS_GAIN": True, "HAS_BIAS": True, "HAS_BRANCH": True, "BLOCK_R": rank_block(64, dtype)}
        constants |= {"BLOCK_M": low_rank_add.BLOCK_M, "BLOCK_N": low_rank_add.BLOCK_N} | ones("stride_pn", "stride_br")
        yield f"low_rank_add {short}", low_rank_add._low_rank_add, add, constants, four
        gain_alone = constants | {"HAS_BIAS": False, "HAS_BRANCH": False}  # dY before the vendor's product
        yield f"low_rank_add gain {short}", low_rank_add._low_rank_add, add | {"P": short}, gain_alone, four
        sums = {"dY": short, "y": short, "bias": short, "dots": "fp32", "squares": "fp32"}
        constants = {"HAS_BIAS": True, "SLAB": row_sums.SLAB, "BLOCK_T": row_sums.BLOCK_T, "BLOCK_O": row_sums.BLOCK_O}
        yield f"row_sums {short}", row_sums._row_sums, sums, constants | ones("stride_do", "stride_yo"), four
        per_row = dict.fromkeys(("dots", "squares", "magnitude", "norm", "gain"), "fp32") | {"bias": short}
        inner = {**per_row, "dY": short, "x": short, "W0": short, "A": "fp32", "B": "fp32", "dm": "fp32"}
        constants = {"HAS_BIAS": True, "HAS_BRANCH": True}
        constants |= {"BLOCK_T": magnitude_grad.BLOCK_T, "BLOCK_I": magnitude_grad.BLOCK_I}
        constants |= ones("stride_do", "stride_xi", "stride_wi")
        yield f"magnitude_grad {short}", magnitude_grad._magnitude_grad, inner, constants, four


def compiled(kernel, pointers, constants, options, capability):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name in pointers or name.startswith("stride") or name in SIZES:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(found, limit: int) -> dict[str, int]:
    """Resources of a compiled kernel.

    Returns:
        Registers per thread (reg), bytes of the stack to which a thread spills what does not fit into them (stack), and
        bytes of shared memory left of `limit` KiB (shared_left).
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name.lower(): int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK")}
    return numbers | {"shared_left": limit * 1024 - found.metadata.shared}


if __name__ == "__main__":
    found = {}
    for capability, limit in CAPABILITIES.items():
        for name, *what in kernels():
            found[f"sm_{capability} {name}"] = report(compiled(*what, capability), limit)
    print(json.dumps(found))
