"""Documents that are edited: values change, comments and all else stay."""

from dora_mm.utils.yaml12 import MISSING, edited, read

TEXT = """\
# the head
model:
  path: some/model # the path
  vae: a/b
sample:
  prompts: # two
    - one
    - two # the last

  steps: 3
train: {steps: 5, batch_size: 2}
"""


def test_values_change_and_comments_stay():
    changes = {
        ("model", "path"): "a: b",
        ("model", "vae"): MISSING,
        ("model", "dtype"): "float32",
        ("sample", "prompts"): ["é, 1", "yes", "#3"],
        ("sample", "steps"): 4,
        ("train", "batch_size"): 1,
        ("train", "epochs"): MISSING,
    }
    text = edited(TEXT, changes)
    assert read(text).value == {
        "model": {"path": "a: b", "dtype": "float32"},
        "sample": {"prompts": ["é, 1", "yes", "#3"], "steps": 4},
        "train": {"steps": 5, "batch_size": 1},
    }
    for comment in ("# the head", "# the path", "# two", "# the last"):
        assert text.count(comment) == 1


def test_a_key_is_added_to_its_section():
    assert edited("a:\n  b: 1 # one\nc: 2\n", {("a", "d"): True}) == "a:\n  b: 1 # one\n  d: true\nc: 2\n"


def test_a_section_that_is_not_there_is_added_and_items_have_numbers():
    text = "a: {b: 1} # one\nc:\n  - {d: 2}\n  - e\nf: null\ng: {}\n"
    changes = {("a", "x"): 1.5, ("c", 0, "d"): 3, ("c", 1): "z", ("f", "i"): 4, ("h", "j", "k"): [5], ("g", "l"): 6}
    found = edited(text, changes)
    assert read(found).value == {
        "a": {"b": 1, "x": 1.5},
        "c": [{"d": 3}, "z"],
        "f": {"i": 4},
        "g": {"l": 6},
        "h": {"j": {"k": [5]}},
    }
    assert "a: {b: 1, x: 1.5} # one" in found
    assert edited(text, {("nowhere", "to", "be"): MISSING}) == text
