"""PEFT's other methods, by files that PEFT itself writes: LoHa and LoKr are read, and all others are named."""

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_mm import convert, extract, load_adapter, merge, verify
from dora_mm.cli import main
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import fitted, new_weight
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.naming.names import Name
from dora_mm.formats.tools.methods import METHODS, READ

LAYERS = {
    "q": lambda: nn.Linear(32, 32),
    "up": lambda: nn.Linear(32, 64),
    "down": lambda: nn.Linear(64, 32),
}
CONVOLUTIONS = {
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "one": lambda: nn.Conv2d(12, 8, 1),
}
SETTINGS = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "IA3": {"feedforward_modules": ["down"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["words"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8, "r": 2},
    "WAVEFT": {"n_frequency": 64},
}
OF_LANGUAGE_MODELS = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "SHADOW": {},
    "XLORA": {},
}
TYPES = [kind.value for kind in peft.PeftType]
OFTEN = ("BOFT", "IA3", "LILY", "LN_TUNING", "OFT", "P_TUNING", "RANDLORA", "VERA")  # the rest takes 4 s
OTHERS = [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES if kind not in READ]


class Small(nn.Module):
    """Layers with biases one behind the other, a norm and an embedding."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.words, self.norm = nn.Embedding(8, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleDict({name: make() for name, make in layers.items()})

    def forward(self, tokens=None):
        x = self.words(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.norm(x)


def language_model():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False))


def write(kind, folder):
    """An adapter of a type with values that are not those of its beginning, saved by PEFT; and its base model."""
    settings = {"task_type": "CAUSAL_LM", **OF_LANGUAGE_MODELS[kind]} if kind in OF_LANGUAGE_MODELS else {}
    base = language_model() if kind in OF_LANGUAGE_MODELS else Small(LAYERS)
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if "target_modules" in made.__dataclass_fields__ and kind not in OF_LANGUAGE_MODELS:
        settings = {"target_modules": list(LAYERS), **SETTINGS.get(kind, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(base), made(**settings))
        mark = "." + peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind].partition("_")[0]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and mark in f".{name}":
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return base


# --- what is read ----------------------------------------------------------------------------------------------------

PRODUCTS = {
    "LoHa": (peft.LoHaConfig, {}),
    "LoHa of Tucker": (peft.LoHaConfig, {"use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {}),  # of two whole factors, which PEFT scales by alpha / r all the same
    "LoKr with both factored": (peft.LoKrConfig, {"r": 1, "rank_pattern": {}, "decompose_both": True}),
    "LoKr of Tucker": (peft.LoKrConfig, {"r": 1, "rank_pattern": {}, "use_effective_conv2d": True}),
}


@pytest.fixture(params=PRODUCTS)
def trained(request, tmp_path):
    """A folder that PEFT wrote, the weights of the base model by name, and those that PEFT merges, in float64."""
    config, changed = PRODUCTS[request.param]
    settings = {"r": 4, "alpha": 6, "rank_pattern": {"q": 3}, "alpha_pattern": {"up": 1}, "init_weights": False}
    layers = {**LAYERS, **CONVOLUTIONS}
    model = peft.get_peft_model(Small(layers).double(), config(target_modules=list(layers), **{**settings, **changed}))
    for parameter in model.parameters():  # as the file will have them
        parameter.data.copy_(parameter.data.float())
    base = {Name("model", f"layers.{name}"): w for name, w in weights(model).items()}
    model.float().save_pretrained(tmp_path / "peft")
    merged = weights(model.double().merge_and_unload())
    return tmp_path / "peft", base, {Name("model", f"layers.{name}"): W for name, W in merged.items()}


def weights(model):
    found = {name.rpartition("layers.")[2]: module for name, module in model.named_modules() if "layers." in name}
    found = {name.removesuffix(".base_layer"): module for name, module in found.items()}
    return {
        name: module.weight.detach().clone() for name, module in found.items() if name in {**LAYERS, **CONVOLUTIONS}
    }


def off(W, expected, W0):
    return float((W - expected).norm() / (expected - W0).norm())


def test_a_file_means_what_peft_merges(trained, request):
    folder, base, merged = trained
    file = AdapterFile(folder)
    for name, W0 in base.items():
        layer = fitted(file.layer(f"base_model.model.{name.path}"), W0)
        assert off(new_weight(layer, W0), merged[name], W0) < 1e-6
    found = inspect_file(folder)
    assert {module.method for module in found.modules} == {request.node.name.partition("[")[2][:4]}
    assert (found.damage, found.others, found.works_in) == ((), (), ("peft",))
    (verdict,) = verify(folder, "peft", {name: W0.float() for name, W0 in base.items()})
    assert verdict.findings == {"right": len(base)}


def test_it_loads_and_is_converted(trained, tmp_path):
    folder, base, merged = trained
    model = Small({**LAYERS, **CONVOLUTIONS})
    load_adapter(model, folder)
    merge(model, keep_base=False)
    floats = {name: W0.float() for name, W0 in base.items()}
    plain = convert(folder, tmp_path / "plain", to="lora", base=floats, energy=1.0).files[0]
    other = Small({**LAYERS, **CONVOLUTIONS})
    load_adapter(other, plain)
    merge(other, keep_base=False)
    for name, W0 in base.items():
        for found in (model, other):
            assert off(found.get_submodule(name.path).weight.detach(), merged[name], W0) < 2e-5


def test_peft_takes_no_lokr_of_a_one_dimensional_convolution_as_lycoris_does(tmp_path):
    config = peft.LoKrConfig(target_modules=["conv"], r=4, init_weights=False)
    peft.get_peft_model(Small({"conv": lambda: nn.Conv1d(8, 12, 3)}), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv: it is the LoKr of a one-dimensional convolution"):
        load_adapter(Small({"conv": lambda: nn.Conv1d(8, 12, 3)}), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "LORA"}, "its tensors are not those of LORA, which adapter_config.json says"),
        ({"r": 0}, "its alpha 8 and its rank 0 are not both positive numbers"),
        ({"alpha": "8"}, "alpha must be a finite number, not '8'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, message, tmp_path):
    base = write("LOHA", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)


# --- what is named ---------------------------------------------------------------------------------------------------


def test_all_of_pefts_types_are_known():
    assert set(TYPES) <= {*METHODS, *READ}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_read_is_named_with_what_to_do(kind, tmp_path):
    """The advice is what PEFT can do: merge it into nothing but weights, into biases or norms too, or not at all."""
    folder, method = tmp_path / "peft", METHODS[kind]
    base = write(kind, folder)
    sentence = re.escape(f"holds {method.title}, not LoRA or DoRA: {method.advice}")
    for use in (inspect_file, lambda path: load_adapter(base, path)):
        with pytest.raises(ValueError, match=sentence):
            use(folder)
    changed = changed_by_peft(base, folder)
    of_layers = {f"layers.{name}.weight" for name in LAYERS}
    assert ("dora-mm extract" in method.advice) == (changed == of_layers)
    assert ("MERGED as a model" in method.advice) == bool(changed - of_layers)
    if method.keys:  # PEFT's settings are not there
        (folder / "adapter_config.json").unlink()
        with pytest.raises(ValueError, match=sentence):
            AdapterFile(folder)


def changed_by_peft(base, folder):
    """The names of the tensors of a model that PEFT changes when it merges a file; none where it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().state_dict()
        except (ValueError, AttributeError, NotImplementedError, TypeError):
            return set()
    before = base.state_dict()
    return {name for name in before if not torch.equal(merged[name], before[name])}


def test_the_advice_works(tmp_path):
    base = language_model()
    base.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(target_modules=["q_proj", "down_proj"], r=4, d_initial=0.5, init_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "vera")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "vera").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    extract(tmp_path / "merged", tmp_path / "base", tmp_path / "dora", rank=8)
    own = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(own, tmp_path / "dora")
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(own(tokens).logits, merged(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "command", ["inspect FILE", "verify FILE --base M", "convert FILE NEW --to kohya", "merge M FILE NEW"]
)
def test_the_commands_say_it(command, tmp_path, capsys):
    write("RANDLORA", tmp_path)
    (tmp_path / "model").mkdir()
    words = {"FILE": str(tmp_path), "NEW": str(tmp_path / "new"), "M": str(tmp_path / "model")}
    assert main([words.get(word, word) for word in command.split()]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert "holds RandLoRA, not LoRA or DoRA: merge it with PEFT" in sentence


def test_a_type_that_is_not_known_is_named(tmp_path):
    save_file({"base_model.model.q.new_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NEWLORA"}')
    with pytest.raises(ValueError, match="holds an adapter of PEFT's type 'NEWLORA', not LoRA or DoRA"):
        AdapterFile(tmp_path)


def test_modules_that_are_called_like_a_method_are_no_adapter_of_it(tmp_path):
    write("LORA", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.replace("layers.q", "shadow_net.q"): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert any("shadow_net" in module for module in AdapterFile(tmp_path).modules)
