"""fit_judge, eval_sdxl and compare_sdxl end to end on a random model: files, resuming, and what bad input gets."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.eval.comparison import Variant, contrasts, variants
from dora_mm.eval.judge import Judge
from dora_mm.eval.scores import Scores
from pipelines import compare_sdxl

PROMPT = "a TOK icon of {thing}, in the style of TOK"


def write(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_folder, icons):
    """A judge for the random model, fitted by the pipeline."""
    folder = tmp_path_factory.mktemp("judges")
    config = {
        "pipeline": "fit_judge",
        "output": str(folder / "judge"),
        "model": {"path": str(tiny_folder)},
        "icons": str(icons),
    }
    assert main(["eval", write(folder / "judge.yaml", config)]) == 0
    return folder / "judge"


@pytest.fixture
def base(tmp_path, tiny_folder, picture_folder):
    config = {
        "pipeline": "train_sdxl",
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "alpha": 7.0},
        "data": {"folder": str(picture_folder), "resolution": 64, "placeholder": "TOK"},
        "optimizer": {"lr": 0.01, "magnitude_lr": 0.1},
        "train": {"steps": 2, "batch_size": 2},
        "sample": {"prompts": ["a TOK icon of a bus"], "steps": 2},
    }
    return write(tmp_path / "base.yaml", config)


@pytest.fixture
def evaluation(tmp_path, tiny_folder, fitted):
    def config(**changes):
        values = {
            "pipeline": "eval_sdxl",
            "output": str(tmp_path / "scores"),
            "model": {"path": str(tiny_folder)},
            "judge": str(fitted),
            "style": "3d",
            "prompt": PROMPT,
            "concepts": {"role": "report", "count": 3, "seeds": [0, 1]},
            "draw": {"steps": 2, "batch_size": 6},
        }
        return write(tmp_path / "eval.yaml", {**values, **changes})

    return config


@pytest.fixture
def comparison(tmp_path, base, fitted):
    def config(**changes):
        rates = [1e-3, 1e-2, 1e-1]
        values = {
            "pipeline": "compare_sdxl",
            "output": str(tmp_path / "campaign"),
            "base": base,
            "steps": 1,
            "ranks": [2],
            "learning_rates": {method: list(rates) for method in ("full", "lora", "dora")},
            "judge": str(fitted),
            "style": "brick",
            "prompt": PROMPT,
            "tune": {"role": "tune", "count": None, "seeds": [0]},
            "report": {"role": "report", "count": 3, "seeds": [0, 1]},
            "draw": {"steps": 1, "batch_size": 6},
            "columns": 2,
        }
        return write(tmp_path / "compare.yaml", {**values, **changes})

    return config


def test_fit_judge_leaves_a_judge_and_says_what_it_is_worth(fitted, tiny_folder, capsys):
    judge = Judge.load(fitted)
    assert judge.origin["resolution"] == 64
    assert (fitted / "config.yaml").is_file()
    # a random VAE leaves nothing of bricks or shading, and the judge says so
    assert judge.shortcomings()


def test_eval_scores_the_bare_model_and_an_adapter(evaluation, base, tmp_path, capsys):
    assert main(["train", base, "--set", f"output={tmp_path / 'run'}", "--set", "sample.prompts=[]"]) == 0
    assert main(["eval", evaluation(adapter={"path": str(tmp_path / "run" / "adapter")})]) == 0
    folder = tmp_path / "scores"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["rows"]) == ["bare model, flat prompts", "bare model", "adapter"]
    for row in metrics["rows"].values():
        assert set(row) == {"style", "log_odds", "frechet", "concept", "both"}
        assert row["style"]["low"] <= row["style"]["mean"] <= row["style"]["high"]
    assert Scores.load(folder / "scores" / "adapter.json").ranks.shape == (3, 2)
    assert (folder / "sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "| adapter |" in printed
    assert "concepts that it has not seen" in printed
    assert (folder / "table.md").read_text().strip() in printed


def test_eval_without_an_adapter_and_with_clip(evaluation, tmp_path, picture_folder, clip_folder, capsys):
    clip = {"path": str(clip_folder), "images": str(picture_folder)}
    assert main(["eval", evaluation(clip=clip)]) == 0
    rows = json.loads((tmp_path / "scores" / "metrics.json").read_text())["rows"]
    assert list(rows) == ["bare model, flat prompts", "bare model"]
    assert -1 <= rows["bare model"]["CLIP text similarity"]["mean"] <= 1
    assert "CLIP image similarity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "nowhere"}, "judge: nowhere does not exist"),
        ({"prompt": "a TOK icon"}, "prompt must hold {thing} once"),
        ({"concepts": {"role": "report", "count": 7}}, "has 6 with role report, not 7"),
        ({"adapter": {"path": "nowhere"}}, "adapter.path: nowhere does not exist"),
        ({"clip": {"path": "./nowhere"}}, "clip.path: ./nowhere does not exist"),
        ({"concepts": {"role": "report", "count": 2}}, "concepts.count: must be greater than or equal to 3"),
        ({"adapter": {"path": "other.safetensors"}}, "made for another architecture"),
        ({"clip": {"path": "CLIP", "images": "empty"}}, "clip.images: empty holds no pictures"),
    ],
)
def test_eval_says_what_is_wrong_before_it_draws(evaluation, tmp_path, capsys, changes, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = {"unet.odd.lora_A.weight": torch.ones(1, 2), "unet.odd.lora_B.weight": torch.ones(2, 1)}
    save_file(odd, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    assert main(["eval", evaluation(**changes)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_eval_refuses_another_models_judge(evaluation, tmp_path, tiny, capsys):
    tiny.vae.decoder.conv_in.bias.data += 0.1
    tiny.pipeline().save_pretrained(tmp_path / "other")
    assert main(["eval", evaluation(model={"path": str(tmp_path / "other")})]) == 2
    assert "another VAE" in capsys.readouterr().err


class Finished:
    """A process that has ended well."""

    returncode = 0

    def poll(self):
        return 0


def test_comparison_trains_scores_and_reports(comparison, tmp_path, monkeypatch, capsys):
    commands = []

    def in_this_process(training, arguments, log_file, threads):
        commands.append(arguments)
        assert main(arguments) == 0
        return compare_sdxl.Job(training, Finished(), log_file)

    monkeypatch.setattr(compare_sdxl, "start_job", in_this_process)
    config = comparison(extra_rates=0)
    assert main(["eval", config]) == 0
    # full, LoRA 2, DoRA 1 and 2: three rates each, and one more training of the best for the second seed
    assert len(commands) == 4 * (3 + 1)
    folder = tmp_path / "campaign"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["name"] for row in rows] == [
        "bare model, flat prompts",
        "bare model",
        "full fine-tuning",
        "LoRA, rank 2",
        "DoRA, rank 2",
        "DoRA, half of rank 2",
    ]
    assert float(rows[-1]["parameters"]) < float(rows[-2]["parameters"])
    table = (folder / "table.md").read_text()
    assert "DoRA, rank 2 - LoRA, rank 2" in table
    assert "of 16 intervals exclude 0" in table
    assert (folder / "sheet.png").is_file()
    trained = load_config(next((folder / "runs").glob("lora-r2-*")) / "config.yaml")
    assert (trained.adapter.alpha, trained.optimizer.magnitude_lr, trained.train.steps) == (2.0, None, 1)
    assert len(list((folder / "pictures").glob("bare-model-report/*.png"))) == 6

    # Started again it does nothing but the report; a training that was lost is made up for.
    before = table
    commands.clear()
    (folder / "table.md").unlink()
    assert main(["eval", config]) == 0
    assert commands == []
    assert (folder / "table.md").read_text() == before

    assert main(["eval", comparison(extra_rates=0, workers=2, columns=1)]) == 0  # these change no number
    assert main(["eval", comparison(extra_rates=0, steps=2)]) == 2
    assert "started with other values of steps" in capsys.readouterr().err


def test_comparison_of_other_weights_or_another_judge_is_not_gone_on_with(
    comparison, base, fitted, tmp_path, tiny, capsys
):
    compare_sdxl.Campaign(load_config(comparison()))
    Path(base).write_text(Path(base).read_text() + "loss: {min_snr_gamma: 1.0}\n")
    with pytest.raises(ValueError, match="started with other values of base:"):
        compare_sdxl.Campaign(load_config(comparison()))
    other = tmp_path / "other"
    tiny.unet.conv_out.bias.data += 0.1
    tiny.pipeline().save_pretrained(other)
    values = yaml.safe_load(Path(base).read_text())
    write(tmp_path / "elsewhere.yaml", {**values, "loss": {}, "model": {"path": str(other)}})
    with pytest.raises(ValueError, match="the model's unet: name another"):
        compare_sdxl.Campaign(load_config(comparison(base=str(tmp_path / "elsewhere.yaml"))))


def test_a_training_that_was_cut_off_goes_on(comparison, tmp_path, monkeypatch):
    campaign = compare_sdxl.Campaign(load_config(comparison()))
    training = compare_sdxl.Training(Variant("lora", 2), 0.01, 0)
    commands = []

    def start(training, arguments, log_file, threads):
        commands.append(arguments)
        return compare_sdxl.Job(training, Finished(), log_file)

    monkeypatch.setattr(compare_sdxl, "start_job", start)
    campaign.train([training])
    assert commands[-1][:2] == ["train", campaign.config.base]
    run = campaign.run_folder(training)
    run.mkdir(parents=True)
    campaign.train([training])  # killed before the run had its config
    assert commands[-1][:2] == ["train", campaign.config.base]
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    campaign.train([training])
    assert commands[-1] == ["train", "--resume", str(run)]
    (run / "summary.json").touch()
    campaign.train([training])
    assert len(commands) == 3


class Stub:
    """Real processes in place of trainings: they sleep, and end with `status`."""

    def __init__(self, seconds, status=0):
        self.seconds, self.status = seconds, status
        self.started = []

    def __call__(self, training, arguments, log_file, threads):
        code = f"import time, sys; time.sleep({self.seconds}); sys.exit({self.status})"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("dora-mm: a sentence")
        process = subprocess.Popen([sys.executable, "-c", code])
        self.started.append((process, threads))
        return compare_sdxl.Job(training, process, log_file)


@pytest.fixture
def six(comparison):
    campaign = compare_sdxl.Campaign(load_config(comparison(workers=2)))
    return campaign, [compare_sdxl.Training(Variant("lora", 2), 0.01, seed) for seed in range(6)]


def test_trainings_run_side_by_side(six, monkeypatch):
    campaign, trainings = six
    stub = Stub(0.0)
    at_once = []

    def start(*args):
        job = stub(*args)
        at_once.append(sum(process.poll() is None for process, _ in stub.started))
        return job

    monkeypatch.setattr(compare_sdxl, "start_job", start)
    campaign.train(trainings)
    assert len(stub.started) == 6
    assert max(at_once) == 2
    assert {threads for _, threads in stub.started} == {max(1, torch.get_num_threads() // 2)}


def test_a_failure_stops_the_trainings_beside_it(six, monkeypatch):
    campaign, trainings = six
    slow, failing = Stub(60.0), Stub(0.0, status=2)
    monkeypatch.setattr(
        compare_sdxl, "start_job", lambda training, *rest: (failing if training.seed else slow)(training, *rest)
    )
    with pytest.raises(ValueError, match="a training of the comparison stopped: dora-mm: a sentence"):
        campaign.train(trainings)
    assert len(slow.started) == len(failing.started) == 1
    assert slow.started[0][0].returncode == -signal.SIGTERM


def test_an_interruption_reaches_the_trainings(six, monkeypatch):
    campaign, trainings = six
    stub = Stub(60.0)
    monkeypatch.setattr(compare_sdxl, "start_job", stub)
    monkeypatch.setattr(compare_sdxl.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        campaign.train(trainings)
    assert [process.returncode for process, _ in stub.started] == [-signal.SIGTERM] * 2


def test_the_best_rate_at_an_end_asks_for_one_beyond(comparison, monkeypatch):
    campaign = compare_sdxl.Campaign(load_config(comparison(extra_rates=2)))
    asked = []

    def tuned(training):
        asked.append(training.rate)
        return training.rate if training.variant.method == "dora" and training.rate < 5 else -abs(training.rate - 0.01)

    monkeypatch.setattr(campaign, "train", lambda trainings: None)
    monkeypatch.setattr(campaign, "tuned", tuned)
    dora, lora = Variant("dora", 2), Variant("lora", 2)
    chosen = compare_sdxl.choose_rates(campaign, [dora, lora])
    assert asked == pytest.approx([1e-3, 1e-2, 1e-1, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    assert chosen == {dora: (pytest.approx(1.0), False), lora: (1e-2, False)}
    tried = json.loads((campaign.folder / "rates" / "dora-r2.json").read_text())
    assert len(tried) == 5
    assert compare_sdxl.beyond({1e-3: 3.0, 1e-2: 2.0}) == pytest.approx(1e-4)


def test_a_failing_training_is_a_sentence(tmp_path, monkeypatch):
    training = compare_sdxl.Training(Variant("lora", 2), 0.01, 0)
    job = compare_sdxl.start_job(training, ["train", "nowhere.yaml"], tmp_path / "logs" / "x.txt", 1)
    job.process.wait()
    with pytest.raises(ValueError, match=r"a training of the comparison stopped: dora-mm: .*nowhere\.yaml"):
        compare_sdxl.check_job(job)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    job = compare_sdxl.start_job(training, ["train", "some.yaml"], tmp_path / "logs" / "y.txt", 1)
    job.process.wait()
    with pytest.raises(RuntimeError, match="exit code 1"):
        compare_sdxl.check_job(job)


def test_comparison_says_what_is_wrong(comparison, capsys, tmp_path):
    assert main(["eval", comparison(base="configs/sdxl/eval_tiny.yaml")]) == 2
    assert "is a config of eval_sdxl" in capsys.readouterr().err
    assert main(["eval", comparison(tune={"role": "report", "count": 3})]) == 2
    assert "tune.role and report.role must differ" in capsys.readouterr().err
    (tmp_path / "campaign").mkdir()
    assert main(["eval", comparison()]) == 2
    assert "exists and is no comparison" in capsys.readouterr().err


def test_what_is_compared():
    wanted = variants((1, 4, 8))
    assert [variant.key for variant in wanted] == [
        "full",
        "lora-r1",
        "lora-r4",
        "lora-r8",
        "dora-r1",
        "dora-r2",
        "dora-r4",
        "dora-r8",
    ]
    pairs = contrasts((1, 8))
    assert (Variant("dora", 4), Variant("lora", 8)) in pairs
    assert all(variant in variants((1, 8)) for pair in pairs for variant in pair)
    assert not any(first.rank == 0 for first, _ in pairs)
