"""Pairs of answers: their losses, and the model as the training started, which they are compared with."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from pydantic import ValidationError

from dora_mm.adapting.networks import adapt
from dora_mm.cli import main
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import PreferenceConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.rows import RowTooLongError
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.tasks.preferences import KeptReference, Preferences, pair_losses, pairs_of, without_adapters
from dora_mm.train.state_file import read_state
from tests.shared.data.chats import messages
from tests.shared.data.vlm_rows import write_images
from tests.shared.killed import assert_same_weights
from tests.shared.vl import tiny_vlm as tiny

GROUPED = "mllama"  # whose rows are computed in groups of as many images
FULL = {"rank": 2, "parts": {"text.attn": {}, "connector": {"method": "full"}}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("pictures")))


def example(number: int, images: tuple[str, ...], chosen: str, rejected: str) -> Example:
    asked = Turn("user", IMAGE * len(images) + "What is it?", False)
    said = [(asked, Turn("assistant", text, True)) for text in (chosen, rejected)]
    return Example(str(number), images, "What is it?", (chosen,), (1.0,), turns=said[0], rejected=said[1])


ROWS = [
    example(0, ("wide.png",), "red", "blue, or so"),
    example(1, ("tall.png", "square.png"), "They are not the same.", "no"),
    example(2, ("square.png",), "grey", "it is a cat"),
]


def model(tiny_vlm, name="qwen2_5_vl", config=None, **settings) -> VLM:
    """A model with a fresh adapter."""
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm(name)), **settings))
    adapt(vlm.networks, vlm.target_maps, VLAdapterConfig.model_validate(config or {"rank": 2}), seed=0, backend="torch")
    return vlm


def moved(vlm: VLM) -> None:
    """A model as if it had been trained for a while."""
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def table(rows) -> dict[str, TrainingSet]:
    return {"preference": TrainingSet(rows, None, 2)}


@pytest.mark.parametrize("settings", [{}, {"loss": "robust", "label_smoothing": 0.1}, {"label_smoothing": 0.2}])
def test_losses_are_those_of_their_papers(settings):
    config = PreferenceConfig(beta=0.3, **settings)
    ratios, counts = torch.tensor([[2.0, -1.0, 30.0], [1.0, 4.0, -900.0]]), torch.ones(2, 3)
    smoothing = config.label_smoothing
    for found, chosen, rejected in zip(pair_losses(config, ratios, counts).tolist(), *ratios.tolist(), strict=True):
        right = 1 / (1 + math.exp(-0.3 * (chosen - rejected)))
        wrong = 0.3 * (chosen - rejected) - math.log(right)  # -log of 1 - right, where that is 0 in float64, too
        expected = (1 - smoothing) * -math.log(right) + smoothing * wrong * (-1 if config.loss == "robust" else 1)
        assert found == pytest.approx(expected / (1 - 2 * smoothing if config.loss == "robust" else 1), rel=1e-5)


FAST = ("qwen2_5_vl", GROUPED)
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*tiny.NAMES, *tiny.NEWER)]


@pytest.mark.parametrize("name", ALL)
def test_a_fresh_adapter_prefers_nothing_bit_for_bit_and_the_reference_stays(name, tiny_vlm, images):
    vlm = model(tiny_vlm, name)
    rows = [row for row in ROWS if vlm.reads_several or len(row.images) == 1]
    batch = pairs_of(vlm, "preference", rows, images, "stop")
    preferences = Preferences(vlm, PreferenceConfig(), without_adapters(vlm))
    before = preferences.reference(batch)
    assert torch.equal(preferences.margins(batch), torch.zeros(len(rows)))
    loss = preferences.loss(batch, torch.Generator())
    assert loss.total.item() == pytest.approx(len(rows) * math.log(2), rel=1e-6)
    assert loss.count.item() == len(rows)
    moved(vlm)
    assert vlm.model.training is False  # `evaluating` leaves modes as they were
    assert torch.equal(preferences.reference(batch), before)
    margins = preferences.margins(batch)
    assert margins.abs().min() > 1e-4
    alone = [preferences.margins(pairs_of(vlm, "preference", [row], images, "stop")) for row in rows]
    torch.testing.assert_close(margins, torch.cat(alone), rtol=1e-4, atol=1e-5)
    swapped = [replace(row.with_rejected(), rejected=row.turns) for row in rows]
    other = preferences.margins(pairs_of(vlm, "preference", swapped, images, "stop"))
    torch.testing.assert_close(other, -margins, rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_what_the_model_said_at_the_start_and_survives_a_checkpoint(tiny_vlm, images):
    vlm = model(tiny_vlm, config=FULL)
    batch = pairs_of(vlm, "preference", ROWS, images, "stop")
    sets = {"preference": replace(table(ROWS)["preference"], images=images)}
    kept = KeptReference()
    kept.compute(vlm, sets, 2, on_bad_data="stop")
    preferences = Preferences(vlm, PreferenceConfig(beta=1.0), kept)
    assert preferences.margins(batch).abs().max() < 1e-4  # rounding alone: the batches are others
    now = without_adapters(vlm)(batch)
    moved(vlm)
    assert not torch.equal(without_adapters(vlm)(batch), now)  # method full has no strength
    torch.testing.assert_close(kept(batch), now, rtol=1e-5, atol=1e-4)
    assert preferences.margins(batch).abs().min() > 1e-3
    again = KeptReference()
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again(batch), kept(batch))
    with pytest.raises(KeyError):
        again(pairs_of(vlm, "preference", [example(0, (), "a", "b")], images, "stop"))


def test_a_pair_loses_both_answers_or_none(tiny_vlm, images):
    """The rejected answer of r1 has room, and its question has not with the chosen one."""
    long = Turn("user", "What? " * 40, False)
    rows = [ROWS[0], replace(ROWS[1], turns=(ROWS[1].turns[0], ROWS[1].turns[1], long, Turn("assistant", "x", True)))]
    rows[1] = replace(
        rows[1], turns=tuple(turn._replace(loss=number == 3) for number, turn in enumerate(rows[1].turns))
    )
    vlm = model(tiny_vlm, max_length=60)
    batch = pairs_of(vlm, "preference", rows, images, "stop")
    assert [row.id for row in batch.examples] == ["0"]
    assert batch.left_out[0].startswith("row 1 of preference: its whole answer is beyond 60 tokens")
    preferences = Preferences(vlm, PreferenceConfig(), without_adapters(vlm))
    assert preferences.loss(batch, torch.Generator()).count.item() == 1
    none = pairs_of(vlm, "preference", rows[1:], images, "stop")
    loss = preferences.loss(none, torch.Generator())
    loss.total.backward()
    assert (loss.total.item(), loss.count.item()) == (0, 0)
    assert (vlm.counts.num_left_out, vlm.counts.num_cut) == (2, 0)
    with pytest.raises(RowTooLongError, match="row 1 of preference: one of its answers is beyond"):
        preferences.answer("preference", rows[1:], images)


BAD = [
    ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss ipo"),
    ({"loss": "robust"}, "loss robust needs label_smoothing"),
    ({"label_smoothing": 0.5}, "label_smoothing"),
    ({"beta": 0.0}, "beta"),
]


@pytest.mark.parametrize(("settings", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_settings_that_mean_nothing_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        PreferenceConfig(**settings)


def test_what_starts_as_the_base_model():
    def starts(**settings) -> bool:
        return VLAdapterConfig.model_validate({"rank": 2, **settings}).starts_as_base

    assert starts()
    assert starts(method="lora", parts={"text.attn": {"method": "magnitude"}})
    assert starts(parts={"text.attn": {}, "connector": {"method": "frozen"}})
    assert not starts(parts={"text.attn": {}, "connector": {"method": "full"}})
    assert not starts(method="full")
    assert not starts(extra_trainable=["norms"])
    assert not starts(init_from="somewhere")
    assert not starts(method="prefix")


# --- whole runs ------------------------------------------------------------------------------------------------------


def write_config(folder, base, images, **changes) -> list[str]:
    """A config of pairs; returns the command that trains it."""
    rows = [
        {
            "id": f"r{number}",
            "prompt": messages(f"{IMAGE * len(row.images)}What is {number}?"),
            "chosen": messages("", row.turns[1].text)[1:],
            "rejected": messages("", row.rejected[1].text)[1:],
            "images": list(row.images),
        }
        for number, row in enumerate([*ROWS, example(3, (), "two", "three of them")])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "preferences", "file": str(folder / "pairs.jsonl"), "images": images}
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"rank": 2},
        "data": {
            "task": "preference",
            "train": source,
            "valid": {**source, "limit": 2},
            "tables": str(folder / "tables"),
        },
        "optimizer": {"lr": 0.02},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(folder / "config.yaml")]


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("adapter", [FULL, pytest.param({"rank": 2}, marks=pytest.mark.slow)], ids=["kept", "fresh"])
def test_a_run_resumes_exactly(adapter, tiny_vlm, images, tmp_path, capsys):
    """What is kept was computed before the first step; the resumed run reads it from its checkpoint."""
    command = write_config(tmp_path, tiny_vlm("qwen2_5_vl"), images, adapter=adapter)
    whole = tmp_path / "whole"
    assert main([*command, "--set", f"output={whole}"]) == 0
    first = rows_of(whole / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6 if adapter == {"rank": 2} else 1e-5)
    (scores,) = rows_of(whole / "validation" / "metrics.jsonl")
    assert scores["preference/loss"] < math.log(2)
    assert scores["preference"] == 100.0
    assert scores["preference/margin"] > 0
    killed = shutil.copytree(whole, tmp_path / "killed")
    for left in ("checkpoints/step-000004", "adapter", "validation", "best"):
        shutil.rmtree(killed / left)
    (killed / "summary.json").unlink()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000004", whole, killed)
    states = [read_state(run / "checkpoints/step-000004/state.safetensors") for run in (whole, killed)]
    if adapter == FULL:
        both = [state["reference"]["log_probabilities"] for state in states]
        assert torch.equal(*both)
        assert len(both[0]) == 4
    else:
        assert "reference" not in states[0]

    evaluation = {
        "pipeline": "eval_vl",
        "model": {"path": str(tiny_vlm("qwen2_5_vl"))},
        "adapter": str(whole),
        "data": {
            "task": "preference",
            "valid": yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["valid"],
        },
        "output": str(tmp_path / "scores"),
    }
    evaluation["data"]["tables"] = str(tmp_path / "tables")
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())["preference"]
    assert found["metrics"]["margin"] == pytest.approx(scores["preference/margin"], rel=1e-3)
    assert "no 95 % interval" in found["notes"][0]
    assert main(["eval", str(tmp_path / "eval.yaml"), "--set", "adapter=null"]) == 2
    assert "adapter is missing: preference compares a model with the one" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_an_adapter_starts_from_what_that_says(tiny_vlm, images, tmp_path):
    command = write_config(tmp_path, tiny_vlm("qwen2_5_vl"), images)
    assert main([*command, "--set", f"output={tmp_path / 'first'}"]) == 0
    again = ["--set", f"output={tmp_path / 'second'}", f"adapter.init_from={tmp_path / 'first'}"]
    assert main([*command, *again]) == 0
    first, *_, last = rows_of(tmp_path / "second" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert last["last_loss"] < math.log(2)


def test_the_dry_run_shows_both_answers_and_what_they_are_compared_with(tiny_vlm, images, tmp_path, capsys):
    command = write_config(tmp_path, tiny_vlm("qwen2_5_vl"), images)
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "row r0 of preference, the chosen answer; wide.png" in shown
    assert "⟦red<|im_end|>⟧" in shown
    assert "row r0 of preference, the rejected answer; wide.png" in shown
    assert "⟦blue, or so<|im_end|>⟧" in shown
    assert "reference the model without its adapters" in shown
    assert main([*command, "--dry-run", "--set", "adapter.extra_trainable=[norms]"]) == 0
    assert "reference the model as it starts" in capsys.readouterr().out
    without = shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "without")
    (without / "model.safetensors").unlink()
    assert main([*command, "--dry-run", "--set", f"model.path={without}"]) == 0
    assert "an estimate, for 4 rows of" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--set", "model.loss_over=prompts and answers"]) == 2
    assert "model.loss_over is not for preference" in capsys.readouterr().err
