"""`make gpu` on a processor: every entry runs, tiny; what is missing is said, and what fails stops nothing else."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.benchmarks import gpu
from tests.benchmarks.bench_products import OURS, VENDOR, threshold
from tests.benchmarks.gpu_run import Run, compared

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="triton has been imported without its interpreter")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "measures", "contenders"),
    [
        ("layers", {"forward", "step", "peak"}, {"frozen", "dense B@A", "dense W'", "our DoRA, compiled"}),
        pytest.param("unet", {"step", "peak"}, set(), marks=pytest.mark.slow),
        pytest.param("z_image", {"step", "peak"}, set(), marks=pytest.mark.slow),
        pytest.param("llm", {"step", "peak"}, {"our DoRA, compiled"}, marks=pytest.mark.slow),
    ],
)
def test_a_dry_run(name, measures, contenders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main([name, "--dry", "--output", str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out
    rows = rows_of(tmp_path / f"{name}.csv")
    assert {row["measure"] for row in rows} == measures
    assert {row["contender"] for row in rows} >= {"PEFT LoRA", "PEFT DoRA", "our LoRA", "our DoRA"} | contenders
    for row in rows:
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"])
        assert row["contender"] != "PEFT LoRA" or float(row["ratio"]) == 1
        assert {"card", "torch", "triton", "peft", "repeats"} <= set(row)


@pytest.mark.slow
def test_entries_that_only_start_other_programs(tmp_path):
    """Both in processes of their own, as all entries are when there are several."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "tests", "products", "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_step_in_a_cuda_graph" in done.stdout
    assert "VENDOR_FROM_BACK[4] is" in done.stdout
    assert done.stdout.endswith("Nothing was left out, and nothing failed.\n")
    assert {row["direction"] for row in rows_of(tmp_path / "products.csv")} == {"forward", "backward"}


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert gpu.main(["unet", "--dry", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "left out: all of unet: it needs diffusers\n"
    assert not any(tmp_path.iterdir())


def test_an_entry_that_fails(tmp_path, capsys):
    def work(run):
        raise RuntimeError("no kernel image")

    given = gpu.parsed(["llm", "--dry", "--output", str(tmp_path)])
    assert gpu.run_here(gpu.Entry("llm", (), 1, work), given) == 1
    assert "failed: RuntimeError: no kernel image\n" in capsys.readouterr().out


def test_an_entry_that_dies_or_hangs(tmp_path, monkeypatch):
    given = gpu.parsed(["llm", "--dry", "--output", str(tmp_path)])
    code, remarks = gpu.run_apart(gpu.Entry("surprise", (), 1, print), 1, given)
    assert code == 2
    assert remarks == ["failed: it ended with code 2 after 0 s"]
    monkeypatch.setattr(gpu, "GRACE", 0)
    code, remarks = gpu.run_apart(gpu.ENTRIES[-1], 0.1, given)
    assert code == -9
    assert remarks[0].startswith("failed: it ended with code -9")


@pytest.mark.parametrize(
    ("arguments", "sentence"), [([], "torch sees no GPU"), (["layer"], "there is no entry layer: choose from tests")]
)
def test_mistakes(arguments, sentence, capsys):
    try:
        code = gpu.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_a_contender_that_fails_is_left_out_and_ours_counts(tmp_path, capsys):
    run = Run(torch.device("cpu"), True, tmp_path, time.monotonic() - 1)
    for name in ("PEFT LoRA", "our DoRA"):
        with run.trying(name, "a layer"):
            raise ValueError("one line\nand another")
    assert run.faults == ["our DoRA, a layer: ValueError: one line"]
    assert run.is_cut("the next layer")
    assert capsys.readouterr().out.splitlines() == [
        "left out: PEFT LoRA, a layer: ValueError: one line",
        "failed: our DoRA, a layer: ValueError: one line",
        "left out: the next layer: the time of this entry is over",
    ]


def test_ratios_are_those_within_a_round():
    times = {"PEFT LoRA": [1.0, 2.0, 4.0], "our DoRA": [3.0, 4.0, 4.0]}
    reference, ours = compared(times, "a layer", 16, "step", torch.bfloat16)
    assert (reference["ratio_low"], reference["ratio"], reference["ratio_high"]) == (1, 1, 1)
    assert (ours["ratio_low"], ours["ratio"], ours["ratio_high"]) == (1.5, 2, 2.5)
    assert (ours["median"], ours["repeats"], ours["dtype"]) == (4, 3, "bfloat16")
    del times["PEFT LoRA"]
    assert compared(times, "a layer", 16, "step", torch.bfloat16)[0]["ratio"] == ""


@pytest.mark.parametrize(
    ("ours", "vendor", "expected"),
    [
        ([1, 1, 1], [2, 2, 2], float("inf")),
        ([2, 2, 2], [1, 1, 1], 0),
        ([1, 2, 9], [2, 1, 3], 1280),
        ([9, 1, 9], [8, 8, 1], 4096),  # a small gain at the first size does not pay for the loss at the second
    ],
)
def test_thresholds_for_choice(ours, vendor, expected):
    rows = [{"in": n, OURS: a, VENDOR: b} for n, a, b in zip((640, 1280, 4096), ours, vendor, strict=True)]
    assert threshold(rows, "in") == expected
