"""Embeddings, GPT-2's Conv1D and attentions: what PEFT computes from our files, and we from PEFT's."""

import copy
import json

import peft
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dora_mm import DoRASpec, formats, inject, load_adapter, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.formats.tools.peft_config import OUR_METADATA
from tests.shared import reference

TOKENS = torch.arange(12).view(2, 6)


class Mixed(nn.Module):
    """A Conv1D, a Linear layer of the same shape, and an embedding with padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=3)
        self.transposed = Conv1D(8, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.transposed(self.words(x)).tanh())


def gpt2():
    return GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=8))


MODELS = {
    "mixed": (Mixed, ["words", "transposed", "linear"]),
    "gpt2": (gpt2, ["wte", "wpe", "attn.c_attn", "mlp.c_proj"]),
    "conv1d alone": (gpt2, ["attn.c_attn"]),
    "embedding alone": (Mixed, ["words"]),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def output(model):
    with torch.no_grad():
        y = model(TOKENS)
    return y if isinstance(y, torch.Tensor) else y[0]


def trained(name, method):
    model = build(name)
    inject(model, MODELS[name][1], DoRASpec(rank=2, alpha=5, method=method))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_peft_computes_the_same_from_our_file(tmp_path, name, method):
    model = trained(name, method)
    save_adapter(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    assert reference.relative_error(output(theirs), output(model)) < 1e-6
    assert reference.relative_error(output(build(name)), output(model)) > 1e-3
    ours = build(name)
    load_adapter(ours, tmp_path)
    assert torch.equal(output(ours), output(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_dora", [True, False])
def test_we_compute_the_same_from_their_file(tmp_path, name, use_dora):
    targets = MODELS[name][1]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=use_dora, target_modules=targets, fan_in_fan_out="gpt2" in name
    )
    theirs = peft.get_peft_model(build(name), config).eval()
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = build(name)
    load_adapter(ours, tmp_path)
    assert reference.relative_error(output(ours), output(theirs)) < 1e-6
    assert reference.relative_error(output(build(name)), output(ours)) > 1e-3


def test_keys_and_shapes(tmp_path):
    found = load_file(save_adapter(trained("mixed", "dora"), tmp_path, format="peft"))
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in found.items()}
    assert shapes == {
        "words.lora_embedding_A": (2, 12),
        "words.lora_embedding_B": (8, 2),
        "words.lora_magnitude_vector": (8,),
        "transposed.lora_A.weight": (2, 8),
        "transposed.lora_B.weight": (8, 2),
        "transposed.lora_magnitude_vector": (8,),
        "linear.lora_A.weight": (2, 8),
        "linear.lora_B.weight": (8, 2),
        "linear.lora_magnitude_vector": (8,),
    }


def test_a_transposed_layer_of_another_shape_is_refused(tmp_path):
    """Conv1D stores its weight as (in, out), so its shape alone would fit the transposed layer."""
    model, other = nn.Sequential(Conv1D(8, 6)), nn.Sequential(Conv1D(6, 8))
    inject(model, ["0"], DoRASpec(rank=2))
    save_adapter(model, tmp_path, format="peft")
    with pytest.raises(ValueError, match=r"its lora_A has shape \(2, 6\) instead of \(2, 8\)"):
        load_adapter(other, tmp_path)


def test_the_base_embedding_that_peft_saves_too(tmp_path):
    """PEFT adds the base weight of an adapted `embed_tokens` to the file."""
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    nn.init.normal_(theirs.base_model.model.model.embed_tokens.lora_embedding_A["default"])
    theirs.eval().save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    before = output(base)
    load_adapter(base, tmp_path)
    assert reference.relative_error(output(base), output(theirs)) < 1e-6
    assert reference.relative_error(before, output(base)) > 1e-2


def test_the_alpha_of_a_layer_is_not_that_of_a_longer_path(tmp_path):
    """PEFT takes the key `linear` of a pattern for the end of `inner.linear` too."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"inner": nn.ModuleDict({"linear": nn.Linear(4, 4), "other": nn.Linear(4, 4)})})
    base["linear"] = nn.Linear(4, 4)
    model = copy.deepcopy(base)
    inject(model, ["inner.linear", "inner.other"], DoRASpec(rank=2, alpha=3))
    inject(model, ["re:linear"], DoRASpec(rank=1, alpha=8))
    save_adapter(model, tmp_path, format="peft")
    load_adapter(base, tmp_path)
    assert {path: layer.adaptation.spec for path, layer in adapted_layers(base).items()} == {
        path: layer.adaptation.spec for path, layer in adapted_layers(model).items()
    }
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.rank_pattern, config.alpha_pattern) == ({"^linear": 1}, {"^linear": 8})


# --- what PEFT would not compute -------------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return self.mlp(self.attn(x, x, x, need_weights=False)[0])


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def tower(targets):
    torch.manual_seed(0)
    model = Tower().requires_grad_(False)
    inject(model, targets, DoRASpec(rank=2, alpha=3))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    return model


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("target", PROJECTIONS)
def test_projections_of_a_multihead_attention_are_refused(tmp_path, format, target):
    reason = f"unet.attn.{target} is a projection of an nn.MultiheadAttention, which PEFT would never call: merge"
    with pytest.raises(ValueError, match=reason):
        save_adapter({"unet": tower(["mlp", target])}, tmp_path, format=format)
    assert not list(tmp_path.iterdir())


def test_an_out_projection_elsewhere_is_a_linear_layer(tmp_path):
    model = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8))
    inject(model, ["0"], DoRASpec(rank=2))
    assert save_adapter(model, tmp_path, format="peft").is_file()


class Renamed(nn.Linear): ...


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path):
    model = nn.Sequential(QwenImageCausalConv3d(4, 4, 3), Renamed(8, 8))
    inject(model, ["1"], DoRASpec(rank=2))
    assert formats.format_for({"model": model}, "peft") == "peft"
    inject(model, ["0"], DoRASpec(rank=2))
    with pytest.raises(ValueError, match=r"model\.0 is a QwenImageCausalConv3d, to whose result PEFT adds the update"):
        save_adapter(model, tmp_path, format="peft")


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_embedding_that_scales_its_rows(tmp_path, method):
    """PEFT looks for `embed_scale`, which those of transformers have, and scales its update too."""
    torch.manual_seed(0)
    base = nn.Sequential(BartScaledWordEmbedding(12, 8, padding_idx=1, embed_scale=3.0))
    model = copy.deepcopy(base)
    inject(model, ["0"], DoRASpec(rank=2, alpha=5, method=method))
    reference.randomize(model[0])
    save_adapter(model, tmp_path, format="peft")
    expected = output(model)
    assert reference.relative_error(output(base), expected) > 1e-3
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert reference.relative_error(output(theirs), expected) < 1e-6


@pytest.mark.parametrize(
    ("targets", "preferred", "expected"),
    [
        (["mlp"], "peft", "peft"),
        (["mlp"], "diffusers", "diffusers"),
        (["mlp", "q_proj"], "peft", "native"),
        (["out_proj"], "diffusers", "native"),
    ],
)
def test_the_format_for_a_model(targets, preferred, expected):
    assert formats.format_for({"unet": tower(targets)}, preferred) == expected


def test_full_weights_need_our_own_format():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, ["0"], DoRASpec(method="full"))
    assert formats.format_for({"model": model}, "peft") == "native"


def test_files_of_such_towers_that_were_written_before_load(tmp_path):
    """A folder as save_adapter(format="peft") wrote it when it did not refuse them yet."""
    model, other = tower(["mlp", *PROJECTIONS]), Tower().requires_grad_(False)
    base = {key: t for key, t in model.state_dict().items() if "lora" not in key and "magnitude" not in key}
    other.load_state_dict(base)
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    layers = adapted_layers(model)
    tensors = {
        f"base_model.model.{path}.{names[name]}": tensor.detach()
        for path, layer in layers.items()
        for name, tensor in layer.adapter_tensors().items()
    }
    ours = {"method": "dora", "norm_grad": "detached", "dropout": 0.0, "parameters": []}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {OUR_METADATA: json.dumps(ours)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": list(layers)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter({"vision": other}, tmp_path)
    x = torch.randn(2, 3, 8)
    assert torch.equal(other(x), model(x))


def test_one_format_remains_in_a_folder(tmp_path):
    old = save_adapter(tower(["mlp"]), tmp_path, format="peft")
    new = save_adapter(tower(["mlp", "q_proj"]), tmp_path, format="native")
    with pytest.raises(ValueError, match="contains 2 adapter files"):
        formats.find_file(tmp_path)
    formats.remove_other_formats(new)
    assert formats.find_file(tmp_path) == new
    assert not old.exists()
