"""Weights that wait in main memory: on a device with streams each is there when it is used, and gone afterwards."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.gpu.test_card import JOB, answering, is_same, pytestmark, python, training
from tests.shared.images.combinations import OPTIONS, config_of

__all__ = ["pytestmark"]

FLOWS = ["tiny_flux2_klein", "tiny_krea2", "tiny_qwen_image", "tiny_qwen_image_21", "tiny_sd3", "tiny_z_image"]


@pytest.fixture
def same_if_streamed(tmp_path) -> Callable[..., dict[str, Any]]:
    """Runs commands with weights that stay and that wait, asserts that files are equal, and returns what both say."""

    def run(*commands: list[Any], amount: str = "all") -> dict[str, Any]:
        found = {}
        for kind in ("stays", "waits"):
            (tmp_path / kind).mkdir()
            words = []
            for number, (name, config, *more) in enumerate(commands):
                file = tmp_path / f"{kind}{number}.yaml"
                file.write_text(json.dumps(config))
                keys = ["stream"] if config["pipeline"] == "train_vl" else ["stream", "stream_text"]
                given = ["--set", *(f"memory.{key}={amount}" for key in keys)] if kind == "waits" else []
                words.append([name, str(file), *more, *given])
            (tmp_path / f"{kind}.json").write_text(json.dumps(words))
            files = [str(tmp_path / f"{kind}.json"), str(tmp_path / f"{kind}_results.json")]
            done = python("-m", "tests.gpu.run", "card", *files, cwd=tmp_path / kind)
            assert done.returncode == 0, done.stderr[-4000:]
            found[kind] = json.loads(Path(files[1]).read_text())
            assert [each["error"] for each in found[kind] if each["code"]] == []
        stays, waits = (
            {str(f.relative_to(tmp_path / kind)): f for f in (tmp_path / kind).rglob("*") if f.is_file()}
            for kind in ("stays", "waits")
        )
        compared = [name for name in stays if name.endswith((".safetensors", ".png")) or "/gradients/" in name]
        assert len(compared) > 2
        assert [name for name in compared if not is_same(stays[name], waits[name])] == []
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flow_models(same_if_streamed, tmp_path, image_folder, family, checkpointing):
    model = import_module(f"tests.shared.images.{family}").build(tmp_path / "model")
    config = training(model, image_folder, ["transformer.attn", "transformer.ff"])
    config["adapter"]["cache"] = "norms"
    config["train"] |= {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    stays, waits = same_if_streamed(["train", config], ["sample", JOB]).values()
    assert waits[0]["peak"] < stays[0]["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [set(OPTIONS) - {"new tokens", "text encoders", "random crop"}, {"accumulation"}])
def test_all_that_a_training_can_be_asked_for(same_if_streamed, tmp_path, image_folder, names):
    model = import_module("tests.shared.images.tiny_flux2_klein").build(tmp_path / "model")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(image_folder / "0.mask.png")
    (references := tmp_path / "references").mkdir()
    for image in sorted(image_folder.glob("?.png")):
        Image.open(image).convert("RGB").resize((96, 80)).save(references / image.name)
    names = names - {"caches", "folders"} | {"references"}  # folders have references of their own
    config = config_of(names, model, [image_folder, image_folder, references], Path("runs/trained"))
    config["adapter"]["cache"] = "norms"
    config["data"]["resolution"] = 128
    config["train"]["gradients_at"] = [1]  # which reads weights outside of passes
    same_if_streamed(["train", config])


@pytest.mark.slow
def test_sdxl_and_its_text_encoders(same_if_streamed, tiny_folder, image_folder):
    config = training(tiny_folder, image_folder, ["unet.attn", "unet.conv", "text_encoders.attn"])
    config["adapter"]["cache"] = "norms"
    config["train"]["mixed_precision"] = "bf16"
    same_if_streamed(["train", config], ["sample", JOB])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["text.attn"], ["text.attn", "text.mlp", "vision.attn"]])
def test_vision_language_models(tmp_path, same_if_streamed, tiny_vlm, parts):
    trained, _ = answering({"path": str(tiny_vlm("qwen2_5_vl"))})
    trained["adapter"] |= {"parts": parts, "cache": "norms"}
    trained["train"]["gradient_checkpointing"] = len(parts) > 1
    same_if_streamed(["train", trained])


ORDER = """
import torch
from torch import nn
from tests.gpu import device, streams
device.install()
from dora_mm.core import DoRASpec, inject
from dora_mm.core.wrappers.streaming import StreamedBlock, Window, stream, window_of

CARD = torch.device("card", 0)
def trained(wrong=None):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(5))).to("card")
    model.requires_grad_(False)
    inject(model, [f"{i}.0" for i in range(5)], DoRASpec(rank=2))
    stream(list(model), CARD)
    if wrong:
        wrong(window_of(CARD))
    x = torch.randn(3, 8, device="card", generator=torch.Generator("card").manual_seed(1))
    for _ in range(2):
        model(x).square().sum().backward()
    return [p.grad.cpu() for p in model.parameters() if p.grad is not None]

def without_event(window):
    window._bring = lambda block: block in window._present or window._copy(block)

def without_stream(window):
    window._stream.wait_stream = lambda other: None

def frees_what_computes(window):
    own = window._move_to
    def move(block, number, direction):
        own(block, number, direction)
        block.empty()
    window._move_to = move

for wrong in (None, without_event, without_stream, frees_what_computes):
    from dora_mm.core.wrappers import streaming
    streaming._WINDOWS.clear()
    try:
        print(len(trained(wrong)))
    except (streams.AbsentError, streams.EarlyCopyError) as error:
        print(type(error).__name__)
"""


def test_copies_in_the_wrong_order_are_seen():
    done = python("-c", ORDER)
    assert (done.returncode, done.stdout.split()) == (0, ["15", "AbsentError", "EarlyCopyError", "AbsentError"]), done


PEAK = """
import sys
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from tests.gpu import device, streams
device.install()
from dora_mm import targets
from dora_mm.core import DoRASpec, adapter_parameters, fixed_parameters, inject
from dora_mm.core.wrappers.streaming import stream
from dora_mm.preview.simulation import Machine, simulated_peak
from dora_mm.preview.streamed import stream_plan
from dora_mm.models.streaming import streamable_blocks
from dora_mm.utils.losses import LossSum
from diffusers import UNet2DConditionModel, ZImageTransformer2DModel
from tests.preview.test_image_memory import SDXL, Z_IMAGE, inputs_of

family, checkpoints, CARD = sys.argv[1], sys.argv[2] == "True", torch.device("card", 0)
chosen = targets.find("sdxl-unet" if family == "sdxl" else "z-image")

def adapted(place):
    torch.manual_seed(0)
    with torch.device(place):
        network = UNet2DConditionModel(**SDXL) if family == "sdxl" else ZImageTransformer2DModel(**Z_IMAGE)
        nn.Module.to(network.requires_grad_(False), torch.float32 if family == "sdxl" else torch.bfloat16)
        given = inputs_of(network, 32, 2)
    inject(network, chosen, DoRASpec(8, cache="norms"))
    network.train()
    if checkpoints:
        network.enable_gradient_checkpointing()
    return network, given

def loss(network, given):
    found = network(**given)[0]
    return (found if family == "sdxl" else torch.stack(found)).float().square().mean()

network, given = adapted("meta")
step = lambda _: LossSum(loss(network, given), torch.ones(()))
plan = stream_plan(network, chosen, "all")
estimated = sum(p.nbytes for p in network.parameters()) - plan.freed + simulated_peak({"network": network}, step, None)
network, given = adapted("cpu")
before = streams.memory.now
stream(streamable_blocks(network, chosen), CARD)
network.to(CARD)
given = tree_map_only(torch.Tensor, lambda t: t.to(CARD), given)
for name, parameter in adapter_parameters(network).items():  # fresh adapters take less
    parameter.data = parameter.data + 0.01 * name.endswith("lora_B")
for _ in range(2):
    streams.memory.peak = streams.memory.now
    with fixed_parameters(network, num_passes=1):
        loss(network, given).backward()
    network.zero_grad()
print(estimated, streams.memory.peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpoints"), [("z_image", True), ("z_image", False), ("sdxl", True)])
def test_the_dry_run_has_the_peak_that_the_device_counts(family, checkpoints):
    done = python("-c", PEAK, family, str(checkpoints))
    assert done.returncode == 0, done.stderr[-4000:]
    estimated, counted = map(int, done.stdout.split())
    assert estimated == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "questions"])
def test_as_little_waits_as_the_device_needs(tmp_path, monkeypatch, same_if_streamed, image_folder, tiny_vlm, kind):
    if kind == "images":
        model = import_module("tests.shared.images.tiny_flux2_klein").build(tmp_path / "model")
        config = training(model, image_folder, ["transformer.attn"])
        del config["sample"]
    else:
        config, _ = answering({"path": str(tiny_vlm("qwen2_5_vl"))})
        del config["evaluate"], config["data"]["valid"]
    config["adapter"]["cache"] = "norms"
    monkeypatch.setenv("CARD_BYTES", str(int(1e9) + 100_000))  # what libraries take, and less than the weights
    _, waits = same_if_streamed(["train", config], amount="auto").values()
    assert "memory.stream: Amount(blocks=" in waits[0]["said"]
