"""Adapter files of other tools in our pipelines: they draw the images of the original, and are trained on."""

import json
import re
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_mm import DoRASpec, convert, inject, load_adapter, merge, remove, save_adapter, set_strength
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.core import adapter_parameters
from dora_mm.models.images.families import load_image_model

EXACT = ("diffusers", "kohya", "comfy", "onetrainer", "ai-toolkit", "diff")
DRAWN = ("original", "kohya", "comfy")
BASE = "samples/tiny-sdxl"
PARTS = ["unet.attn", "unet.cross", "text_encoders.attn"]
LINEAR = ("attn", "cross", "ff")  # ai-toolkit has no DoRA of convolutions


@pytest.fixture(scope="module")
def model():
    return load_image_model(ModelConfig(path=BASE))


def change(networks):
    """Gives adapters values that change the outputs."""
    stream = torch.Generator().manual_seed(0)
    for network in networks:
        for key, parameter in adapter_parameters(network).items():
            if key.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=stream)
            if key.endswith("magnitude"):
                parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=stream))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Gives the files of one DoRA adapter of the UNet and both text encoders in the form of a tool."""
    folder, trained = tmp_path_factory.mktemp("files"), load_image_model(ModelConfig(path=BASE))
    inject(trained.unet, "sdxl-unet", DoRASpec(rank=2, alpha=3.0), parts=LINEAR)
    for name in ("text_encoder", "text_encoder_2"):
        inject(trained.adaptable[name], "clip-text", DoRASpec(rank=2, alpha=3.0), parts=("attn", "ff"))
    change(trained.adaptable.values())
    original = save_adapter(trained.adaptable, folder / "original", metadata={"base_model": BASE})

    @cache
    def made(to):
        if to == "original":
            return (original,)
        return convert(original, folder / f"{to}.safetensors", to=to, base=BASE, dtype="float32").files

    return made


@pytest.fixture(scope="module")
def convolutions(model, tmp_path_factory):
    """The files of a DoRA of the UNet's convolutions, by target."""
    folder = tmp_path_factory.mktemp("convolutions")
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2, alpha=3.0), parts=("conv",))
    change([model.unet])
    original = save_adapter(model.unet, folder / "original", metadata={"base_model": BASE})
    remove(model.unet)
    (file,) = convert(original, folder / "kohya.safetensors", to="kohya", base=BASE).files
    shapes = {key: tensor.dim() for key, tensor in load_file(file).items() if not key.endswith(".alpha")}
    assert len(shapes) > 60
    assert set(shapes.values()) == {4}
    return {"original": original, "kohya": file}


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
    load(model, files("original"))
    adapted = outputs(model)
    for network in model.adaptable.values():
        remove(network)
    assert (adapted - base).norm() > 0.1 * base.norm()
    return base, adapted


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.slow
def test_every_exact_file_computes_what_the_original_does(to, model, files, wanted):
    base, adapted = wanted
    load(model, files(to))
    try:
        assert (outputs(model) - adapted).norm() < 1e-5 * adapted.norm()
        for network in model.adaptable.values():
            set_strength(network, 0.0)
        assert torch.equal(outputs(model), base)
    finally:
        for network in model.adaptable.values():
            remove(network)


def images(run):
    return [np.asarray(Image.open(path).convert("RGB"), int) for path in sorted((run / "samples").iterdir())]


@pytest.mark.slow
def test_they_draw_the_same_images(files, convolutions, tmp_path):
    """Also convolutions, other strengths by part, and strength 0."""
    cells = {to: "+".join(map(str, files(to))) for to in DRAWN}
    weak = "unet.down=0.5,text_encoder=0"
    cells |= {"weak original": f"{cells['original']}:{weak}", "weak kohya": f"{cells['kohya']}:{weak}"}
    cells |= {f"convolutions {to}": str(file) for to, file in convolutions.items()}
    rows = [{"prompt": "a bus", "adapter": cell} for cell in cells.values()]
    rows += [{"prompt": "a bus", "adapter": "none"}]
    rows += [{"prompt": "a bus", "adapter": cells[to], "strength": 0} for to in ("kohya", "comfy")]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["steps=2", "width=64", "height=64", "batch_size=1", f"output={tmp_path / 'out'}"]
    assert main(["sample", str(tmp_path / "jobs.jsonl"), "--set", *settings]) == 0
    original, kohya, comfy, *drawn, base, zero_kohya, zero_comfy = images(tmp_path / "out")
    weak_original, weak_kohya, conv_original, conv_kohya = drawn
    same = [(original, kohya), (original, comfy), (weak_original, weak_kohya), (conv_original, conv_kohya)]
    assert all(np.abs(one - other).max() <= 1 for one, other in same)
    different = [original, weak_original, conv_original, base]
    assert all(np.abs(one - other).max() > 9 for one, other in combinations(different, 2))
    assert all((image == base).all() for image in (zero_kohya, zero_comfy))


def test_a_peft_file_belongs_to_the_network_that_has_its_modules(model, tmp_path):
    """Its keys name no network."""
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
    for parameter in adapter_parameters(model.unet).values():
        parameter.data.mul_(1.3).add_(0.02)
    before = outputs(model)
    file = save_adapter(model.unet, tmp_path, format="peft")
    remove(model.unet)
    try:
        load_adapter(model.adaptable, file, strength={"unet": 1.0})
        assert (outputs(model) - before).norm() < 1e-5 * before.norm()
    finally:
        remove(model.unet)


def test_what_has_no_low_rank_is_not_trained_on(files, image_folder, tmp_path, capsys):
    file, message = files("diff")[0], "has no low rank at"
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": BASE},
        "adapter": {"method": "lora", "rank": 2, "init_from": str(file)},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "batch_size": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "train.yaml")]) == 2
    assert message in capsys.readouterr().err


# --- plain LoRA with kohya's names -----------------------------------------------------------------------------------

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PLACES = r"(attn[12]\.to_|ff\.net|proj_in|proj_out|resnets\..*\.conv1|self_attn\.|mlp\.fc)"


@pytest.fixture(scope="module")
def kohya(model, tmp_path_factory):
    """A LoRA with kohya's names in fp16, with rank 4 and alpha 1, and rank 2 and alpha 3 of convolutions (LoCon).

    Returns:
        The file, and the change of each weight by component and path, in float64.
    """
    stream, tensors, changes = torch.Generator().manual_seed(0), {}, {}
    for component, network in model.adaptable.items():
        for path, module in network.named_modules():
            if not re.search(PLACES, path) or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            out, inner, *kernel = module.weight.shape
            rank, alpha = (2, 3.0) if kernel else (4, 1.0)
            down = torch.randn(rank, inner, *kernel, generator=stream).half() / inner**0.5
            up = 0.3 * torch.randn(out, rank, *(1,) * len(kernel), generator=stream).half()
            text_path = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
            name = PREFIXES[component] + text_path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            product = up.double().flatten(1) @ down.double().flatten(1)
            changes[component, path] = alpha / rank * product.view(module.weight.shape)
    file = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    save_file(tensors, file, metadata={"ss_network_module": "networks.lora", "ss_network_dim": "4"})
    return file, changes


def test_a_lora_of_kohya_is_the_change_that_it_describes(model, kohya):
    file, changes = kohya
    report = load_adapter(model.adaptable, file)
    try:
        assert report.num_modules == len(changes)
        before = {place: model.adaptable[place[0]].get_submodule(place[1]).weight.double() for place in changes}
        for network in model.adaptable.values():
            merge(network)
        for (component, path), change in changes.items():
            W = model.adaptable[component].get_submodule(path).weight.double()
            torch.testing.assert_close(W, before[component, path] + change, rtol=1e-5, atol=1e-6)
    finally:
        for network in model.adaptable.values():
            remove(network)


@pytest.mark.slow
def test_a_lora_of_kohya_is_drawn_and_trained_on(kohya, image_folder, tmp_path):
    """Also its modules for which the config has no part; with a learning rate of nothing it stays what it is."""
    file, changes = kohya
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": BASE},
        "adapter": {"method": "lora", "rank": 4, "alpha": 1.0, "parts": PARTS, "init_from": str(file)},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"lr": 1e-12},
        "train": {"steps": 1, "batch_size": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "train.yaml")]) == 0
    trained = tmp_path / "run" / "adapter"
    tensors = load_file(trained / "pytorch_lora_weights.safetensors")
    assert sum(key.endswith("lora_A.weight") for key in tensors) == len(changes)
    rows = [{"prompt": "a bus", "adapter": str(path)} for path in (file, trained)]
    rows += [{"prompt": "a bus", "adapter": f"{file}:0"}, {"prompt": "a bus", "adapter": "none"}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={BASE}", "steps=2", "width=64", "height=64", f"output={tmp_path / 'out'}"]
    assert main(["sample", str(tmp_path / "jobs.jsonl"), "--set", *settings]) == 0
    theirs, ours, zero, base = images(tmp_path / "out")
    assert np.abs(theirs - ours).max() <= 1
    assert np.abs(theirs - base).max() > 9
    assert (zero == base).all()
