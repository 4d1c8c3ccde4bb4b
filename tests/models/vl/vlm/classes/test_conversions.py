"""Adapters of vision-language models in PEFT, after they were converted for it or extracted from two checkpoints."""

import json

import pytest
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm.formats.commands.verify import verify
from tests.documented.vlm_classes import TRAINED, built, images_in, named
from tests.models.vl.vlm.classes.conversions import adapted, conversions
from tests.shared.data.vlm_rows import write_images

LEFT_OUT = "PEFT would leave out"
PEFT_CANNOT = {  # why no file is written, by target
    "aria": ("is not the name of a module",) * 2 + ("left out: ",),  # rows of an nn.MultiheadAttention
    "deepseek_ocr2": (LEFT_OUT,) * 3,
    "unlimited_ocr": (LEFT_OUT,) * 3,
    "inkling2": (LEFT_OUT,) * 3,
    "inkling2_loop": (LEFT_OUT,) * 3,
    "mistral_large4": (LEFT_OUT,) * 3,
    "inkling_mm_model": ("stacked experts", "stacked experts", "left out: "),  # the shared ones
    "glm4v_moe": ("ParamWrapper does not work with use_dora", LEFT_OUT, "ParamWrapper does not work with use_dora"),
}
BY_MECHANISM = {  # how the names of a checkpoint become those of the class
    "llava": "beginnings change",
    "molmo2": "several modules share a tensor",
    "mistral_large4": "PEFT takes modules of the class for others of a checkpoint",
}


def check(kind, base, images, scratch):
    count, found = conversions(base, images, scratch)
    for (target, result), reason in zip(found.items(), PEFT_CANNOT.get(kind, ("",) * 3), strict=True):
        assert reason in result if reason else result == count, target


@pytest.mark.parametrize("name", BY_MECHANISM)
def test_peft_takes_all_modules_and_computes_what_our_model_does(name, tiny_vlm, tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    check(name, tiny_vlm(name), write_images(images), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_peft_takes_all_modules_of_every_class(kind, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.getbasetemp() / "classes"
    folder.mkdir(exist_ok=True)
    check(kind, built(named(kind), folder), images_in(folder), tmp_path)


def test_verify_sees_the_names_of_a_checkpoint_that_peft_does_not_know(tiny_vlm, tmp_path):
    """As `convert` wrote them until its names were the class's own."""
    base, folder = tiny_vlm("llava"), tmp_path / "peft"
    dora_mm.save_adapter(adapted(base).networks, folder, format="peft")
    (right,) = verify(folder, "peft", base)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    save_file({name.replace("language_model.layers", "layers"): tensor for name, tensor in tensors.items()}, file)
    config["target_modules"] = [name.replace("language_model.layers", "layers") for name in config["target_modules"]]
    settings.write_text(json.dumps(config))
    (wrong,) = verify(folder, "peft", base)
    assert set(right.findings) == {"right"}
    assert wrong.findings["not known to this tool"] == sum(
        ".layers." in n and "vision" not in n for n in config["target_modules"]
    )
