"""Every class of vision-language models, from data files to an adapter that PEFT loads and a merged model."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image, ImageOps
from safetensors.torch import save_file

import dora_mm
from dora_mm.adapting.files import load_trained
from dora_mm.adapting.networks import adapt
from dora_mm.cli import main
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.core.targets import parts_in
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.tasks.vl import sample_answer
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import SHAPES, write_conversations, write_images, write_questions
from tests.shared.killed import assert_same_weights
from tests.shared.vl import tiny_vlm as tiny

FEW = ("llava", "qwen2_5_vl", "idefics3", "mllama", "paligemma", "florence2", "blip_vqa", "git")
ALL = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in (*tiny.NAMES, *tiny.NEWER)]
# Gates that are 0 at first keep gradients from what is behind them.
CLOSED = {"mllama": (".cross_attn.", ".vision_model.", "multi_modal_projector")}
# LLaVA reads the last block but one of its tower, InstructBLIP nothing of the text in the last block of its Q-Former.
UNUSED = dict.fromkeys(("llava", "llava_next"), (".vision_tower.encoder.layers.1.",)) | {
    "instructblip": (".qformer.encoder.layer.1.intermediate.", ".qformer.encoder.layer.1.output.")
}
# PEFT takes layers of these names for experts of transformers 4, also those of dense blocks and shared experts.
FUSED_BY_PEFT = ("glm4v_moe",)
# PEFT's folder cannot hold their adapters, which are written in the native form.
OWN_FORM = ("deepseek_ocr2", "inkling2", "inkling2_loop", "mistral_large4", "unlimited_ocr", "qwen3_vl_moe")
PARTS = {"qwen3_vl_moe": {"text.experts": {"rank": 3}, "text.attn": {}, "connector": {"method": "lora"}}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def vlm(tiny_vlm, request):
    return VLM(VLMModelConfig(path=str(tiny_vlm(request.param))))


def examples(count: int = 2) -> list[Example]:
    texts = ("What colour is it?", "Is there a dog in the image?", "How many?")
    answers = (("red", "blue"), ("no",), ("two",))
    rows = zip(texts, answers, SHAPES, strict=True)
    return [Example(n, (n,), text, found, (1.0, 0.3)[: len(found)]) for text, found, n in rows][:count]


def batch_of(vlm: VLM, folder) -> object:
    return vlm.batch("vqa", examples(), str(folder), [sample_answer(example, 0.5) for example in examples()])


@torch.no_grad()
def losses(vlm: VLM, batch) -> torch.Tensor:
    return torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])


@pytest.mark.parametrize("vlm", ALL, indirect=True)
def test_a_fresh_adapter_changes_no_bit_and_all_of_it_learns(vlm, images, request):
    name = request.node.callspec.params["vlm"]
    batch = batch_of(vlm, images)
    before = losses(vlm, batch)
    parts = parts_in(vlm.model, vlm.target_maps["model"])
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": list(parts)})
    trained = adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    assert torch.equal(losses(vlm, batch), before)

    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=0.02)
    stream = torch.Generator()
    for step in range(2):
        vlm.loss(batch, stream).mean.backward()
        if step == 1:  # A has no gradient before B is different from 0
            dead = [n for n, p in trained.parameters.items() if p.grad is None or not p.grad.any()]
            excused = CLOSED.get(name, ()) + UNUSED.get(name, ())
            assert [n for n in dead if not any(part in n for part in excused)] == []
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(losses(vlm, batch), before)


@pytest.mark.parametrize("vlm", ALL, indirect=True)
def test_answers_do_not_depend_on_the_batch(vlm, images):
    answer = vlm.answerer("vqa", DecodeConfig(max_new_tokens=5), ())
    rows = examples(3)
    assert answer(rows, str(images)) == [answer([row], str(images))[0] for row in rows]
    drawn = vlm.answerer("vqa", DecodeConfig(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=3), ())
    assert drawn(rows, str(images)) == [drawn([row], str(images))[0] for row in rows]
    rank = vlm.answerer("choice", DecodeConfig(), ())
    assert rank([Example("c", ("wide.png",), "q", options=("x", "y"))], str(images))[0] in ("A", "B")


FAST = ("blip_vqa", "qwen2_5_vl")
RUN = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in (*tiny.NAMES, *tiny.NEWER, *tiny.OTHERS)]


def test_a_run_that_cannot_be_resumed_is_refused_before_its_model_is_loaded(tiny_vlm, images, tmp_path, capsys):
    base = shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "model")
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"rank": 2},
        "data": {**write_conversations(tmp_path, images), "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 1, "batch_size": 2},
        "evaluate": {"max_new_tokens": 3},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    resume = ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]
    save_file({"one": torch.ones(1)}, base / "model.safetensors")  # loading it would be another error
    assert main(resume) == 2
    assert "run cannot be resumed: the weights of the model changed since" in capsys.readouterr().err
    (base / "model.safetensors").write_bytes(b"cut")
    assert main(resume) == 2
    assert "model.safetensors is damaged: " in capsys.readouterr().err


@pytest.mark.parametrize("name", RUN)
def test_a_run_resumes_exactly_and_its_adapter_leaves(name, tiny_vlm, images, tmp_path, capsys):
    """What a kill after the second step leaves behind is that of a whole run without its later files.

    It goes on with images that are copies, and with no others.
    """
    base = tiny_vlm(name)
    chat = VLM(VLMModelConfig(path=str(base))).fallback is None
    data = write_conversations(tmp_path, images) if chat else write_questions(tmp_path, images)
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"rank": 2, "extra_trainable": ["norms"], "parts": PARTS.get(name)},
        "data": {**data, "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
        "evaluate": {"max_new_tokens": 3},
        "output": str(tmp_path / "whole"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoints/step-000004", "adapter", "validation", "best"):
        shutil.rmtree(killed / left)
    (killed / "summary.json").unlink()
    kept = {file: file.read_bytes() for file in images.iterdir()}
    for file in kept:
        ImageOps.invert(Image.open(file)).save(file)
    assert main(["train", "--resume", str(killed)]) == 2
    assert "is not as it was" in capsys.readouterr().err
    for file, content in kept.items():
        file.write_bytes(content)
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000004", tmp_path / "whole", killed)
    before, after = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "whole", killed))
    assert {**before, "seconds": 0, "seconds_per_step": 0, "peak_memory_mb": 0} == {
        **after, "seconds": 0, "seconds_per_step": 0, "peak_memory_mb": 0,
    }  # fmt: skip

    vlm = VLM(VLMModelConfig(path=str(base)))
    batch = batch_of(vlm, images)
    bare = losses(vlm, batch)
    adapter = tmp_path / "whole" / "adapter"
    load_trained(vlm, adapter, backend="torch")
    ours = losses(vlm, batch)
    assert (ours - bare).abs().max() > 1e-3
    dora_mm.merge(vlm.model)
    torch.testing.assert_close(losses(vlm, batch), ours, rtol=1e-5, atol=1e-5)

    theirs = VLM(VLMModelConfig(path=str(base)))
    assert (adapter / "adapter_config.json").exists() == (name not in OWN_FORM)
    if name in OWN_FORM:
        return
    if name in FUSED_BY_PEFT:
        with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora"):
            PeftModel.from_pretrained(theirs.model, adapter)
        return
    model = PeftModel.from_pretrained(theirs.model, adapter)
    assert model is not None
    torch.testing.assert_close(losses(theirs, batch), ours, rtol=1e-5, atol=1e-5)


def test_a_run_that_a_bad_row_stopped_goes_on_without_it(tiny_vlm, images, tmp_path, monkeypatch, capsys):
    """As a run that leaves such rows out from its start: no finished step had one."""
    monkeypatch.setattr("dora_mm.preview.lengths.SAMPLE", 1)  # so that only the step finds it
    (tmp_path / "damaged.png").write_bytes((images / "wide.png").read_bytes()[:-40])
    names = [str(images / "square.png")] * 4 + [str(tmp_path / "damaged.png")]
    rows = [
        {
            "id": f"r{number}",
            "image": [name],
            "conversations": [
                {"from": "human", "value": "<image>What is this?" + " Say more." * (4 - number)},
                {"from": "gpt", "value": f"x{number}"},
            ],
        }
        for number, name in enumerate(names)
    ]
    source = {"format": "chat", "file": str(write_json(tmp_path / "chat.json", rows))}
    config = {
        "pipeline": "train_vl",
        "seed": 1,
        "model": {"path": str(tiny_vlm("llava"))},
        "adapter": {"rank": 2},
        "data": {"absolute_paths": True, "train": source, "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 5, "batch_size": 1, "checkpoint_every": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["train", str(tmp_path / "config.yaml"), "--set", f"output={tmp_path / 'stopped'}"]
    assert main(command) == 2
    assert "row r4 of chat" in capsys.readouterr().err
    assert (tmp_path / "stopped" / "checkpoints").is_dir()
    assert main(["train", "--resume", str(tmp_path / "stopped"), "--set", "data.on_bad_data=skip"]) == 0
    assert main([*command[:3], f"output={tmp_path / 'skipped'}", "data.on_bad_data=skip"]) == 0
    assert_same_weights("step-000005", tmp_path / "stopped", tmp_path / "skipped")


def test_a_damaged_image_of_a_validation_is_left_out(tiny_vlm, images, tmp_path, caplog):
    """It ended the run, and its resumption, also where bad rows are skipped."""
    (tmp_path / "damaged.png").write_bytes((images / "wide.png").read_bytes()[:-40])
    names = [str(images / "wide.png"), str(tmp_path / "damaged.png"), str(images / "square.png")]
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": f"r{i}", "image": [name], "conversations": turns} for i, name in enumerate(names)]
    source = {"format": "chat", "file": str(write_json(tmp_path / "chat.json", rows))}
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(tiny_vlm("llava"))},
        "adapter": {"rank": 2},
        "data": {"absolute_paths": True, "train": source, "valid": dict(source), "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 2, "batch_size": 2},
        "evaluate": {"max_new_tokens": 2, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["train", str(tmp_path / "config.yaml"), "--set", "data.on_bad_data=skip"]
    assert main(command) == 0
    assert "row r1 of chat" in caplog.text
    assert "1 of 3 rows of chat could not be read, and were left out" in caplog.text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows_left_out"] > 0
    assert summary["validation_rows_left_out"] == 1
