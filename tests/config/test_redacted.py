"""A config for a bug report: choices and numbers stay, and nothing that a person has written."""

import string

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.paths import packaged_configs
from dora_mm.config.redacted import known_keys, public_texts, redacted
from dora_mm.utils import yaml12

ODD = (
    "/home/jane doe/bilder/été 東京 (1)",
    "C:\\Users\\jane\\a.png",
    "~/x",
    "jane-s-model.safetensors",
    "a\nb\x1b[31m|`",
)
OWN = {
    "pipeline": "train_diffusion",
    "seed": 3,
    "model": {"path": "jane/private-xl", "dtype": "bfloat16", "vae": "vae-of-jane"},
    "adapter": {"method": "dora", "rank": 16, "parts": ["unet.attn", "part of jane"]},
    "data": {"folder": "bilder", "resolution": [512, 768], "placeholder": "jane", "instance_prompt": "a photo of Jane"},
    "train": {"steps": 100, "mixed_precision": None, "hf_abcdefghijklmnop": True},
    "sample": {"prompts": [*ODD, "Jane at the sea"]},
    "jane": {"steps": 3},
}


def test_what_a_person_has_written_is_gone():
    found = redacted(OWN)
    text = yaml.safe_dump(found, allow_unicode=True)
    for secret in ("jane", "Jane", "bilder", "été", "東京", "private", "hf_", "Users", "home", "\x1b"):
        assert secret not in text, secret
    assert found["model"] == {"path": "<path>", "dtype": "bfloat16", "vae": "<path>"}
    assert found["data"]["folder"] == "<path>"  # by its key: no separator is in it
    assert found["data"]["placeholder"] == "<text>"
    assert found["sample"]["prompts"][:4] == ["<path>"] * 4


def test_choices_numbers_and_known_keys_stay():
    found = redacted(OWN)
    assert (found["pipeline"], found["seed"]) == ("train_diffusion", 3)
    assert found["adapter"] == {"method": "dora", "rank": 16, "parts": ["unet.attn", "<text>"]}
    assert found["data"]["resolution"] == [512, 768]
    assert found["train"] == {"steps": 100, "mixed_precision": None, "<key> 1": True}
    assert found["<key> 1"] == {"steps": 3}


def test_packaged_configs_stay_as_they_are():
    for name, file in packaged_configs().items():
        values = yaml12.read(file.read_text(encoding="utf-8")).value
        assert redacted(values) == values, name


@settings(max_examples=30)
@given(st.recursive(
    st.text(string.printable, min_size=4) | st.integers() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(string.printable, min_size=4), inner),
))  # fmt: skip
def test_every_text_that_is_left_is_one_of_the_package(value):
    left = []

    def collect(node):
        if isinstance(node, dict):
            left.extend(key for key in node if not key.startswith("<key> "))
            for inner in node.values():
                collect(inner)
        elif isinstance(node, list):
            for inner in node:
                collect(inner)
        elif isinstance(node, str) and node not in ("<path>", "<text>"):
            left.append(node)

    collect(redacted(value))
    assert set(left) <= public_texts() | known_keys()
