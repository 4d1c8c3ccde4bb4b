"""What a candidate changes of a training, and the config with what was chosen."""

import shlex
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.loader import differing_keys
from dora_mm.recipes import PIPELINES
from dora_mm.studies.campaigns.halving import Candidate
from dora_mm.studies.campaigns.tuned import changes_for, check_trainings, overrides_of, training_of
from dora_mm.studies.campaigns.tuning import advice, write_tuned
from dora_mm.studies.config import TuneConfig

BASE = """\
# my style
pipeline: train_diffusion
model: {path: samples/tiny-sdxl}
adapter:
  rank: 8 # enough
  alpha: 16.0
  parts:
    unet.attn: {}
    text_encoder.attn: {lr: 1.0e-4} # slower
data: {folder: samples/lego, resolution: 64, instance_prompt: a lego set in the style of TOK}
tokens: {TOK: {lr: 2.0e-3}}
optimizer:
  lr: 1.0e-3 # to be found
  magnitude_lr: 4.0e-3
schedule: {warmup_steps: 20}
train: {steps: 100, batch_size: 2, stop_tokens_after: 50, gradients_at: [90]}
sample: {prompts: [a TOK], every: 50}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "style.yaml"
    path.write_text(BASE)
    return path


def search(file, **changes):
    values = {"pipeline": "tune", "name": "a", "output": "out", "base": str(file), "rates": [1e-3, 1e-2], **changes}
    return TuneConfig.model_validate(values)


def trained(config, file, candidate, steps):
    base = load_config(file, config.overrides)
    trainings = SimpleNamespace(base=base, steps=100)
    training = training_of(base, candidate, steps)
    own = ["sample.prompts=[]", "sample.every=0"]
    return training, load_config(file, [*overrides_of(config, trainings, training), *own])


def test_a_shorter_training_has_a_whole_schedule_and_all_rates_in_proportion(file):
    training, short = trained(search(file), file, Candidate(16, 1e-2), 25)
    assert training.name == "dora-r16-25_steps-lr0.01-seed0"
    assert (short.train.steps, short.schedule.warmup_steps, short.train.stop_tokens_after) == (25, 5, 12)
    assert (short.adapter.rank, short.adapter.alpha) == (16, 32.0)
    assert (short.optimizer.lr, short.optimizer.magnitude_lr) == (1e-2, 4e-2)
    assert short.adapter.parts["text_encoder.attn"].lr == 1e-3
    assert short.adapter.parts["unet.attn"].lr is None
    assert short.tokens["TOK"].lr == 2e-2
    assert short.train.gradients_at == ()


def test_steps_take_the_place_of_epochs(file):
    file.write_text(BASE.replace("steps: 100,", "epochs: 1,").replace("schedule: {warmup_steps: 20}\n", ""))
    _, short = trained(search(file, overrides=["train.epochs=4"]), file, Candidate(16, 1e-2), 25)
    assert (short.train.steps, short.train.epochs) == (25, None)


def test_alpha_stays_with_scaling_sqrt(file):
    config = search(file, overrides=["adapter.scaling=sqrt"])
    base = load_config(file, config.overrides)
    assert changes_for(base, Candidate(32, 1e-3))["adapter", "alpha"] == 16.0
    assert ("adapter", "rank") not in changes_for(base, Candidate(8, 1e-3))


@pytest.mark.parametrize("overrides", [[], ["sample.steps=3", "ema.decay=0.9"], ["schedule.warmup_ratio=0.1"]])
def test_the_config_with_what_was_chosen_is_the_persons_with_its_comments(file, overrides, tmp_path):
    config = search(file, overrides=overrides)
    base = load_config(file, overrides)
    written = write_tuned(config, base, Candidate(4, 3.2e-3), tmp_path / "that was tuned.yaml")
    found = load_config(written)
    keys = {"optimizer.lr", "optimizer.magnitude_lr", "adapter.rank", "adapter.alpha"}
    keys |= {"tokens.TOK.lr", "adapter.parts.text_encoder.attn.lr"}
    assert set(differing_keys(base, found)) == keys
    assert (found.name, found.optimizer.lr, found.adapter.rank, found.adapter.alpha) == ("style", 3.2e-3, 4, 8.0)
    has_comments = "schedule.warmup_ratio=0.1" not in overrides  # it takes the place of warmup_steps
    assert ("# to be found" in written.read_text()) == has_comments
    assert written.read_text().startswith(f"# dora-mm train {shlex.quote(str(written))}\n")


def test_ranks_of_parts_would_hide_those_that_are_tried(file):
    file.write_text(BASE.replace("unet.attn: {}", "unet.attn: {rank: 2}"))
    trainings = SimpleNamespace(base=load_config(file), steps=100)
    with pytest.raises(ValueError, match=r"gives unet.attn a rank of its own in adapter.parts"):
        check_trainings(search(file), trainings, [Candidate(4, 1e-3)])


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"optimizer": {"name": "prodigy", "lr": 1.0}},
            [],
            "prodigy finds its rate itself: give --ranks",
        ),
        ({}, ["--rates", "1e-3"], "one rate at one rank leaves nothing to choose"),
        ({}, ["--rates", "1e-3", "1e-3"], "rates names a rate twice"),
        ({}, ["--selection-metric", "held_out", "--clip-model", "samples"], "clip_model has no effect"),
        ({}, ["--selection-metric", "held_out"], "holds no images out: --set data.valid.share=0.1"),
        ({}, ["--set", "adapter.method=magnitude", "--ranks", "2", "4"], "adapter.method magnitude has no rank"),
        ({}, ["--set", "optimiser.lr=1"], "did you mean 'optimizer'"),
    ],
)
def test_mistakes_have_a_sentence_before_anything_is_made(changes, flags, message, tmp_path, capsys, monkeypatch):
    base = load_config("configs/sdxl/tiny_lego.yaml").model_dump(mode="json", exclude_defaults=True)
    values = {**base, "pipeline": "train_diffusion", **changes}
    values["data"]["folder"] = str(small_folder(tmp_path))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    assert main(["tune", str(tmp_path / "base.yaml"), *flags, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_search_has_its_own_settings(file, tmp_path, capsys):
    values = search(file).model_dump(mode="json")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    assert main(["tune", str(tmp_path / "search.yaml"), "--rates", "1", "2"]) == 2
    assert "is a search with its own settings: --set changes them" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "search.yaml")]) == 2
    assert "needs another command: dora-mm tune" in capsys.readouterr().err
    assert main(["tune", "configs/sdxl/jobs.yaml"]) == 2
    assert "tune takes one of dora-mm train" in capsys.readouterr().err


def small_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_default_rates_are_half_decades_that_the_optimizer_takes():
    recipe = PIPELINES.load("tune")
    base = load_config("configs/sdxl/tiny_lego.yaml")
    assert recipe.default_rates(base, "x", None) == [1.2e-4, 3.8e-4, 1.2e-3, 3.8e-3, 1.2e-2]
    high = load_config("configs/sdxl/tiny_lego.yaml", ["optimizer.lr=0.3"])
    assert recipe.default_rates(high, "x", None) == [0.03, 0.095, 0.3, 0.95]
    prodigy = load_config("configs/sdxl/lego.yaml")
    assert recipe.default_rates(prodigy, "x", [4, 8]) == [1.0]


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ({1e-4: "not distinguishable", 1e-3: "not distinguishable"}, "give more train.steps, or higher rates"),
        ({1e-4: "worse", 1e-3: "worse"}, "a rate of 0.0001 is worse than the bare model: give lower rates"),
        (
            {1e-4: "not distinguishable", 3e-4: "not distinguishable", 1e-3: "worse", 1e-2: "diverged"},
            "a rate of 0.001 is worse than the bare model, and 0.0003 is not distinguishable from it: give rates "
            "between them, or more train.steps",
        ),
        ({1e-4: "", 1e-3: ""}, "give more train.steps, or higher rates"),
    ],
)
def test_rates_that_destroy_the_images_are_answered_with_lower_ones(verdicts, message):
    """Of two rates, the higher of which destroyed the images, the advice was higher ones."""
    assert advice(verdicts) == message


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(file, tmp_path, capsys):
    command = ["tune", str(file), "--rates", "1e-4", "1e-3", "1e-2", "1e-1", "--output", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    steps = load_config(file).train.steps
    assert "rates     0.0001, 0.001, 0.01, 0.1\n" in printed
    assert f"trainings 4 of {steps // 4} steps, 2 of {steps // 2} steps, 1 of {steps} steps: " in printed
    assert f"at most   4 of {steps // 4} steps, 4 of {steps // 2} steps, 4 of {steps} steps: " in printed
    assert "7 times one training: all go on while none has learned anything" in printed
    assert not (tmp_path / "out").exists()
