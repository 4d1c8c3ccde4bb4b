"""Adapter files of other tools in our pipelines: they draw the pictures of the original, and are trained on."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm import DoRASpec, convert, inject, load_adapter, remove, save_adapter, set_strength
from dora_mm.cli import main
from dora_mm.core import adapter_parameters
from dora_mm.models.sdxl.loading import load_sdxl

EXACT = ("diffusers", "kohya", "comfy", "comfy-2025", "comfy-15458", "onetrainer", "ai-toolkit")
DRAWN = ("original", "kohya", "comfy")
BASE = "samples/tiny-sdxl"
LINEAR = ("attn", "cross", "ff")  # ai-toolkit has no DoRA of convolutions


@pytest.fixture(scope="module")
def model():
    return load_sdxl(BASE)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of one DoRA adapter of the UNet and both text encoders in the form of each tool, by target."""
    folder, trained = tmp_path_factory.mktemp("files"), load_sdxl(BASE)
    inject(trained.unet, "sdxl-unet", DoRASpec(rank=2, alpha=3.0), parts=LINEAR)
    for name in ("text_encoder", "text_encoder_2"):
        inject(trained.adaptable[name], "clip-text", DoRASpec(rank=2, alpha=3.0), parts=("attn", "ff"))
    stream = torch.Generator().manual_seed(0)
    for network in trained.adaptable.values():
        for key, parameter in adapter_parameters(network).items():
            if key.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=stream)
            if key.endswith("magnitude"):
                parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=stream))
    original = save_adapter(trained.adaptable, folder / "original", metadata={"base_model": BASE})
    made = {to: convert(original, folder / f"{to}.safetensors", to=to, base=BASE).files for to in EXACT}
    return {"original": (original,), **made}


def load(model, paths, strength=1.0):
    for number, path in enumerate(paths):
        load_adapter(model.adaptable, path, strength=strength, name=f"adapter {number}")


@torch.no_grad()
def outputs(model, seed=0):
    """What the UNet predicts from noise and the embeddings of both text encoders."""
    stream = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 300, (1, 20), generator=stream)
    one, two = model.text_encoder(tokens), model.text_encoder_2(tokens)
    context = torch.cat([one.last_hidden_state, two.last_hidden_state], -1)
    noise = torch.randn(1, model.unet.config.in_channels, 8, 8, generator=stream)
    given = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return model.unet(noise, 500, context, added_cond_kwargs=given).sample


@pytest.fixture(scope="module")
def wanted(model, files):
    """The outputs of the base and of the original file."""
    base = outputs(model)
    load(model, files["original"])
    adapted = outputs(model)
    for network in model.adaptable.values():
        remove(network)
    assert (adapted - base).norm() > 0.1 * base.norm()
    return base, adapted


@pytest.mark.parametrize("to", EXACT)
def test_every_exact_file_computes_what_the_original_does(to, model, files, wanted):
    base, adapted = wanted
    load(model, files[to])
    try:
        assert (outputs(model) - adapted).norm() < 1e-5 * adapted.norm()
        for network in model.adaptable.values():
            set_strength(network, 0.0)
        assert torch.equal(outputs(model), base)
    finally:
        for network in model.adaptable.values():
            remove(network)


def test_they_draw_the_same_pictures(files, tmp_path):
    """The pair for ComfyUI as two adapters at once; also at other strengths by part, and strength 0 is no adapter."""
    cells = {to: "+".join(map(str, files[to])) for to in DRAWN}
    weak = "unet.down=0.5,text_encoder=0"
    cells |= {"weak original": f"{cells['original']}:{weak}", "weak kohya": f"{cells['kohya']}:{weak}"}
    rows = [{"prompt": "a bus", "adapter": cell} for cell in cells.values()]
    rows += [{"prompt": "a bus", "adapter": "none"}]
    rows += [{"prompt": "a bus", "adapter": cells[to], "strength": 0} for to in ("kohya", "comfy")]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["steps=2", "width=64", "height=64", "batch_size=1", f"output={tmp_path / 'out'}"]
    assert main(["sample", str(tmp_path / "jobs.jsonl"), "--set", *settings]) == 0
    found = [np.asarray(Image.open(path).convert("RGB"), int) for path in sorted((tmp_path / "out/samples").iterdir())]
    original, *others, weak_original, weak_kohya, base, zero_kohya, zero_pair = found
    assert len(others) == 2
    assert all(np.abs(picture - original).max() <= 1 for picture in others)
    assert np.abs(weak_kohya - weak_original).max() <= 1
    assert all(np.abs(one - other).max() > 9 for one, other in combinations([original, weak_original, base], 2))
    assert all((picture == base).all() for picture in (zero_kohya, zero_pair))
