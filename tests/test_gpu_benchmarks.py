"""`make gpu` on a CPU: every entry runs, tiny; what is missing is said, and what fails stops nothing else."""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dora_mm.studies.campaigns import subprocesses
from tests.benchmarks import gpu
from tests.benchmarks.bench_products import OURS, VENDOR, threshold
from tests.benchmarks.contenders import CONTENDERS, target_paths
from tests.benchmarks.gpu import block, grid, klein, run, trial
from tests.benchmarks.gpu.run import Run, compared
from tests.test_documented_commands import in_this_process

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="triton has been imported without its interpreter")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def dry(entry: str, folder: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    """The exit code of the dry run of an entry in this process, and its rows."""
    code = gpu.main([entry, "--dry", "--output", str(folder), *options])
    path = folder / f"{entry}.csv"
    return code, rows_of(path) if path.exists() else []


def test_the_block_is_that_of_llama():
    transformers = pytest.importorskip("transformers")
    size, x = block.TINY, torch.randn(9, block.TINY.width)
    config = transformers.LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
    )
    model = transformers.LlamaModel(config)
    layers = {name: model.get_submodule(f"layers.0.self_attn.{name}_proj") for name in "qkvo"}
    layers |= {name: model.get_submodule(f"layers.0.mlp.{name}_proj") for name in ("gate", "up", "down")}
    assert {name: (layer.in_features, layer.out_features) for name, layer in layers.items()} == size.linear_layers()
    y = model.norm(block.Block(size, layers, len(x), x.dtype)(x))
    torch.testing.assert_close(y, model(inputs_embeds=x[None]).last_hidden_state[0])


@pytest.mark.parametrize(
    ("name", "measures", "contenders"),
    [
        pytest.param("block", ["step", "forward", "peak"], {"frozen", "dense B@A"}, marks=pytest.mark.slow),
        ("layers", ["step", "forward", "peak"], {"frozen", "dense B@A", "dense W'"}),
        pytest.param("llama", ["step", "peak"], set(), marks=pytest.mark.slow),
        pytest.param("peft", ["step", "peak"], set(), marks=pytest.mark.slow),
        pytest.param("unet", ["step", "peak"], set(), marks=pytest.mark.slow),
        pytest.param("z_image", ["step", "peak"], set(), marks=pytest.mark.slow),
    ],
)
def test_a_dry_run(name, measures, contenders, tmp_path, capsys):
    code, rows = dry(name, tmp_path)
    assert code == 0
    assert "left out" not in capsys.readouterr().out
    assert list(dict.fromkeys(row["measure"] for row in rows)) == measures
    assert {row["contender"] for row in rows} == set(CONTENDERS) - {"frozen"} | contenders
    for row in rows:
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"])
        assert row["contender"] != "PEFT LoRA" or float(row["ratio"]) == 1
        assert row["backend"] == ("triton" if row["contender"].startswith("our") else "torch")
        assert {"card", "torch", "triton", "peft", "repeats"} <= set(row)


def test_a_dry_run_of_optimizers(tmp_path):
    code, rows = dry("optimizers", tmp_path)
    assert code == 0
    assert [(row["optimizer"], row["differing"]) for row in rows] == [("adamw", "0"), ("adafactor", "0")]


@pytest.mark.slow
def test_a_dry_run_of_streaming(tmp_path):
    code, rows = dry("stream", tmp_path)
    assert code == 0  # gradients are equal
    assert [row["weights"] for row in rows] == ["all stay", "half wait", "all wait"]


def test_klein_is_the_one_that_peft_measures():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(**klein.BASE_4B)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_875_544_576
    paths = target_paths(model, klein.PUBLISHED)
    layers = [model.get_submodule(path) for path in paths]
    assert (len(paths), sum(64 * sum(layer.weight.shape) for layer in layers)) == (80, 76_677_120)


@pytest.mark.slow
def test_a_dry_run_of_klein(tmp_path, capsys):
    code, rows = dry("klein", tmp_path)
    assert code == 0
    assert "left out" not in capsys.readouterr().out
    eager, steps = set(CONTENDERS) - {"frozen"}, {row["contender"] for row in rows if row["measure"] == "step"}
    assert steps == eager | {"PEFT LoRA, compiled", "PEFT DoRA, compiled"}
    assert {row["contender"] for row in rows if row["measure"] == "peak"} == eager


@pytest.mark.slow
def test_a_dry_run_of_regional_compilation(tmp_path):
    code, rows = dry("regional", tmp_path)
    assert code == 0
    assert [row["contender"] for row in rows] == ["our DoRA", "our DoRA, compiled"]


@pytest.mark.slow
def test_a_dry_run_of_the_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    started = SimpleNamespace(Popen=in_this_process, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(subprocesses, "subprocess", started)  # else each training imports torch for some seconds
    code, rows = dry("grid", tmp_path, "--seconds", "900")
    assert code == 0
    assert {(row["method"], row["rank"], row["setting"]) for row in rows} == {("lora", "1", ""), ("dora", "1", "")}
    assert [row["seed"] for row in rows].count("0") == 6
    assert {row["seed"] for row in rows} == {"0", "1"}


@pytest.mark.parametrize(("code", "sentence"), [(143, "left out: the other trainings"), (2, "failed: dora-mm compare")])
def test_a_grid_that_does_not_finish(code, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid.cli, "main", lambda arguments: code)
    assert dry("grid", tmp_path)[0] == int(code != 143)
    assert sentence in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_of_compiled_blocks(tmp_path):
    code, rows = dry("compiled", tmp_path)
    assert code == 0
    assert [row["contender"] for row in rows] == ["PEFT LoRA", "PEFT LoRA, compiled", "PEFT LoRA", "our DoRA, compiled"]


@pytest.mark.slow
def test_the_trial_and_the_profile(tmp_path, monkeypatch, capsys):
    code, rows = dry("trial", tmp_path)
    assert code == 0
    assert [row["tensor"] for row in rows] == ["y", "dx", "dA", "dB", "dm"]
    assert all(float(row["error"]) < float(row["bound"]) for row in rows)
    code, rows = dry("profile", tmp_path)
    assert code == 0
    assert rows[0]["kernel"] == "all"
    assert len(rows) == 16
    times = [float(row["microseconds"]) for row in rows]
    assert times == sorted(times, reverse=True)
    monkeypatch.setattr(trial.reference, "relative_error", lambda found, right: float("nan"))
    capsys.readouterr()
    assert dry("trial", tmp_path)[0] == 1
    assert "failed: tiny: the error of dm is nan of it, above 2.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["trial", "products", "layers", "profile"])
def test_kernels_that_fail_their_trial_are_a_fault_and_never_measured_as_ours(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_triton", lambda: (None, "its results are wrong"))
    code, rows = dry(name, tmp_path)
    assert code == 1
    assert capsys.readouterr().out.count("failed: the trial of the kernels") == 1
    expected = {"frozen", "PEFT LoRA", "PEFT DoRA", "dense B@A", "dense W'"} if name == "layers" else set()
    assert {row["contender"] for row in rows} == expected


@pytest.mark.slow
def test_entries_that_only_start_other_programs(tmp_path):
    """Both in processes of their own, as all entries are when there are several."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "tests", "products", "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_step_in_a_cuda_graph" in done.stdout
    assert "vendor_from_back is" in done.stdout
    assert done.stdout.endswith("Nothing was left out, and nothing failed.\n")
    assert {row["direction"] for row in rows_of(tmp_path / "products.csv")} == {"forward", "backward"}


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_what_it_has_measured_and_no_process(tmp_path):
    """`make gpu` is stopped in its first entry, with measures and another entry still to come."""
    arguments = ["block", "layers", "--dry", "--output", str(tmp_path)]
    code = f"import sys; from tests.benchmarks import gpu; sys.exit(gpu.main({arguments}))"
    saved = tmp_path / "block.csv"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not (saved.exists() and saved.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        entries = children.read_text().split() if children.exists() else []
        process.terminate()
        assert process.wait(60) == 143
    rows = rows_of(saved)
    assert rows[0]["measure"] == "step"
    assert all(float(row["median"]) > 0 and None not in row.values() for row in rows)
    assert not (tmp_path / "layers.csv").exists()
    assert not any(Path(f"/proc/{entry}").exists() for entry in entries)


PACKAGES = ("triton", "peft", "pytest", "diffusers", "transformers", "numpy", "pydantic", "PIL", "hypothesis", "xdist")
ALL_BUT_ONE = tuple(entry.name for entry in gpu.ENTRIES[:-1] if entry.name != "grid")  # whose trainings take minutes


@pytest.mark.parametrize(
    ("packages", "entries"),
    [
        (PACKAGES, ("trial", "block", "products", "profile", "llama", "tests", "unet", "grid", "klein", "z_image")),
        *(pytest.param((package,), ALL_BUT_ONE, marks=pytest.mark.slow) for package in PACKAGES[:4]),
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_without_packages(packages, entries, tmp_path):
    code = f"""
import sys
sys.modules |= dict.fromkeys({packages})
from dora_mm.studies.campaigns import subprocesses
from tests.benchmarks import gpu
print("codes", [gpu.main([entry, "--dry", "--output", {str(tmp_path)!r}]) for entry in {entries}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"codes {[0] * len(entries)}"], done.stdout + done.stderr
    rows = rows_of(tmp_path / "block.csv")
    peers = [name for name in CONTENDERS if name.startswith("PEFT")]
    left_out = "peft" in packages
    assert left_out != (set(peers) <= {row["contender"] for row in rows})
    assert (f"left out: {', '.join(peers)}: they need peft" in done.stdout) == left_out
    assert {row["backend"] for row in rows} == ({"torch"} if "triton" in packages else {"torch", "triton"})
    for entry in gpu.ENTRIES:
        is_missing = entry.name in entries and not set(packages).isdisjoint(entry.needs)
        assert (f"left out: all of {entry.name}: it needs " in done.stdout) == is_missing


def test_an_entry_that_fails(tmp_path, capsys):
    def work(run):
        raise RuntimeError("no kernel image")

    given = gpu.parsed(["block", "--dry", "--output", str(tmp_path)])
    assert gpu.run_here(gpu.Entry("block", (), 1, work), given) == 1
    assert "failed: RuntimeError: no kernel image\n" in capsys.readouterr().out


def test_an_entry_that_dies_or_hangs(tmp_path, monkeypatch):
    given = gpu.parsed(["block", "--dry", "--output", str(tmp_path)])
    code, remarks = gpu.run_apart(gpu.Entry("surprise", (), 1, print), 1, given)
    assert code == 2
    (remark,) = remarks
    assert re.fullmatch(r"failed: it ended with code 2 after \d+ s", remark)
    monkeypatch.setattr(gpu, "GRACE", 0)
    code, remarks = gpu.run_apart(gpu.ENTRIES[-1], 0.1, given)
    assert code == -9
    assert remarks[0].startswith("failed: it ended with code -9")


@pytest.mark.parametrize(
    ("arguments", "sentence"), [([], "torch sees no GPU"), (["layer"], "there is no entry layer: choose from trial")]
)
def test_mistakes(arguments, sentence, capsys):
    try:
        code = gpu.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_a_contender_that_fails_is_left_out_and_ours_counts(tmp_path, capsys):
    run = Run("layers", torch.device("cpu"), True, tmp_path, time.monotonic() - 1)
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
