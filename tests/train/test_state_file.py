"""States of trainings as files: every value comes back with its type and bits, and others are refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.train.checkpoint import load_checkpoint
from dora_mm.train.state_file import TREE, read_state, write_state
from dora_mm.utils.tensor_writer import write_tensor_file

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.integers() | st.text() | st.none() | st.booleans() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def typed(value):
    """A value with the types of all that is in it: True is 1, and (1,) is not [1]."""
    if isinstance(value, list | tuple):
        return type(value), [typed(each) for each in value]
    if isinstance(value, dict):
        return dict, [(typed(key), typed(each)) for key, each in value.items()]
    return type(value), repr(value)


@given(state=st.dictionaries(st.text(), VALUES, max_size=4))
def test_plain_values_come_back_with_their_types(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    write_state(path, state)
    assert typed(read_state(path)) == typed(state)


TENSORS = {
    "step": torch.tensor(3.0),
    "bf16": torch.linspace(-1, 1, 7).bfloat16(),
    "8 bits": torch.arange(5, dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "expanded": torch.tensor(5).expand(1),
    "empty of numpy": torch.from_numpy(np.empty(0, "u8").view(np.int64)),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "not finite": torch.tensor([math.inf, -math.inf, math.nan]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_come_back_bit_for_bit(tmp_path):
    state = {
        "optimizer": {"state": {0: TENSORS, "0": {"step": torch.tensor(4.0)}}, "groups": [(TENSORS["mask"], None)]}
    }
    write_state(tmp_path / "s", state)
    found = read_state(tmp_path / "s")["optimizer"]
    for name, tensor in TENSORS.items():
        own = found["state"][0][name]
        assert own.dtype == tensor.dtype
        assert own.shape == tensor.shape
        assert torch.equal(own.nan_to_num(1.5), tensor.nan_to_num(1.5)), name
    assert found["state"]["0"]["step"] == 4
    assert torch.equal(found["groups"][0][0], TENSORS["mask"])
    assert read_state(tmp_path / "s", ()) == {}


@pytest.mark.parametrize("value", [{1}, object(), b"x", torch.ones(1, dtype=torch.complex128), torch.float32])
def test_other_values_are_refused_by_name(value, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.state.0 is a .*, which a checkpoint cannot hold"):
        write_state(tmp_path / "s", {"optimizer": {"state": [value]}})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("text", ['{"a": {"call": 1}}', '{"a": {"tensor": "b"}}', '{"a": {}}', "[1]", "{"])
def test_damaged_states_are_named(text, tmp_path):
    tree = torch.tensor(list(text.encode()), dtype=torch.uint8)
    write_tensor_file(tmp_path / "s", {TREE: tree}, {})
    with pytest.raises(ValueError, match="s is damaged|the state in .*s is not"):
        read_state(tmp_path / "s")


class Counter:
    def load_state_dict(self, state):
        self.state = state


def test_a_checkpoint_of_before_is_read(tmp_path):
    """With a state.pt, as torch wrote it."""
    import json

    from dora_mm.train.checkpoint import ABOUT, FORMER_STATE, WEIGHTS
    from dora_mm.utils.digest import file_digest

    folder = tmp_path / "step-000003"
    folder.mkdir()
    write_tensor_file(folder / WEIGHTS, {"w": torch.ones(2)}, {})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, folder / FORMER_STATE)
    digests = {name: file_digest(folder / name) for name in (WEIGHTS, FORMER_STATE)}
    (folder / ABOUT).write_text(json.dumps({"step": 3, "digests": digests}))
    found, parameter = Counter(), torch.nn.Parameter(torch.zeros(2))
    assert load_checkpoint(folder, {"w": parameter}, {"optimizer": found}) == 3
    assert torch.equal(parameter, torch.ones(2))
    expected = optimizer.state_dict()
    assert found.state["param_groups"] == expected["param_groups"]
    assert all(torch.equal(found.state["state"][0][name], t) for name, t in expected["state"][0].items())
