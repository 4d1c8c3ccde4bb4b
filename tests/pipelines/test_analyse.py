"""dora-mm analyse on runs, files of other tools, fine-tuned models and campaigns of a tiny SDXL."""

import csv
import shutil

import pytest
import torch
import yaml
from PIL import Image

from dora_mm import DoRASpec, inject, save_adapter
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.core import adapter_parameters
from dora_mm.models.images.families import load_image_model
from dora_mm.recipes import PIPELINES
from dora_mm.studies.campaigns.training_rows import TrainingRows, row_of
from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.decomposition import weight_change
from dora_mm.studies.variants import Variant

pytest.importorskip("matplotlib")


def rows_of(folder):
    return list(csv.DictReader((folder / "changes.csv").open()))


@pytest.fixture(scope="module")
def adapted(tiny_folder, tmp_path_factory):
    """Adapters of three methods, their weights by module, and the base's."""
    folder, weights = tmp_path_factory.mktemp("adapters"), {}
    for method in ("dora", "lora", "magnitude"):
        model = load_image_model(ModelConfig(path=str(tiny_folder)))
        base = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
        inject(model.unet, "sdxl-unet", DoRASpec(rank=2, method=method))
        stream = torch.Generator().manual_seed(3)
        for name, parameter in adapter_parameters(model.unet).items():
            if not name.endswith("lora_A"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=stream)
        save_adapter({"unet": model.unet}, folder / method, format="native")
        layers = {n: m for n, m in model.unet.named_modules() if hasattr(m, "adaptation")}
        for layer in layers.values():
            layer.merge(keep_base=False)
        weights[method] = {n: (m.weight.detach(), base[f"{n}.weight"]) for n, m in layers.items()}
    return folder, weights


def test_every_matrix_is_that_of_the_merged_model(adapted, tiny_folder, tmp_path, capsys):
    folder, weights = adapted
    names = ("dora", "lora", "magnitude")
    output = tmp_path / "new"
    command = ["analyse", *(str(folder / name) for name in names), "--base", str(tiny_folder)]
    assert main([*command, "--output", str(output)]) == 0
    rows = rows_of(output)
    assert len(rows) == sum(map(len, weights.values()))
    for row in rows:
        method = row["method"].split(",")[0]
        expected = weight_change(*weights[method][row["matrix"].removeprefix("unet.")])
        assert (float(row["dM"]), float(row["dD"])) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    methods = {row["method"]: row for row in csv.DictReader((output / "methods.csv").open())}
    assert list(methods) == ["dora, rank 2", "lora, rank 2", "magnitude"]
    assert float(methods["magnitude"]["dD_mean"]) < 1e-9
    assert float(methods["dora, rank 2"]["slope_low"]) < float(methods["dora, rank 2"]["slope_high"])
    assert "| dora, rank 2 | 1 |" in capsys.readouterr().out
    with Image.open(output / "changes.png") as figure:
        assert figure.width > figure.height
    assert main([*command, "--output", str(output)]) == 2  # nothing is overwritten


def test_a_file_of_another_tool_and_a_merged_model_show_the_same(adapted, tiny_folder, tmp_path):
    source = str(adapted[0] / "dora")
    for to, out in (("kohya", "kohya.safetensors"), ("merged", "merged")):
        assert main(["convert", source, str(tmp_path / out), "--to", to, "--base", str(tiny_folder)]) == 0
    tables = []
    for name in (source, str(tmp_path / "kohya.safetensors"), str(tmp_path / "merged")):
        output = tmp_path / f"of{len(tables)}"
        arguments = [name, "--base", str(tiny_folder), "--modules", r".*attn1\.to_q", "--output", str(output)]
        assert main(["analyse", *arguments]) == 0
        tables.append({row["matrix"]: (float(row["dM"]), float(row["dD"])) for row in rows_of(output)})
    assert all(table.keys() == tables[0].keys() for table in tables)
    for matrix, numbers in tables[0].items():
        assert tables[1][matrix] == pytest.approx(numbers, rel=1e-3)
        assert tables[2][matrix] == pytest.approx(numbers, rel=1e-3)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A training of two steps that has kept a checkpoint of each."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 20, 40)).save(folder / "pictures" / f"{number}.png")
    config = {
        "pipeline": "train_diffusion",
        "output": str(folder / "run"),
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "parts": ["unet.attn"]},
        "data": {"folder": str(folder / "pictures"), "resolution": 64, "instance_prompt": "a TOK icon"},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 2, "batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "gradients_at": [0, 1]},
        "sample": {"prompts": []},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def test_a_run_shows_every_kept_checkpoint_and_its_gradients(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["analyse", str(run)]) == 0
    gradients = list(csv.DictReader((tmp_path / "runs" / "analysis" / "001" / "gradients.csv").open()))
    assert {row["step"] for row in gradients} == {"0", "1"}
    assert all(float(row["exact"]) < 1.05 for row in gradients if row["step"] == "0")
    assert "| dora, rank 2 | 0 |" in capsys.readouterr().out
    rows = rows_of(tmp_path / "runs" / "analysis" / "001")
    assert {row["step"] for row in rows} == {"1", "2"}
    assert all(float(row["dD"]) > 0 for row in rows if row["step"] == "2")


def test_a_campaign_shows_its_trainings_with_their_scores(run, tmp_path, capsys, caplog):
    campaign = tmp_path / "campaign"
    values = {"0.001": 0.2, "0.01": 0.5, "0.1": 0.4, "1e-05": 0.1}
    campaign.mkdir()
    trainings = [Training(Variant("dora", 2), float(rate), 0) for rate in values]
    scored = dict(zip(trainings, values.values(), strict=True)) | {Training(Variant("dora", 2), 0.01, 1): None}
    rows = [
        row_of(each, value=value, scores="", summary={}, circumstances=[], digest="") for each, value in scored.items()
    ]
    TrainingRows(campaign / "trainings.csv", lambda _: "").add(rows)
    saved = {
        "pipeline": "compare",
        "output": str(campaign),
        "base": "base.yaml",
        "steps": 2,
        "ranks": [2],
        "seeds": [0, 1],
    }
    rates = {method: [1e-3, 1e-2, 1e-1] for method in ("lora", "dora")}
    judged = {"classifier": "j", "style": "3d", "prompt": "a TOK icon of {thing}"}
    judged |= {"tune": {"role": "tune"}, "report": {"role": "report", "count": 3}}
    saved |= {"learning_rates": rates, "images": judged}
    (campaign / "config.yaml").write_text(yaml.safe_dump(saved))
    for rate in (*values, "0.01-seed1"):
        name = f"dora-r2-lr{rate}" if "seed" in rate else f"dora-r2-lr{rate}-seed0"
        shutil.copytree(run, campaign / "runs" / name, ignore=shutil.ignore_patterns("checkpoints"))
    unfinished = campaign / "runs" / "dora-r2-lr0.1-seed1"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    assert main(["analyse", str(campaign), "--output", str(tmp_path / "new")]) == 0
    scores = {row["run"]: row["score"] for row in rows_of(tmp_path / "new")}
    assert scores == {**{f"dora-r2-lr{rate}-seed0": f"{v:g}" for rate, v in values.items()}, "dora-r2-lr0.01-seed1": ""}
    trainings = csv.DictReader((tmp_path / "new" / "scored_trainings.csv").open())
    assert {row["run"]: float(row["score"]) for row in trainings} == {
        f"dora-r2-lr{rate}-seed0": value for rate, value in values.items()
    }
    shown = capsys.readouterr()
    assert "| dora, rank 2 | 5 |" in shown.out
    assert "1 of 6 trainings are not finished" in caplog.text
    gradients = list(csv.DictReader((tmp_path / "new" / "gradients.csv").open()))
    assert {row["run"] for row in gradients} == set(scores)
    matrices = {row["matrix"] for row in gradients}
    assert f"| dora, rank 2 | 0 | 5 | {len(matrices)} |" in shown.out


def test_runs_of_one_name_are_two_and_one_run_is_not_given_twice(run, tmp_path, capsys):
    for name in ("one/001", "two/001"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    paths = [str(tmp_path / name) for name in ("one/001", "two/001")]
    assert main(["analyse", *paths, "--output", str(tmp_path / "new")]) == 0
    assert {row["run"] for row in rows_of(tmp_path / "new")} == {"one/001", "two/001"}
    assert "| dora, rank 2 | 2 |" in capsys.readouterr().out
    assert main(["analyse", paths[0], paths[0]]) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "give its base model with --base"),
        (["nowhere", "--base", "{base}"], "nowhere does not exist"),
        (["{adapter}", "--base", "{base}", "--modules", "nothing"], "no trained matrix has such a name"),
        (["{adapter}", "--base", "{base}", "--modules", "("], "is no regular expression"),
        (["{base}", "--base", "{base}"], "no matrix differs from"),
    ],
)
def test_mistakes(adapted, tiny_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(adapter=adapted[0] / "dora", base=tiny_folder) for argument in arguments]
    assert main(["analyse", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_stops_while_it_writes_is_repeated(adapted, tiny_folder, tmp_path, monkeypatch):
    """The folder appears with all of its files."""
    output = tmp_path / "new"
    command = ["analyse", str(adapted[0] / "dora"), "--base", str(tiny_folder), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(PIPELINES.load("analyse"), "plot_patterns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    assert {"changes.csv", "methods.csv", "analysis.md", "changes.svg"} <= {path.name for path in output.iterdir()}
