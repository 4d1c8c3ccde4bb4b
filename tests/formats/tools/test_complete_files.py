"""What tools load of a whole file: names that they do not know, and files of which they load nothing."""

from importlib.metadata import version

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lycoris.wrapper import LycorisNetwork, create_lycoris
from packaging.version import Version
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import dora_mm
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.commands.loading import load_of
from dora_mm.formats.naming.known import reading
from dora_mm.formats.naming.names import canonical
from dora_mm.registries.tools import TOOLS, other_tools
from tests.formats.naming.test_names import sdxl  # noqa: F401
from tests.shared import toy

MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
SIZE = 96  # of both in the embedded model
TEXT = "encoder.layers.0.self_attn.q_proj"


def kohya(path=MODULE, prefix="lora_unet_", **more):
    """A module of plain LoRA, and tensors by the ends of their keys."""
    own = {"lora_down.weight": torch.ones(2, SIZE), "lora_up.weight": torch.ones(SIZE, 2), "alpha": torch.tensor(1.0)}
    return {f"{prefix}{path.replace('.', '_')}.{end.replace('-', '.')}": t for end, t in {**own, **more}.items()}


def peft(path=MODULE, prefix="unet.", **more):
    own = {"lora_A.weight": torch.ones(2, SIZE), "lora_B.weight": torch.ones(SIZE, 2)}
    return {f"{prefix}{path}.{end.replace('-', '.')}": t for end, t in {**own, **more}.items()}


ONES, SCALE = torch.ones(SIZE, SIZE), torch.ones(SIZE, 1)
TOKEN = {"bundle_emb.x.clip_l": torch.ones(1, SIZE)}


def refusal(tool, tensors, folder):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "a.safetensors")
    return load_of(AdapterFile(folder / "a.safetensors"), tool, "sdxl").refusal


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionXLPipeline.from_pretrained("samples/tiny-sdxl")


@pytest.mark.parametrize(
    ("tensors", "raises"),
    [
        (kohya(), False),
        (kohya(dora_scale=SCALE), False),
        ({**kohya(), **kohya(OTHER, **{"dora_scale": SCALE})}, False),
        ({**kohya(), f"lora_unet_{OTHER.replace('.', '_')}.diff": ONES}, True),
        (kohya(**{"lora_mid.weight": torch.ones(2, 2, 3, 3)}), True),
        (kohya(diff_b=torch.ones(SIZE)), True),
        ({**kohya(), **TOKEN}, True),
        (kohya(prefix="lycoris_"), True),
        ({**kohya(), **kohya(TEXT, "lora_te2_text_model_")}, True),  # no out_proj and no MLP
        ({**kohya(), **kohya(TEXT.replace("q_proj", "out_proj"), "lora_te2_text_model_")}, False),
        (peft(), False),
        (peft(dora_scale=SCALE), False),
        (peft(alpha=torch.tensor(1.0)), True),
        (peft(prefix=""), False),
        (peft(prefix="base_model.model."), False),
        ({**peft(), **kohya(OTHER)}, False),
    ],
)
def test_diffusers_raises_an_error_where_we_say_so(tensors, raises, pipe, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    try:
        pipe.load_lora_weights(str(path))
        raised = False
    except ValueError:
        raised = True
    finally:
        pipe.unload_lora_weights()
    assert raised == raises
    if not any(key.startswith(("down_blocks", "base_model")) for key in tensors):  # those we cannot read
        load = load_of(AdapterFile(path), "diffusers", "sdxl")
        assert (bool(load.refusal) or not load.lost) == raises


def test_comfy_loads_a_third_of_a_file_of_diffusers(sdxl):  # noqa: F811
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    paths = [path for path, module in sdxl.named_modules() if isinstance(module, kinds)]
    assert len(paths) == 794
    for prefix in ("unet.", ""):
        assert len(reading("comfyui", "sdxl", {prefix + path: () for path in paths}).lost) == 794 - 560  # the attention
    assert len(reading("comfyui", "sdxl", {"lora_unet_" + path.replace(".", "_"): () for path in paths}).lost) == 794


def test_forge_drops_a_file_with_more_than_12_keys_that_it_does_not_know(tmp_path):
    def unread(count):
        return {f"unet.blocks.{i}.to_q.lora_A.weight": torch.ones(2, SIZE) for i in range(count)}

    assert refusal("forge", {**kohya(), **unread(12)}, tmp_path) == ""
    assert "drops the file, since 13 keys" in refusal("forge", {**kohya(), **unread(13)}, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({**kohya(), **kohya(TEXT, "lora_te1_text_model_"), **kohya(TEXT, "lora_te2_")}, ""),
        (peft(), "at the name unet"),
        ({**kohya(), **peft(TEXT, "text_encoder.text_model.")}, "at the name text_encoder"),
        (kohya(prefix="lycoris_"), "at the name lycoris"),
        ({**kohya(), **TOKEN}, "at the name bundle_emb"),
        ({**kohya(), **kohya("input_blocks.4.1.proj_in")}, "some names are SGM's"),
        (peft("transformer_blocks.0.attn.to_q", "transformer."), ""),
    ],
)
def test_invokeai(tensors, reason, tmp_path):
    found = refusal("invokeai", tensors, tmp_path)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({**kohya(), **TOKEN}, ""),
        (kohya(dora_scale=SCALE), ""),
        (peft(**{"lora_magnitude_vector.weight": torch.ones(SIZE)}), ""),
        (peft(lora_magnitude_vector=torch.ones(SIZE)), "lora_magnitude_vector, and loads nothing"),
        ({**kohya(), f"lora_unet_{OTHER.replace('.', '_')}.diff": ONES}, "to_q.diff"),
        (kohya(**{"lora_mid.weight": torch.ones(2, 2, 3, 3)}), "lora_mid"),
        ({**kohya(dora_scale=SCALE), **kohya(OTHER)}, "some modules have a magnitude and some have none"),
    ],
)
def test_onetrainer(tensors, reason, tmp_path):
    found = refusal("onetrainer", tensors, tmp_path)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_conversion_to_onetrainer_gives_every_module_a_magnitude(source, tmp_path):
    (file,) = dora_mm.convert(source, tmp_path / "a.safetensors", to="onetrainer", base=toy.base()).files
    (verdict,) = dora_mm.verify(file, "onetrainer", toy.base())
    assert set(verdict.findings) == {"right"}
    assert "set OneTrainer's option" in verdict.usage


def test_a_refused_file_is_one_finding_with_its_reason(tmp_path):
    base = {canonical("unet", MODULE): torch.randn(SIZE, SIZE)}
    save_file(peft(), tmp_path / "a.safetensors")
    (verdict,) = dora_mm.verify(tmp_path / "a.safetensors", "invokeai", base)
    assert dict(verdict.findings) == {"refused": 1}
    assert verdict.error == 1
    assert verdict.layers[0].reason.startswith("raises an error")


def test_what_lycoris_writes_of_text_encoders_today(tmp_path, monkeypatch):
    """With transformers 5 names have no `text_model_`: SD.Next and InvokeAI find them, ComfyUI and A1111 do not."""
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_te1")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=20, bos_token_id=0, eos_token_id=1, **size))
    network = create_lycoris(encoder, 1.0, linear_dim=2, linear_alpha=1, preset="full", dora_wd=True)
    network.apply_to()
    state = {key: value.contiguous() for key, value in network.state_dict().items() if "encoder_layers" in key}
    for key, value in state.items():
        state[key] = torch.randn_like(value) if "lora_" in key.rpartition("lora_te1")[2] else value
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    assert all(key.startswith("lora_te1_encoder_layers_") for key in state)
    weights = {
        canonical("text_encoder", name): module.weight.detach()
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    verdicts = {verdict.tool: verdict for verdict in dora_mm.verify(path, "all", weights)}
    for tool, finding in {
        "sdnext": "right",
        "comfy": "not known to this tool",
        "a1111": "not known to this tool",
    }.items():
        assert set(verdicts[tool].findings) == {finding}
    (new,) = dora_mm.convert(path, tmp_path / "b.safetensors", to="kohya", base=weights).files
    assert all(module.startswith("lora_te1_text_model_encoder") for module in AdapterFile(new).modules)
    model = CLIPTextModel(encoder.config)
    report = dora_mm.load_adapter({"text_encoder": model}, path)
    assert report.num_modules == len(weights)


def test_the_versions_are_those_that_these_tests_run():
    for tool, package in {"peft": "peft", "diffusers": "diffusers", "kohya": "lycoris_lora"}.items():
        assert Version(version(package)) <= Version(TOOLS[tool].version)  # less with the oldest that are admitted
    assert all(TOOLS[name].version for name in other_tools())
