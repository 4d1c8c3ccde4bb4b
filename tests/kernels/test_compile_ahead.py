"""The kernels compile for GPUs that are not here and fit into their shared memory; our product spills nothing."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.4")  # earlier versions call the compiler differently


@pytest.mark.slow
def test_no_kernel_spills_or_needs_more_than_there_is():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["card"] for row in rows} == {"sm_80", "sm_89", "sm_90"}
    kernels = {"adapter_grads", "low_rank_add", "low_rank_matmul", "operands", "output_grad", "row_norm"}
    kernels |= {"grouped_dots", "grouped_matmul", "grouped_norm", "grouped_outer"}
    assert {row["kernel"] for row in rows} == kernels
    products = [row for row in rows if row["kernel"] in ("low_rank_matmul", "grouped_matmul")]
    assert [row for row in products if row["stack"] and row["dtype"] == "bf16"] == []
    assert [row for row in rows if row["stack"] > 32] == []  # the others wait for memory, not for a few registers
    assert [row for row in rows if row["shared"] > row["limit"]] == []
    products = {(row["card"], row["product"]) for row in rows if row["kernel"] == "low_rank_matmul"}
    assert products == {("sm_80", "mma.sync"), ("sm_89", "mma.sync"), ("sm_90", "wgmma.mma_async")}
