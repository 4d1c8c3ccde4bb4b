"""What `inspect` finds in adapter files of all tools."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm import cli
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.tools.parts import kohya_tensors
from tests.formats.tools.test_tools import FILES, FIXTURES, path_of
from tests.shared import toy

BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0"
SGM = "input_blocks_4_1_transformer_blocks_0"


@pytest.mark.parametrize(("tool", "name"), FILES)
def test_files_of_tools(tool, name):
    found = inspect_file(path_of(name))
    assert found.tool == tool
    assert found.architecture == "sdxl"
    assert {module.method for module in found.modules} == {"lora" if name == "peft_lora" else "dora"}
    axes = {"peft_lora": "", "lycoris_in": "in"}
    assert {module.axis for module in found.modules} == {axes.get(name, "out")}
    assert not found.ambiguous
    by_path = {module.path: module for module in found.modules}
    if name == "peft_dora":
        assert (by_path[toy.UNET[0].path].rank, by_path[toy.UNET[2].path].alpha) == (2, 6)
    tensors = load_file(path_of(name) if path_of(name).is_file() else next(path_of(name).glob("*.safetensors")))
    size = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
    assert sum(module.num_parameters for module in found.modules) == size


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "LLM"),
        ("model.language_model.layers.0.mlp.down_proj", "LLM"),
        ("transformer.h.0.attn.c_attn", "LLM"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder-decoder (T5)"),
        ("model.decoder.layers.0.encoder_attn.k_proj", "encoder-decoder (BART)"),
        ("text_model.encoder.layers.0.mlp.fc1", "CLIP"),
        ("something.else", None),
    ],
)
def test_kinds_of_models_of_transformers(path, kind, tmp_path):
    tensors = {f"base_model.model.{path}.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    found = inspect_file(tmp_path)
    assert (found.architecture, found.names) == (kind, "transformers" if kind else "diffusers")


def test_a_file_that_was_converted_from_a_training_here_is_made_with_dora_mm(tmp_path):
    write(tmp_path / "a.safetensors", config="pipeline: train_diffusion\nname: k\n")
    write(tmp_path / "b.safetensors", config="something else")
    made = [inspect_file(tmp_path / name).made_with for name in ("a.safetensors", "b.safetensors")]
    assert made == ["dora_mm", None]


def write(path, change=lambda key, tensor: (key, tensor), **header):
    tensors = {}
    for name in toy.UNET:
        prefix = f"lora_unet_{name.path.replace('.', '_')}"
        for end, tensor in kohya_tensors(toy.layer(name)).items():
            key, value = change(f"{prefix}.{end}", tensor)
            tensors[key] = value.contiguous()
    save_file(tensors, path, metadata=header or None)
    return path


def test_header_names_and_tokens(tmp_path):
    conv = ("down_blocks_1_resnets_0_conv1", "input_blocks_4_0_in_layers_2")
    path = write(tmp_path / "a.safetensors", lambda key, t: (key.replace(BLOCK, SGM).replace(*conv), t))
    tensors = {**load_file(path), "bundle_emb.TOK.string_to_param.*": torch.ones(1, 12), "stray": torch.ones(1)}
    save_file(tensors, path, metadata={"ss_base_model_version": "sdxl_base_v1-0", "ss_learning_rate": "0.0001"})
    found = inspect_file(path)
    assert (found.architecture, found.names, found.base_model) == ("sdxl", "SGM", "sdxl_base_v1-0")
    assert {module.path for module in found.modules} == {name.path for name in toy.UNET}
    assert found.tokens == ("bundle_emb.TOK.string_to_param.*",)
    assert found.others == ("stray",)
    assert found.settings["ss_learning_rate"] == "0.0001"


def test_the_axis_that_a_shape_does_not_say(tmp_path):
    flat = write(tmp_path / "a.safetensors", lambda key, t: (key, t.flatten() if key.endswith("dora_scale") else t))
    found = inspect_file(flat)
    unclear = [module.path for module in found.modules if module.axis == "?"]
    assert unclear == [toy.UNET[1].path, toy.UNET[0].path]
    assert any("axis of 2 magnitudes" in point and "--axis" in point for point in found.ambiguous)
    assert any("--base" in point for point in found.ambiguous)
    scale = torch.arange(1.0, 17.0)[:, None]
    weights = {name: W0 * scale if W0.shape == (16, 16) else W0 for name, W0 in toy.base().items()}
    tensors = {k: t * scale.flatten() if t.shape == (16,) else t for k, t in load_file(flat).items()}
    save_file(tensors, flat)
    evidence = [re.findall(r"-?\d\.\d{3}", point) for point in inspect_file(flat, weights).ambiguous[1:]]
    assert len(evidence) == 2
    assert all(float(rows) > 0.9 > 0.6 > abs(float(columns)) for rows, columns in evidence)


def test_alpha_that_is_not_in_the_file(tmp_path):
    tensors = {k: t for k, t in load_file(write(tmp_path / "a.safetensors")).items() if not k.endswith(".alpha")}
    save_file(tensors, tmp_path / "b.safetensors")
    found = inspect_file(tmp_path / "b.safetensors")
    assert {module.alpha for module in found.modules} == {None}
    assert any("alpha is not in the file" in point for point in found.ambiguous)


@pytest.mark.parametrize(
    ("ending", "title"),
    [
        ("oft_blocks", "OFT or BOFT of LyCORIS"),
        ("oft_diag", "OFT of LyCORIS"),
        ("on_input", "IA3 of LyCORIS"),
        ("lora_mid_A.weight", "a Tucker decomposition of another tool"),
        ("bottleneck.down.weight", "series or parallel adapters"),
        ("prompt_embeddings", "a learned prefix or prompt"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}])
def test_other_methods_are_named(ending, title, beside, tmp_path):
    """Also where some modules are adapted by LoRA."""
    tensors = {f"lora_unet_{BLOCK}_attn1_to_q.{ending}": torch.ones(2, 2), **beside}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"holds {title}, not LoRA or DoRA: "):
        inspect_file(tmp_path / "a.safetensors")


def test_the_command(capsys):
    assert cli.main(["inspect", str(FIXTURES / "lycoris_in.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "LyCORIS" in text
    assert re.search("model +sdxl; names as in diffusers", text)
    assert cli.main(["inspect", str(FIXTURES / "lycoris_in.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tool"], len(found["modules"]), found["modules"][0]["axis"]) == ("kohya", 5, "in")
    assert cli.main(["inspect", "samples/tiny-sdxl", "--json"]) == 2
    assert "--base, --json and --header are for adapter files" in capsys.readouterr().err


def test_a_magnitude_that_fits_neither_axis_and_an_alpha_of_two_values(tmp_path):
    path = write(tmp_path / "a.safetensors")
    tensors = load_file(path)
    scale = next(key for key in tensors if key.endswith("attn1_to_q.dora_scale"))
    alpha = scale.replace("dora_scale", "alpha")
    tensors |= {scale: torch.ones(7, 1), alpha: torch.ones(2)}
    save_file(tensors, path)
    found = inspect_file(path)
    damage = "; ".join(found.damage)
    assert re.search("magnitude of .*attn1_to_q fits neither the rows nor the columns of the weight", damage)
    assert "--axis" not in "; ".join(found.ambiguous)
    assert f"alpha of {alpha.removesuffix('.alpha')} is not one number" in damage
    assert found.works_in == ()
    tensors[alpha] = torch.tensor(float("nan"))
    save_file(tensors, path)
    assert json.loads(json.dumps(inspect_file(path).as_dict(), allow_nan=False))


def test_text_encoders_alone_have_no_architecture(tmp_path):
    tensors = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors").architecture is None


def test_a_model_that_is_given_as_an_adapter_is_called_a_model(tiny_folder, capsys):
    weights = tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    base = ["--base", str(tiny_folder)]
    for given, what in ((weights, "is a model, or a part of one"), (tiny_folder, "is the folder of a model")):
        for command in (["verify", str(given), *base], ["convert", str(given), "OUT", "--to", "kohya", *base]):
            assert cli.main(command) == 2
            assert f"{given} {what}, and no adapter" in capsys.readouterr().err
