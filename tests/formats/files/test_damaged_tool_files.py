"""Damaged files of every tool: a clean load, or one sentence that names the file."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import verify
from tests.formats.tools.test_tools import FILES, path_of
from tests.shared import toy

BASES = {True: {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}, False: toy.base()}


def copied(name, folder):
    """A copy of a fixture, and its weights file."""
    source, target = path_of(name), folder / path_of(name).name
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return next(target.glob("*.safetensors"))
    shutil.copy(source, target)
    return target


def read_all(file, tool):
    """Everything that is read from a file; errors other than ValueError are bugs."""
    for read in (lambda: inspect_file(file), lambda: verify(file, tool, BASES[tool == "peft"])):
        message = message_of(read)
        assert message is None or (str(file.parent) in message and "\n" not in message), message


def message_of(read):
    try:
        read()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("tool", "name"), FILES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes(tool, name, flips, tmp_path):
    file = copied(name, tmp_path)
    for target in {file, *file.parent.glob("adapter_config.json")}:
        data = bytearray(target.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little") if target == file else len(data)
        for place, value in flips:
            data[int(place * header)] = value  # in the header: values of tensors may be anything
        target.write_bytes(data)
    read_all(file, tool)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tool", "name"), FILES)
def test_values_that_are_not_finite_are_refused(tool, name, value, tmp_path):
    file = copied(name, tmp_path)
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_up" in key or "lora_B" in key)
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="its lora_B has values that are NaN or infinite"):
        verify(file, tool, BASES[tool == "peft"])


@pytest.mark.parametrize(("tool", "name"), FILES)
def test_each_tensor_is_needed_or_missing_with_a_sentence(tool, name, tmp_path):
    file = copied(name, tmp_path)
    tensors = load_file(file)
    for key in tensors:
        save_file({k: t for k, t in tensors.items() if k != key}, file)
        read_all(file, tool)
        if "lora_down" in key or "lora_A" in key:
            with pytest.raises(ValueError, match="is missing"):
                verify(file, tool, BASES[tool == "peft"])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize(("tool", "name"), FILES)
def test_other_shapes(tool, name, shape, tmp_path):
    file = copied(name, tmp_path)
    tensors = load_file(file)
    for key in list(tensors)[:5]:
        save_file({**tensors, key: torch.ones(shape)}, file)
        read_all(file, tool)
