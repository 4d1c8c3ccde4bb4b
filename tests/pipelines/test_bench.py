"""The benchmark runs, measures what it says, and the README shows the committed results."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from dora_mm.eval import bench_results, timing
from dora_mm.recipes import PIPELINES

bench = PIPELINES.load("bench")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_a_small_case_end_to_end(tmp_path):
    case = bench.Case("small", 24, 16, 40, 4)
    with tqdm(disable=True) as progress:
        results = bench.bench_layer(case, CPU, torch.float32, 3, progress)
    assert len(results) == len(bench.CONTENDERS) * 4
    found = {(r.contender, r.measure): r.median for r in results}
    assert found["frozen", "saved"] == 0
    assert found["our DoRA", "saved"] == 24 * 16 * 4  # W', beside parameters, x and y
    assert 0 < found["frozen", "peak"] < found["PEFT DoRA", "peak"]
    bench_results.write_results(tmp_path / "results.csv", results)
    assert bench_results.read_results(tmp_path / "results.csv") == results
    made_on = bench.machine(CPU, "float32")
    assert len(bench_results.table(results, made_on).splitlines()) == 5
    pytest.importorskip("matplotlib")
    bench_results.plot(results, made_on, tmp_path / "times.png")
    with Image.open(tmp_path / "times.png") as picture:
        assert picture.width == 990


@pytest.mark.slow
def test_compiled_peers_are_what_they_were():
    if not bench.can_compile():
        pytest.skip("torch.compile does not work here")
    base = nn.Linear(16, 24).requires_grad_(False)
    x = torch.randn(40, 16)
    for name, build in bench.COMPILED.items():
        torch.manual_seed(0)
        expected = bench.CONTENDERS[name.removesuffix(", compiled")](base, 4)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(build(base, 4)(x), expected)


def test_a_small_model_end_to_end():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x).relu())

    def build(device, dtype):
        net = Net().requires_grad_(False)
        return net, lambda: passes.append(net) or net(torch.ones(5, 8)).square().mean()

    passes = []
    model = bench.Model("net", build, ["first", "second"], 2, passes=3)
    with tqdm(disable=True) as progress:
        results = bench.bench_model(model, CPU, torch.float32, 2, progress)
    assert len(passes) == 4 * 4 * 3  # contenders, rounds with the one that is not counted and the peak's, passes
    assert {r.contender for r in results if r.measure == "step"} == set(bench.CONTENDERS) - {"frozen"}
    assert all(r.median > 0 for r in results)


@pytest.mark.parametrize("extent", ["quick", "default", "all"])
def test_extents(extent):
    cases = bench.layer_cases(extent)
    assert len(cases) == {"quick": 5, "default": 14, "all": 35}[extent]
    assert len(set(cases)) == len(cases)


def test_turns_alternate_and_drop_the_first_round():
    order = []
    times = iter(range(100))
    runs = {name: lambda name=name: order.append(name) or float(next(times)) for name in "ab"}
    assert timing.in_turns(runs, 2, lambda: None) == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert order == list("ababab")
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_peak_counts_what_is_alive_at_once():
    def action():
        for _ in range(3):
            torch.empty(1_000_000)  # freed at once
        return torch.empty(2_000_000)

    assert timing.peak_bytes(action, CPU) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("folder", sorted((ROOT / "tests/benchmarks/results").glob("*/machine.json")), ids=str)
def test_the_readme_shows_the_results(folder):
    results = bench_results.read_results(folder.parent / "results.csv")
    text = bench_results.table(results, json.loads(folder.read_text()))
    assert text in (ROOT / "README.md").read_text(), f"README.md needs the table of {folder.parent}:\n{text}"
