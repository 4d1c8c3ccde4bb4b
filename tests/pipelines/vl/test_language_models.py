"""Decoder language models through the pipelines: trained, resumed, scored, asked, merged, and loaded by PEFT."""

import json
import shlex
import shutil

import pytest
import torch
import yaml
from peft import PeftModel

from dora_mm.adapting.files import load_trained
from dora_mm.cli import main
from dora_mm.config.models import VLMModelConfig
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.text_rows import BALL, BOXES, question, write_commonsense, write_texts
from tests.shared.data.vl_files import write_json
from tests.shared.killed import assert_same_weights
from tests.shared.vl.language_models import LANGUAGE_MODELS

EIGHT = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def write_config(folder, base, data, **sections):
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"rank": 2, "extra_trainable": ["norms"]},
        "data": {**data, "tables": str(folder / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2},
        "evaluate": {"max_new_tokens": 3},
        "output": str(folder / "whole"),
        **sections,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


@torch.no_grad()
def losses(vlm):
    batch = vlm.batch("chat", [BALL, BOXES], None, [("red", 1.0), ("blue", 1.0)])
    return torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])


FIRST, *OTHERS = LANGUAGE_MODELS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_run_resumes_exactly_and_its_adapter_leaves(name, tiny_vlm, tmp_path, capsys):
    base = tiny_vlm(name)
    config = write_config(tmp_path, base, write_texts(tmp_path))
    assert main(["train", config, "--dry-run"]) == 0
    assert "text.attn" in capsys.readouterr().out
    assert main(["train", config]) == 0
    asking = ["dora-mm", "ask", str(base), "QUESTION", "--adapter", str(tmp_path / "whole")]
    assert shlex.join(asking) in capsys.readouterr().out
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoints/step-000004", "adapter", "validation", "best"):
        shutil.rmtree(killed / left)
    (killed / "summary.json").unlink()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000004", tmp_path / "whole", killed)

    adapter, merged = tmp_path / "whole" / "adapter", tmp_path / "merged"
    gpu = (adapter / "README.md").read_text()
    assert "pipeline_tag: text-generation" in gpu
    assert "AutoModelForCausalLM.from_pretrained" in gpu
    bare, ours, theirs = (VLM(VLMModelConfig(path=str(base))) for _ in range(3))
    load_trained(ours, adapter, backend="torch")
    expected = losses(ours)
    assert (expected - losses(bare)).abs().max() > 1e-3
    assert PeftModel.from_pretrained(theirs.model, adapter) is not None
    torch.testing.assert_close(losses(theirs), expected, rtol=1e-5, atol=1e-5)
    assert main(["merge", str(base), str(adapter), str(merged)]) == 0
    torch.testing.assert_close(losses(VLM(VLMModelConfig(path=str(merged)))), expected, rtol=1e-5, atol=1e-5)

    capsys.readouterr()
    assert main(["ask", str(base), "Is it red?", "--adapter", str(adapter), "--max-new-tokens", "2"]) == 0
    assert "with adapter:" in capsys.readouterr().out
    write_config(
        tmp_path,
        base,
        {"valid": write_texts(tmp_path)["valid"]},
        pipeline="eval_vl",
        adapter=str(adapter),
        decode={"max_new_tokens": 2},
        output=str(tmp_path / "scores"),
    )
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key in ("optimizer", "train", "evaluate"):
        del values[key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["eval", config]) == 0
    assert "accuracy" in json.loads((tmp_path / "scores" / "scores.json").read_text())["chat"]["metrics"]


def test_commonsense_is_trained_as_published_and_scored_on_eight_data_sets(tiny_vlm, tmp_path, capsys):
    base, train = tiny_vlm("llama"), {"format": "commonsense", "file": str(write_commonsense(tmp_path / "train.json"))}
    model = {"path": str(base), "loss_over": "prompts and answers"}
    data = {"task": "commonsense", "train": train, "valid": {"share": 0.3}}
    assert (
        main(["train", write_config(tmp_path, base, data, model=model, evaluate={"max_new_tokens": 3, "beams": 2})])
        == 0
    )
    tasks = [
        {"task": task, "valid": {"format": "commonsense", "file": str(write_commonsense(tmp_path / f"{task}.json", 2))}}
        for task in EIGHT
    ]
    for answers in ("generate", "rank"):
        config = {
            "pipeline": "eval_vl",
            "model": {"path": str(base)},
            "adapter": str(tmp_path / "whole"),
            "data": {"tasks": tasks, "tables": str(tmp_path / "tables")},
            "decode": {"max_new_tokens": 3, "beams": 4, "answers": answers},
            "output": str(tmp_path / answers),
        }
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
        scores = json.loads((tmp_path / answers / "scores.json").read_text())
        assert list(scores) == EIGHT
        values = [scores[task]["metrics"]["accuracy"] for task in EIGHT]
        header, _, row = capsys.readouterr().out.split("## all tasks\n\n")[1].splitlines()[:3]
        assert header == "| BoolQ | PIQA | SIQA | HellaSwag | WinoGrande | ARC-e | ARC-c | OBQA | mean |"
        assert row == "| " + " | ".join(f"{value:.1f}" for value in [*values, sum(values) / 8]) + " |"
    assert all("name no option" not in note for found in scores.values() for note in found["notes"])  # of rank


def test_what_needs_images_is_refused_with_one_sentence(tiny_vlm, tmp_path, capsys):
    def refused(*arguments):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    from tests.shared.data.vlm_rows import write_conversations, write_images

    base, images = tiny_vlm("llama"), write_images(tmp_path)
    assert "reads no images: ask it without" in refused("ask", base, images / "wide.png", "What?")
    assert "--then" in refused("ask", base, "What?", "--then", "Why?")
    found = refused("train", write_config(tmp_path, base, write_conversations(tmp_path, images)))
    assert "has an image, and LlamaForCausalLM reads none" in found
    data = {
        "task": "boolq",
        "train": {"format": "commonsense", "file": str(write_json(tmp_path / "a.json", [question(0)]))},
    }
    data["train"]["images"] = str(images)
    assert "images has no effect" in refused("train", write_config(tmp_path, base, data))
