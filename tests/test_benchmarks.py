"""The benchmark measures correctly, its contenders compute DoRA, and the README shows the committed results."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from tests.benchmarks import bench_host, bench_peers, results_table, timing, wordnet_scores
from tests.benchmarks.contenders import CONTENDERS, DENSE, contending_layers, set_layers, target_paths, trained

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_case_end_to_end(autocast, tmp_path):
    case = bench_peers.Case("small", 24, 16, 40, 4)
    with tqdm(disable=True) as progress:
        results = bench_peers.bench_layer(case, CPU, torch.float32, 3, progress, autocast=autocast)
    assert len(results) == len(bench_peers.CONTENDERS) * 4
    found = {(r.contender, r.measure): r.median for r in results}
    if not autocast:
        assert found["frozen", "saved"] == 0
        assert found["our DoRA", "saved"] == 24 * 16 * 4  # W', in addition to parameters, x and y
    assert 0 < found["frozen", "peak"] < found["PEFT DoRA", "peak"]
    results_table.write_results(tmp_path / "results.csv", results)
    assert results_table.read_results(tmp_path / "results.csv") == results
    made_on = bench_peers.machine(CPU, "float32")
    assert len(results_table.table(results, made_on).splitlines()) == 5
    pytest.importorskip("matplotlib")
    results_table.plot(results, made_on, tmp_path / "times.png")
    with Image.open(tmp_path / "times.png") as image:
        assert image.width == 990


def test_host_times(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(bench_host, "SMALL", ((16, 4),))
    rows = bench_host.measure(repeats=1, rounds=1)
    contenders = {"frozen", "PEFT LoRA", "PEFT DoRA", "dense B@A", "our LoRA", "our DoRA", *bench_host.FUSED}
    assert {row["contender"] for row in rows} == contenders
    assert {row["path"] for row in rows} == {"gpu, product and pass", "gpu, one kernel", "cpu"}
    assert len(rows) == 3 * 2 * len(contenders)
    assert all(float(row["median"]) > 0 for row in rows)


@pytest.mark.slow
def test_compiled_peers_compute_the_same():
    if not bench_peers.can_compile():
        pytest.skip("torch.compile does not work here")
    base = nn.Linear(16, 24).requires_grad_(False)
    x = torch.randn(40, 16)
    for name, build in bench_peers.COMPILED.items():
        torch.manual_seed(0)
        expected = bench_peers.CONTENDERS[name.removesuffix(", compiled")](base, 4)(x)
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
    model = bench_peers.Model("net", build, ["first", "second"], 2, passes=3)
    with tqdm(disable=True) as progress:
        results = bench_peers.bench_model(model, CPU, torch.float32, 2, progress)
    assert len(passes) == 5 * 4 * 3  # contenders; rounds, including the uncounted one and that of the peak; passes
    assert {r.contender for r in results if r.measure == "step"} == set(bench_peers.CONTENDERS) - {"frozen"}
    assert all(r.median > 0 for r in results)


@pytest.mark.parametrize("extent", ["quick", "default", "all"])
def test_extents(extent):
    cases = bench_peers.layer_cases(extent)
    assert len(cases) == {"quick": 5, "default": 14, "all": 35}[extent]
    assert len(set(cases)) == len(cases)


def test_turns_alternate_and_drop_the_first_round():
    order = []
    times = iter(range(100))
    runs = {name: lambda name=name: order.append(name) or float(next(times)) for name in "ab"}
    assert timing.alternate(runs, 2, lambda: None) == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert order == list("ababab")
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_peak_counts_memory_that_is_held_at_once():
    def action():
        for _ in range(3):
            torch.empty(1_000_000)  # freed at once
        return torch.empty(2_000_000)

    assert timing.peak_bytes(action, CPU) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("folder", sorted((ROOT / "tests/benchmarks/results").glob("*/machine.json")), ids=str)
def test_the_documentation_shows_the_results(folder):
    results = results_table.read_results(folder.parent / "results.csv")
    text = results_table.table(results, json.loads(folder.read_text()))
    text = text[text.index("| | rank") :]  # what stands above it is written as prose
    page = ROOT / "docs" / "benchmarks.md"
    assert text in page.read_text(), f"{page} needs the table of {folder.parent}:\n{text}"


def test_the_readme_shows_some_of_the_same_results():
    """Every row of its table of costs: PEFT's LoRA in ms, the others as ratios of it; and a sentence."""
    readme = (ROOT / "README.md").read_text()
    step = steps("epyc_1_thread_peft/float32.csv")
    (table,) = re.findall(r"\| \| PEFT's LoRA \| PEFT's DoRA \| .*\n\|[- |]*\n((?:\|.*\n)+)", readme)
    cases = [
        "SDXL 640",
        "SDXL 1280, 4096 tokens",
        "SDXL 1280, 1024 tokens",
        "SDXL cross-attention",
        "bart-base",
    ]
    for case, line in zip(cases, table.splitlines(), strict=True):
        name, unit, *ratios = (cell.strip() for cell in line.strip("|").split("|"))
        rank = int(re.search(r"rank (\d+)", name)[1])
        seconds = step[case, rank, "PEFT LoRA"]
        assert unit == f"{1000 * seconds:.0f} ms"
        others = [step[case, rank, who] / seconds for who in ("PEFT DoRA", "PEFT DoRA, fused", "our DoRA")]
        assert ratios == [f"{other:.2f} x" for other in others]
    step = steps("epyc_2_cores/results.csv")
    theirs, ours = (step["SDXL UNet, 256 px", 16, who] for who in ("PEFT DoRA", "our DoRA"))
    seconds = step["SDXL UNet, 256 px", 16, "PEFT LoRA"]
    sentence = f"{theirs / seconds:.2f} times LoRA's with PEFT's DoRA, and {ours / seconds:.2f} times with our DoRA"
    assert sentence in " ".join(readme.split())


def steps(file: str) -> dict[tuple[str, int, str], float]:
    """The median of a step by case, rank and contender."""
    found = results_table.read_results(ROOT / "tests/benchmarks/results" / file)
    return {(r.case, r.rank, r.contender): r.median for r in found if r.measure == "step"}


# --- the contenders --------------------------------------------------------------------------------------------------


DORA = {name: CONTENDERS[name] for name in ("PEFT DoRA", "PEFT DoRA, fused", "our DoRA")} | DENSE


def adapter(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A, B and m by what their names have in common."""
    found = {}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            found["m" if "magnitude" in name else "A" if "A" in name.replace("lora_", "") else "B"] = parameter
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_every_dora_computes_the_same(bias):
    base = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    x, dY = torch.randn(7, 12, requires_grad=True), torch.randn(7, 20)
    values = {"A": torch.randn(3, 12), "B": torch.randn(20, 3), "m": base.weight.norm(dim=1) * (1 + torch.rand(20))}
    results = {}
    for name, build in DORA.items():
        layer = build(base, 3)
        parameters = adapter(layer)
        assert {*parameters} == {*values}
        for key, value in values.items():
            parameters[key].data.copy_(value)
        y = layer(x)
        results[name] = [y, *torch.autograd.grad(y, [x, *(parameters[key] for key in "ABm")], dY)]
    expected = results.pop("our DoRA")
    for found in results.values():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", DENSE.values(), ids=DENSE)
def test_a_fresh_dense_layer_computes_what_the_base_does(build):
    base = nn.Linear(12, 20).requires_grad_(False)
    x = torch.randn(7, 12)
    torch.testing.assert_close(build(base, 3)(x), base(x))
    assert len(trained(build(base, 3))) == 3


def test_contenders_take_turns_on_the_same_weights():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    weights = [net[0].weight, net[2].weight]
    assert target_paths(net, ["0", "2"]) == ["0", "2"]
    layers = contending_layers(net, ["0", "2"], 2, DORA)
    assert type(net[0]) is nn.Linear
    x = torch.randn(5, 6)
    expected = net(x)
    for own in layers.values():
        set_layers(net, own)
        assert net[0] is own["0"]
        torch.testing.assert_close(net(x), expected)
        assert all(any(w is p for p in net.parameters()) for w in weights)


def test_scores_of_wordnet_questions(tmp_path, capsys):
    """Of each task one group of rows is answered right and one wrong; the second run answers all right."""
    tasks, right = [], {}
    for task, count in wordnet_scores.ROWS.items():
        options = {"boolq": "true/false", "hellaswag": "ending1/ending2", "arc_easy": "answer1/answer2"}[task]
        row = {"instruction": f"Which: one?\n\nAnswer format: {options}", "output": f"it is {options.split('/')[0]}"}
        file = tmp_path / f"{task}.json"
        file.write_text(json.dumps([row] * 2 * count))
        tasks.append({"task": task, "valid": {"format": "commonsense", "file": str(file)}})
        right[task] = [True] * count + [False] * count
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        config = {"pipeline": "eval_vl", "model": {"path": "some"}, "data": {"tasks": tasks}}
        (folder / "config.yaml").write_text(json.dumps(config))
        for task, values in right.items():
            first = {"boolq": "true", "hellaswag": "ending1", "arc_easy": "answer1"}[task]
            lines = [{"id": "1", "answer": first if value or name == "second" else "none"} for value in values]
            (folder / f"predictions_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wordnet_scores.main([f"bare={tmp_path / 'first'}", f"tuned={tmp_path / 'second'}"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    found = {(row["run"], row["task"]): (row["rows"], row["mean"]) for row in rows}
    assert found["bare", "boolq"] == found["tuned - bare", "arc_easy"] == ("8", "50.00")
    assert found["tuned", "mean"] == ("20", "100.00")
    assert all(float(row["low"]) <= float(row["mean"]) <= float(row["high"]) for row in rows)
