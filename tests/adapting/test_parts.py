"""The parts of models by their names in configs, each with a rank, method and learning rate of its own."""

import re

import pytest

from dora_mm.adapting.networks import adapt
from dora_mm.adapting.parts import full_name
from dora_mm.config.adapter import ImageAdapterConfig, check_adapter
from dora_mm.config.training import OptimizerConfig
from dora_mm.core import adapted_layers
from dora_mm.preview.parts import parts_table
from dora_mm.targets import find
from dora_mm.train.optim import build_optimizer

MAPS = {"unet": find("sdxl-unet"), "text_encoder": find("clip-text"), "text_encoder_2": find("clip-text")}


def config(parts, **settings) -> ImageAdapterConfig:
    return ImageAdapterConfig.model_validate({"rank": 4, "parts": parts, **settings})


def trained_by(tiny, parts, **settings):
    return adapt(tiny.adaptable, MAPS, config(parts, **settings), seed=0, backend="torch")


def specs(trained) -> dict[str, set[tuple]]:
    """Method, rank and alpha of the adapted layers, by network and part."""
    found: dict[str, set[tuple]] = {}
    for component, report in trained.reports.items():
        layers = adapted_layers(trained.networks[component])
        for module in report.modules:
            spec = layers[module.path].adaptation.spec
            found.setdefault(f"{component} {module.part}", set()).add((spec.method, spec.rank, spec.alpha))
    return found


def test_a_name_has_the_network_in_front_unless_it_is_the_only_one_or_begins_with_it():
    assert full_name("unet", "attn") == "unet.attn"
    assert full_name("model", "text.attn") == "text.attn"
    assert full_name("vision", "vision.attn") == "vision.attn"


def test_networks_have_settings_of_their_own(tiny):
    parts = {"text_encoder.attn": {"rank": 2, "lr": 1e-5}, "unet.attn": {}, "unet.ff": {"method": "lora", "alpha": 1.0}}
    trained = trained_by(tiny, parts, alpha=8.0)
    assert specs(trained) == {
        "unet attn": {("dora", 4, 8.0)},
        "unet ff": {("lora", 4, 1.0)},
        "text_encoder attn": {("dora", 2, 4.0)},
    }
    assert list(trained.networks) == ["unet", "text_encoder"]
    text = [name for name in trained.parameters if name.startswith("text_encoder.")]
    assert trained.rates == dict.fromkeys(text, 1e-5)
    groups = build_optimizer(trained.parameters, OptimizerConfig(lr=1e-3), trained.rates).param_groups
    assert [(group["lr"], len(group["params"])) for group in groups] == [
        (1e-3, len(trained.parameters) - len(text)),
        (1e-5, len(text)),
    ]


def test_text_encoders_means_all_of_them(tiny):
    trained = trained_by(tiny, ["text_encoders.attn"])
    assert list(specs(trained)) == ["text_encoder attn", "text_encoder_2 attn"]
    assert list(trained.adapted) == ["text_encoder", "text_encoder_2"]
    assert config(["text_encoders.attn"]).trains_text_encoders
    assert not config({"unet.attn": {}, "text_encoder.attn": {"method": "frozen"}}).trains_text_encoders


def test_without_parts_the_main_network_has_its_default_ones(tiny):
    assert list(specs(trained_by(tiny, None))) == ["unet attn", "unet cross"]


def test_full_weights_of_one_part_beside_adapters_of_another(tiny):
    trained = trained_by(tiny, {"unet.attn": {}, "unet.ff": {"method": "full"}})
    ends = {name.rpartition(".")[2] for name in trained.parameters if ".ff." in name}
    assert ends == {"weight"}  # no biases, as where all parts are trained like this
    assert trained.extra == {"unet": []}


def test_parts_that_a_model_lacks_are_named_with_those_that_it_has(tiny):
    with pytest.raises(
        ValueError, match=r"has no part transformer.attn; it has unet.attn, unet.cross, .*text_encoder_2.ff"
    ):
        trained_by(tiny, ["transformer.attn"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["attn"], "there is no part 'attn', did you mean 'unet.attn'"),
        (["ff"], "there is no part 'ff', did you mean 'unet.ff'"),
        (["unet.croos"], "there is no part 'unet.croos', did you mean 'unet.cross'"),
        (["all_linear"], "there is no part 'all_linear', did you mean 'all-linear'.*or patterns of paths of modules"),
        ({"unet.attn": {"rnk": 2}}, "rnk"),
    ],
)
def test_names_that_no_model_has_are_found_in_the_config(parts, message):
    with pytest.raises(ValueError, match=message):
        config(parts)


def test_all_linear_takes_no_convolution_and_leaves_what_is_named_itself(tiny):
    trained = trained_by(
        tiny, {"all-linear": {"rank": 2}, "unet.ff": {"method": "lora"}, "unet.cross": {"method": "frozen"}}
    )
    assert specs(trained) == {"unet ff": {("lora", 4, 4.0)}, "unet attn": {("dora", 2, 2.0)}}
    assert config("all-linear") == config(["all-linear"]) == config({"all-linear": {}})


def test_patterns_have_settings_of_their_own_and_take_from_parts(tiny):
    first = r"re:down_blocks\.1\..*\.to_q"
    parts = {"unet.attn": {}, first: {"rank": 2, "lr": 0.5}, "proj_in": {"method": "lora"}, "text_encoder.k_proj": {}}
    trained = trained_by(tiny, parts)
    assert specs(trained) == {
        "unet attn": {("dora", 4, 4.0)},
        f"unet {first}": {("dora", 2, 2.0)},
        "unet proj_in": {("lora", 4, 4.0)},
        "text_encoder text_encoder.k_proj": {("dora", 4, 4.0)},
    }
    by_part = {module.path: module.part for module in trained.reports["unet"].modules}
    assert {path.endswith("to_q") for path, part in by_part.items() if part == first} == {True}
    assert {name for name, rate in trained.rates.items() if rate == 0.5} == {
        f"unet.{path}.{name}"
        for path, part in by_part.items()
        if part == first
        for name in ("lora_A", "lora_B", "magnitude")
    }
    rows = parts_table(trained, tiny.adaptable, MAPS, config(parts), OptimizerConfig(lr=0.1)).splitlines()
    assert [row.split()[0] for row in rows[1:5]] == ["unet.attn", first, "proj_in", "text_encoder.k_proj"]
    assert config(parts).trains_text_encoders


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["to_kv"], "pattern 'to_kv' of adapter.parts matches no module; nearest: to_v, to_k"),
        (["time_proj"], "pattern 'time_proj' of adapter.parts matches time_proj, a Timesteps, which cannot be adapted"),
        (["re:(to_q"], "not a valid regular expression"),
        (["to_q", "attn1.to_q"], "adapter.parts: both to_q and attn1.to_q take down_blocks"),
        (["unet.cross", r"re:.*attn2\..*(to_[qkv]|\.0)"], "adapter.parts: patterns take all modules of unet.cross"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(parts, message, tiny):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained_by(tiny, parts)


def test_the_methods_of_parts_decide_which_settings_have_an_effect():
    optimizer = OptimizerConfig(lr=1.0, magnitude_lr=1.0)
    assert check_adapter(config({"unet.attn": {}, "unet.ff": {"method": "dora"}}, method="lora"), optimizer) == []
    (problem,) = check_adapter(config({"unet.attn": {"method": "lora"}}), optimizer)
    assert problem == "optimizer.magnitude_lr has no effect: adapter.parts has no magnitudes"
    (problem,) = check_adapter(config({"unet.attn": {"lr": 1e-4}}), OptimizerConfig(name="prodigy", lr=1.0))
    assert problem == "adapter.parts: the lr of unet.attn has no effect: prodigy finds one rate for all"


def test_the_table_has_the_parts_of_all_networks(tiny):
    chosen = config({"unet.attn": {"lr": 0.5}, "text_encoder.attn": {"rank": 2}})
    trained = adapt(tiny.adaptable, MAPS, chosen, seed=0, backend="torch")
    rows = parts_table(trained, tiny.adaptable, MAPS, chosen, OptimizerConfig(lr=0.1)).splitlines()
    first = [row.split()[0] for row in rows]
    assert first[:4] == ["part", "unet.attn", "text_encoder.attn", "all"]
    assert {"unet.cross", "unet.conv", "text_encoder.ff", "text_encoder_2.attn"} <= set(first[4:])
    assert f"{trained.num_trained:,}" in rows[3]
