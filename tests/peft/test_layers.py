"""All that PEFT does with its layers goes on, and what a fused pass cannot read runs PEFT's own code."""

import copy
import io
import json
import pickle

import peft
import pytest
import torch
from peft.tuners.lora import variants
from torch import nn

import dora_mm
from dora_mm.peft import fixed_norms, fuse, layers
from tests.peft.models import adapted, computed, example, fused, train
from tests.shared.reference import relative_error


@pytest.fixture
def passes(monkeypatch):
    """The fused passes that were run."""
    found = []
    apply = layers.Scaled.apply
    monkeypatch.setattr(layers.Scaled, "apply", lambda *given: (found.append(given), apply(*given))[1])
    return found


def assert_same(ours, theirs, x):
    for found, expected in zip(computed(ours, x), computed(theirs, x), strict=True):
        assert relative_error(found, expected) < 2e-6


class Net(nn.Module):
    """Layers of three kinds; only two of them are targets of the second adapter."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 24), nn.Linear(24, 40), nn.Linear(40, 6, bias=False)

    def forward(self, ids, adapter_names=None):
        return self.down(torch.tanh(self.up(self.embed(ids))))


IDS = torch.randint(0, 30, (5, 7), generator=torch.Generator().manual_seed(0))


def twins(**settings):
    """(PEFT's, the same model fused): adapters `first` and `second` with DoRA, `plain` without; the first is active."""
    torch.manual_seed(0)
    base = peft.LoraConfig(r=4, use_dora=True, target_modules=["embed", "up", "down"], **settings)
    theirs = peft.get_peft_model(Net(), base, "first")
    theirs.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["up", "down"]))
    theirs.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["up"]))
    train(theirs)
    ours = copy.deepcopy(theirs)
    dora_mm.fuse_peft(ours)
    return theirs, ours


# --- the line and its report -----------------------------------------------------------------------------------------


def test_a_model_with_lora_alone_has_nothing_to_fuse():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    report = dora_mm.fuse_peft(model)
    assert report.fused == []
    assert str(report) == (
        "nothing to fuse: 1 layer (1 model.0) stays PEFT's: LoRA without DoRA costs as little already "
        "(DoRA is use_dora=True in LoraConfig)"
    )


def test_the_report_names_what_runs_fused_and_what_does_not():
    _, ours = twins(lora_dropout=0.1)
    report = dora_mm.fuse_peft(ours)
    assert str(report).splitlines() == [
        "DoRA runs fused in 5 layers (1 embed, 2 up, 2 down)",
        "  2 layers (1 up, 1 down) of these have lora_dropout, which about doubles the cost of a training step: set it "
        "to 0 if you can",
        "1 layer (1 up) stays PEFT's: LoRA without DoRA costs as little already (DoRA is use_dora=True in LoraConfig)",
        "Adapters that are added later stay PEFT's until fuse_peft is called again.",
    ]
    assert ("base_model.model.up", "second") in report.fused
    assert dora_mm.unfuse_peft(ours) == 5
    assert dora_mm.unfuse_peft(ours) == 0


def test_unfusing_gives_pefts_variants_back():
    theirs, ours = twins()
    assert type(ours.base_model.model.embed.lora_variant["first"]).__module__ == "dora_mm.peft.layers"
    dora_mm.unfuse_peft(ours)
    for path, layer, name in fuse.adapters_of(theirs):
        kinds = [type(m.get_submodule(path).lora_variant.get(name)) for m in (theirs, ours)]
        assert kinds[0] is kinds[1], layer


def test_adapters_that_are_added_later_are_pefts_until_the_line_is_called_again(passes):
    _, ours = twins()
    ours.add_adapter("d", peft.LoraConfig(r=2, use_dora=True, target_modules=["up"]))
    ours.set_adapter("d")
    ours(IDS)
    assert passes == []
    dora_mm.fuse_peft(ours)
    ours(IDS)
    assert len(passes) == 1


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0.dev0", "1.0"])
def test_other_releases_of_peft_are_refused_and_the_model_is_unchanged(version, monkeypatch):
    theirs, _ = twins()
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ValueError, match=rf"^fuse_peft works with PEFT 0.18 to 0.21, and this is {version}: install"):
        dora_mm.fuse_peft(theirs)
    assert list(fuse.fused_of(theirs)) == []


def test_the_installed_release_is_in_the_range():
    fuse.check_version(peft.__version__)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="^fuse_peft found no layer with a LoRA of PEFT in this model: add"):
        dora_mm.fuse_peft(Net())


def test_what_is_not_known_stays_pefts():
    class Other(peft.tuners.lora.layer.Linear):
        pass

    model = adapted("Linear")
    model.base_model.model.layer.__class__ = Other
    grouped = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), peft.LoraConfig(r=2, use_dora=True, target_modules=["0"])
    )
    assert "the class Other is not known here" in str(dora_mm.fuse_peft(model))
    assert "a convolution with groups" in str(dora_mm.fuse_peft(grouped))
    assert list(fuse.fused_of(model)) + list(fuse.fused_of(grouped)) == []


# --- what PEFT does with its layers ----------------------------------------------------------------------------------


def test_several_adapters_in_the_order_of_peft():
    """DoRA of the second scales what the first has computed: the order matters, and it is no sum."""
    theirs, ours = twins()
    found = []
    for order in (["first", "second", "plain"], ["second", "first"], ["plain", "second", "first"], ["second"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(order)
        assert_same(ours, theirs, IDS)
        found.append(ours(IDS))
    assert relative_error(found[1], found[2]) > 1e-3


def test_setting_disabling_deleting_scaling():
    theirs, ours = twins()
    bare = theirs.get_base_model()
    for model in (theirs, ours):
        model.set_adapter("second")
    assert_same(ours, theirs, IDS)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(IDS), theirs(IDS))
    for model in (theirs, ours):
        model.base_model.model.up.set_scale("second", 0.3)
        model.delete_adapter("first")
    assert_same(ours, theirs, IDS)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA"):
        ours.eval()(IDS, adapter_names=["second"] * len(IDS))
    assert bare is not None


@pytest.mark.parametrize("safe", [False, True])
def test_merging_unmerging_unloading(safe):
    theirs, ours = twins()
    for model in (theirs, ours):
        model.base_model.set_adapter(["first", "second"])
    before = ours(IDS).detach()
    for model in (theirs, ours):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(ours(IDS), theirs(IDS))
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert relative_error(ours(IDS), before) < 1e-5
    merged = [model.merge_and_unload(safe_merge=safe)(IDS) for model in (theirs, ours)]
    assert torch.equal(*merged)
    assert type(ours.base_model.model.up) is nn.Linear


def test_files_are_pefts(tmp_path):
    theirs, ours = twins()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("first", "second"):
        files = [tmp_path / who / name / "adapter_model.safetensors" for who in ("ours", "theirs")]
        assert files[0].read_bytes() == files[1].read_bytes()
        settings = [json.loads(file.with_name("adapter_config.json").read_text()) for file in files]
        for each in settings:
            each["target_modules"].sort()  # a set
        assert settings[0] == settings[1]
    base = Net()
    base.load_state_dict({k: v for k, v in twins()[0].unload().state_dict().items() if "lora" not in k})
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours/first", adapter_name="first")
    assert relative_error(loaded(IDS), ours(IDS)) < 1e-6
    ours.load_adapter(tmp_path / "theirs/first", adapter_name="loaded")
    assert ours.state_dict().keys() > theirs.state_dict().keys()


def test_copies_and_pickles_run_fused(passes):
    theirs, ours = twins()
    with fixed_norms(ours):
        twin, stored = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (twin, stored, torch.load(buffer, weights_only=False)):
        passes.clear()
        assert_same(model, theirs, IDS)
        assert len(passes) == 3
        assert not any(layer.lora_variant[name].is_fixed for layer, name in fuse.fused_of(model))
        train(model, seed=7)
        assert relative_error(model(IDS), theirs(IDS)) > 1e-3  # its own parameters, not those of the original


def test_hooks_of_the_base_layer_are_called(passes):
    theirs, ours = twins()
    for model in (theirs, ours):
        model.base_model.model.up.base_layer.register_forward_hook(lambda module, given, found: found * 1.5)
    assert_same(ours, theirs, IDS)
    assert len(passes) == 3


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_hooks_of_other_modules_are_pefts(name, passes):
    theirs, ours = twins()
    called = []
    for model in (theirs, ours):
        module = getattr(model.base_model.model.up, name)["first"]
        module.register_forward_hook(lambda module, given, found: called.append(found))
    assert_same(ours, theirs, IDS)
    assert len(passes) == 2
    assert len(called) >= 2


def test_dropout_over_a_padding_that_peft_leaves_out_is_pefts(passes):
    theirs = adapted(nn.Conv2d(16, 128, 3, padding=1, padding_mode="circular"), lora_dropout=0.4)
    ours, found = copy.deepcopy(theirs), []
    report = str(dora_mm.fuse_peft(ours))
    assert "of these: PEFT's own code runs with dropout in training over a convolution whose" in report
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(model.train()(example("Conv2d")))
    assert torch.equal(*found)
    assert passes == []
    assert relative_error(ours.eval()(example("Conv2d")), theirs.eval()(example("Conv2d"))) < 1e-6
    assert len(passes) == 1


def test_offloaded_weights_are_pefts(passes):
    """Which PEFT itself cannot compute on a CPU: it sees them on `meta`, as a fused pass would."""
    from accelerate import cpu_offload

    for model in twins():
        cpu_offload(model, "cpu")
        assert model.base_model.model.up.base_layer.weight.is_meta
        with pytest.raises(NotImplementedError, match="meta tensor"):
            model(IDS)
    assert passes == []
    assert "with parameters that are sharded" in str(dora_mm.fuse_peft(model))


def test_weights_that_are_parametrized_are_pefts(passes):
    theirs, ours = twins()
    for model in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(model.base_model.model.up.lora_B["first"])
    assert relative_error(ours(IDS), theirs(IDS)) < 1e-6
    assert len(passes) == 2


def test_weights_in_float8_are_pefts():
    """Their scales lie where the model has them, and PEFT's own code may have been taught where."""
    model = adapted("Linear")
    base = model.base_model.model.layer.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "in float8" in str(dora_mm.fuse_peft(model))


def test_embeddings_that_scale_what_they_look_up():
    class Scaling(nn.Embedding):
        def __init__(self):
            super().__init__(160, 128)
            self.register_buffer("embed_scale", torch.tensor(7.0))

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    theirs = adapted(Scaling(), init_lora_weights=True)
    assert_same(fused(theirs), theirs, example("Embedding"))


def test_the_caches_of_peft_stay_empty():
    """PEFT keeps a dense B A of each layer there; a fused pass keeps no more than (O, R) numbers."""
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("this release of PEFT has no cache for DoRA")
    theirs, ours = (model.eval() for model in twins())
    with helpers.DoraCaching(), torch.no_grad():
        for _ in range(2):
            assert relative_error(ours(IDS), theirs(IDS)) < 1e-6
    for _, layer, name in fuse.adapters_of(ours):
        if name in layer.lora_magnitude_vector:
            assert layer.lora_magnitude_vector[name]._dora_cache == {}
            kept = layer.lora_variant[name].kept
            assert kept is None or sum(t.numel() for t in kept.rows if t is not None) < 50 * 24


def test_inference():
    theirs, ours = twins()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert relative_error(ours(IDS), theirs(IDS)) < 1e-6


def test_second_derivatives_are_refused():
    _, ours = twins()
    loss = ours(IDS).square().sum()
    weight = ours.base_model.model.up.lora_B["first"].weight
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_adapters_of_a_model_of_transformers():
    """As its `add_adapter` does it, which asks for a later release of PEFT than the newest one."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]), model)
    train(model)
    expected = model(IDS).logits
    report = dora_mm.fuse_peft(model)
    assert len(report.fused) == 4
    assert relative_error(model(IDS).logits, expected) < 1e-6


def test_adapters_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    unet.add_adapter(peft.LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_out.0", "conv1"]))
    train(unet)
    given = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)
    expected = unet(*given).sample
    assert len(dora_mm.fuse_peft(unet).fused) > 10
    assert relative_error(unet(*given).sample, expected) < 1e-5


def test_the_variants_of_peft_are_those_that_were_replaced():
    """A release with another variant of DoRA, or with other arguments, fails here."""
    names = {name for name in vars(variants) if name.startswith("Dora") and name.endswith("Variant")}
    assert names == {kind.__name__ for kind in fuse.FUSED}
