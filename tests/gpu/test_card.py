"""The recipes on a GPU without hardware: a tensor on the wrong device raises, and results are the CPU's by bits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.shared.images.combinations import OPTIONS, config_of
from tests.shared.vl.small_towers import DIM
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
PROMPT = "a TOK icon of a bus"
DRAWN = {"steps": 2, "guidance": 3.0}


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture
def both(tmp_path) -> Callable[..., Runs]:
    """Runs commands on the GPU and on the CPU, each in a folder of its own; returns what they did."""

    def run(*commands: list[Any]) -> Runs:
        words = []
        for command in commands:
            if isinstance(command[1], dict):  # a config
                file = tmp_path / f"{len(words)}.yaml"
                file.write_text(json.dumps(command[1]))
                command = [command[0], str(file), *command[2:]]
            words.append([str(word) for word in command])
        (tmp_path / "commands.json").write_text(json.dumps(words))
        return {side: _run(side, tmp_path) for side in ("card", "cpu")}

    return run


def _run(side: str, folder: Path) -> list[dict[str, Any]]:
    (folder / side).mkdir()
    results = folder / f"{side}.json"
    done = python("-m", "tests.gpu.run", side, str(folder / "commands.json"), str(results), cwd=folder / side)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(results.read_text())
    assert [each["error"] for each in found if each["code"]] == [], folder
    return found


def compare(folder: Path) -> set[str]:
    """Asserts that both sides wrote the same files with the same values; returns which files have been compared."""
    gpu, cpu = ({str(f.relative_to(folder / side)): f for f in (folder / side).rglob("*") if f.is_file()}
                 for side in ("card", "cpu"))  # fmt: skip
    compared = {name for name in cpu if name.endswith((".safetensors", ".png")) or "answers/" in name}
    different = [name for name in sorted(compared) if name not in gpu or not is_same(gpu[name], cpu[name])]
    assert different == []
    return compared


def is_same(one: Path, other: Path) -> bool:
    if one.suffix == ".png":
        return np.array_equal(Image.open(one), Image.open(other))
    if one.suffix != ".safetensors":
        return one.read_bytes() == other.read_bytes()
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def training(model: Path, images: Path, parts: list[str], **sections: Any) -> dict[str, Any]:
    return {
        "pipeline": "train_diffusion",
        "output": "runs/trained",
        "model": {"path": str(model)},
        "adapter": {"rank": 2, "parts": parts},
        "data": {"folder": str(images), "resolution": 64, "placeholder": "TOK", "caption_dropout": 0.2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
        "sample": {"prompts": [PROMPT], **DRAWN},
        **sections,
    }


UNET = ["unet.attn", "unet.cross", "unet.ff", "unet.conv"]
JOB = {"pipeline": "sample", "adapter": {"path": "runs/trained"}, "prompts": [PROMPT, "a red ball"], "seeds": [0, 1]}
JOB |= {"strengths": [0, 1], "batch_size": 3, "output": "runs/job", **DRAWN}
GRID = {
    "pipeline": "grid",
    "adapter": {"path": "runs/trained"},
    "rows": {"name": "prompt", "values": [PROMPT, "a red ball"]},
    "columns": {"name": "strength", "values": [0.5, 1]},
    "output": "runs/grid",
    "batch_size": 3,
}


LAYER = """
import torch
from torch import nn
from tests.gpu import device
device.install()
from dora_mm.core import DoRASpec, inject, steps

steps.is_divisor = lambda gain: False  # as on the GPU
def trained(place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 4)).to(place)
    inject(model, ["0", "2"], DoRASpec(rank=2))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(5, 12, device=place, generator=torch.Generator(place).manual_seed(1))
    with torch.autocast(torch.device(place).type, torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return [y.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]

assert all(map(torch.equal, trained("card"), trained("cpu")))
x = torch.ones(2, device="card")
assert x.sum().item() == 2 and device.waits.total() > 0
for wrong in (lambda: x + torch.ones(2), lambda: x.normal_(generator=torch.Generator())):
    try:
        wrong()
    except device.TwoDevicesError:
        print("refused")
"""


def test_the_gpu_computes_what_the_cpu_does_and_refuses_what_a_gpu_would():
    done = python("-c", LAYER)
    assert (done.returncode, done.stdout) == (0, "refused\n" * 2), done.stderr


def waits_per_step(both: Callable[..., Runs], config: dict[str, Any], longer: int = 4) -> dict[str, float]:
    """What the host waits for in each step of a training, by place: a longer training less a shorter one."""
    config = {**config, "train": {**config["train"], "checkpoint_every": 100}}
    lengths = [["--set", f"train.steps={steps}", f"output=runs/{steps}"] for steps in (3, 3 + longer)]
    few, many = (run["waits"] for run in both(*(["train", config, *length] for length in lengths))["card"])
    return {place: (many[place] - few.get(place, 0)) / longer for place in many if many[place] != few.get(place, 0)}


@pytest.mark.slow
def test_sdxl(both, tmp_path, tiny_folder, image_folder):
    config = training(tiny_folder, image_folder, [*UNET, "text_encoders.attn"])
    halves = ["train.mixed_precision=bf16", "train.gradient_checkpointing=true", "output=runs/halves"]
    style = {
        "pipeline": "eval_style",
        "adapter": {"path": "runs/trained"},
        "seeds": [0],
        "steps": 1,
        "output": "runs/style",
    }
    both(
        ["train", config, "--dry-run"],
        ["train", config],
        ["train", config, "--set", *halves],
        ["sample", JOB],
        ["grid", GRID],
        ["eval", style],
        ["convert", "runs/trained/adapter", "merged", "--to", "merged", "--base", tiny_folder],
    )
    compared = compare(tmp_path)
    assert {"runs/trained/adapter/pytorch_lora_weights.safetensors", "runs/grid/sheet.png"} <= compared


@pytest.mark.slow
def test_scores_of_images(both, tmp_path):
    config = training(SAMPLES / "tiny-sdxl", SAMPLES / "3d_icon", ["unet.attn"])
    del config["sample"]
    config["data"] |= {"resolution": 128, "instance_prompt": PROMPT}
    config["train"] = {"steps": 1, "batch_size": 2}
    things = {
        "pipeline": "eval_diffusion",
        "model": {"path": str(SAMPLES / "tiny-sdxl")},
        "adapter": {"path": "runs/trained/adapter"},
        "classifier": str(SAMPLES / "judge"),
        "style": "3d",
        "prompt": "a TOK icon of {thing}",
        "flat_prompt": "a flat icon of {thing}",
        "concepts": {"role": "report", "count": 3, "seeds": [0]},
        "sampling": {"steps": 1, "guidance": 1.0},
        "output": "runs/things",
    }
    both(["train", config], ["eval", things])
    assert any(name.startswith("runs/things/") for name in compare(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "accumulation"])
def test_options_of_a_training_on_images(both, tmp_path, tiny_folder, image_folder, name):
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(image_folder / "0.mask.png")
    names = set(OPTIONS) - {"caches", "folders"} if name == "all" else {name, "caches"}
    both(["train", config_of(names, tiny_folder, [image_folder, image_folder], Path("runs/trained"))])
    assert any(name.startswith("runs/trained/adapter/") for name in compare(tmp_path))


@pytest.mark.slow
def test_z_image(both, tmp_path, image_folder):
    from tests.shared.images.tiny_z_image import build

    model = build(tmp_path / "model")
    config = training(model, image_folder, ["transformer.attn", "transformer.ff"])
    both(["train", config], ["sample", JOB], ["grid", GRID])
    assert {"runs/trained/adapter/pytorch_lora_weights.safetensors", "runs/grid/sheet.png"} <= compare(tmp_path)


def questions(split: str, limit: int) -> dict[str, Any]:
    return {
        "format": "vqa_v2",
        "file": str(SAMPLES / f"vl/vqa/v2_OpenEnded_mscoco_{split}2014_questions.json"),
        "annotations": str(SAMPLES / f"vl/vqa/v2_mscoco_{split}2014_annotations.json.gz"),
        "images": str(SAMPLES / "vl/images"),
        "limit": limit,
    }


def answering(model: dict[str, Any], **sections: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training on questions, and the evaluation of what it trains."""
    shared = {"model": model, "data": {"tables": "tables", "task": "vqa", "train": questions("train", 8)}}
    shared["data"]["valid"] = questions("val", 4)
    trained = {
        **shared,
        "pipeline": "train_vl",
        "output": "runs/trained",
        "adapter": {"rank": 2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
        "evaluate": {"every": 2, "batch_size": 4},
        **sections,
    }
    evaluated = {**shared, "pipeline": "eval_vl", "adapter": "runs/trained", "output": "runs/eval", "examples": 3}
    return trained, {**evaluated, **({"vision": sections["vision"]} if "vision" in sections else {})}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_vision_language_models(both, tmp_path, tiny_vlm, image_folder, name):
    trained, evaluated = answering({"path": str(tiny_vlm(name))})
    image = image_folder / "0.png"
    both(
        ["train", trained, "--dry-run"],
        ["train", trained],
        ["eval", {**evaluated, "decode": {"max_new_tokens": 4}}],
        ["ask", tiny_vlm(name), image, "What is it?", "--adapter", "runs/trained", "--max-new-tokens", "4"],
    )
    compared = compare(tmp_path)
    assert {"runs/trained/adapter/adapter_model.safetensors", "runs/eval/answers/vqa.jsonl"} <= compared


@pytest.mark.slow
def test_vl_bart(both, tmp_path, vision):
    from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart

    tokenizer = small_tokenizer()
    save_vl_bart(from_bart(small_bart(), len(tokenizer), DIM, "image"), tokenizer, tmp_path / "model")
    model = {"family": "vl_bart", "path": str(tmp_path / "model")}
    adapter = {"rank": 2, "extra_trainable": ["visual_embedding", "biases", "norms"]}
    trained, evaluated = answering(model, vision=vision, adapter=adapter, ema={"decay": 0.5})
    both(["train", trained], ["eval", evaluated])
    assert {"runs/trained/adapter/adapter_model.safetensors", "runs/eval/answers/vqa.jsonl"} <= compare(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("family", ["sdxl", "tiny_flux2_klein", "tiny_krea2", "tiny_qwen_image"])
def test_a_step_on_images_reads_twice(both, tmp_path, tiny_folder, image_folder, family, accumulated):
    """Whether rows of any layer need another dm, once for all layers, and the loss with the norm of the gradients."""
    model, parts = tiny_folder, ["unet.attn", "unet.cross", "unet.conv"]
    if family != "sdxl":
        model, parts = tmp_path / "model", ["transformer.attn", "transformer.ff"]
        import_module(f"tests.shared.images.{family}").build(model)
    config = training(model, image_folder, parts)
    config["train"]["gradient_accumulation_steps"] = accumulated
    del config["sample"]
    found = waits_per_step(both, config)
    found.pop("nonzero dora_mm/core/magnitude.py:inner_dots", None)  # which rows do, where there are any
    assert sum(found.values()) <= accumulated + 1, found


@pytest.mark.slow
def test_a_step_on_questions_reads_twice_and_what_its_class_does(both, tiny_vlm):
    config, _ = answering({"path": str(tiny_vlm("smolvlm"))})
    del config["evaluate"], config["data"]["valid"]
    found = waits_per_step(both, config)
    of_class = [place for place in found if place.endswith("forms.py:logits")]  # where images are in the text
    assert sum(found.pop(place) for place in of_class) < 8
    assert found.pop("nonzero dora_mm/models/vl/vlm/head.py:__init__") == 1  # how many tokens are learned
    assert sum(found.values()) <= 2, found
