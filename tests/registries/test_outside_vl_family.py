"""A family of vision-language models of another package is trained, resumed, scored and asked by command."""

import json

import pytest

from tests.registries.test_outside_package import run
from tests.shared.data.vlm_rows import write_images, write_questions
from tests.shared.packages import outside_package

RECORD = '''
"""Models of transformers that end each answer with a text of their section."""

from typing import Literal

from dora_mm.config.models import VLMModelConfig
from dora_mm.registries.vl_families import VLFamily


class SignedConfig(VLMModelConfig):
    family: Literal["signed"]
    signature: str = "!"


FAMILY = VLFamily("signed model", "signed:Signed", "signed_record:SignedConfig", model_types=("signed",))
'''
MODEL = """
from dora_mm.models.vl.vlm.family import VLM


class Signed(VLM):
    def answerer(self, task, config, candidates):
        answer = super().answerer(task, config, candidates)
        return lambda examples, images: [text + self.config.signature for text in texts_of(answer(examples, images))]
"""
SIGNED = {"family": "signed", "signature": " (signed)"}


@pytest.fixture
def package(tmp_path):
    files = {"signed_record.py": RECORD, "signed.py": MODEL}
    return outside_package(tmp_path / "package", files, {"vl_families.signed": "signed_record:FAMILY"})


@pytest.mark.slow
def test_a_family_is_trained_resumed_scored_and_asked(package, tiny_vlm, tmp_path):
    base, images = tiny_vlm("llava"), tmp_path / "pictures"
    images.mkdir()
    data = {"task": "vqa", "tables": "tables", **write_questions(tmp_path, write_images(images))}
    train = {
        "pipeline": "train_vl",
        "model": {"path": str(base), **SIGNED},
        "adapter": {"rank": 2},
        "data": data,
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_size": 2},
        "evaluate": {"max_new_tokens": 2},
        "output": "trained",
    }
    score = {key: train[key] for key in ("model", "data")} | {
        "pipeline": "eval_vl",
        "adapter": "trained",
        "decode": {"max_new_tokens": 2},
        "output": "scored",
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "signed"}')
    for name, config in (("train", train), ("score", score), ("other", {**score, "model": {"path": "own"}})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))

    done = run(package, "train train.yaml --dry-run", "train train.yaml")
    assert done.returncode == 0, done.stderr
    done = run(package, "train --resume trained")
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stderr + done.stdout
    done = run(package, "eval score.yaml")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "scored" / "predictions_vqa.json").read_text())
    assert answers
    assert all(answer["answer"].endswith("(signed)") for answer in answers)
    asked = run(package, f"ask {base} {images / 'wide.png'} Colour? --adapter trained --max-new-tokens 2")
    assert asked.returncode == 0, asked.stderr
    assert [line.endswith("(signed)") for line in asked.stdout.splitlines()] == [True, True]
    refused = run(package, "eval other.yaml --set output=other")
    assert "own is a signed model: set model.family to signed" in refused.stderr


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"family": "sined"}, "must be 'vlm' or 'vl_bart' or 'signed', got 'sined', did you mean 'signed'?"),
        ({**SIGNED, "random": True}, "model.random: is for family vl_bart, not signed"),
        ({"family": "signed", "signatur": "."}, "model.signatur: unknown key, did you mean 'signature'?"),
    ],
)
def test_a_config_is_checked_with_its_section(package, model, expected, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"pipeline": "eval_vl", "model": {"path": "a/b", **model}}))
    assert expected in run(package, "eval config.yaml").stderr


def test_it_is_unknown_without_the_package(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"pipeline": "eval_vl", "model": {"path": "a/b", **SIGNED}}))
    done = run(tmp_path / "package", "eval config.yaml")
    assert "model.family: must be 'vlm' or 'vl_bart', got 'signed'" in done.stderr
