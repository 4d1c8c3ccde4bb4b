"""Damaged and hostile files of each format: a clean load, or one sentence, in bounded time and memory."""

import json
import pickle
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dora_mm import DoRASpec, formats, inject, load_adapter, save_adapter
from dora_mm.cli import user_message
from dora_mm.core import adapted_layers
from dora_mm.formats.tools.diffusers import PEFT_METADATA
from dora_mm.formats.tools.peft import CONFIG_NAME
from dora_mm.formats.tools.peft_config import OUR_METADATA
from tests.shared import reference
from tests.shared.toy import read_tensors

FORMATS = ["diffusers", "peft", "native"]
HEADERS = {
    "diffusers": [PEFT_METADATA, OUR_METADATA],
    "peft": [OUR_METADATA],
    "native": ["dora_mm_format", "dora_mm_specs", "dora_mm_parameters"],
}
HARD = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 2, 1), nn.LayerNorm(2))


@pytest.fixture(scope="module", params=FORMATS)
def saved(request, tmp_path_factory):
    """(format, the weights file)."""
    model = base()
    inject(model, ["0", "1"], DoRASpec(rank=2, alpha=3))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    extra = [] if request.param == "diffusers" else ["2.weight", "0.bias"]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save_adapter({"unet": model}, folder, format=request.param, extra_parameters=extra)


def copy_of(file: Path, folder: Path, content: bytes | None = None) -> Path:
    """The folder of an adapter again, with another content of its weights file."""
    for each in file.parent.glob("*.*"):
        if each.suffix in (".json", ".safetensors"):
            (folder / each.name).unlink(missing_ok=True)  # tensors of the example before may still be mapped to it
            (folder / each.name).write_bytes(each.read_bytes())
    if content is not None:
        (folder / file.name).unlink()
        (folder / file.name).write_bytes(content)
    return folder / file.name


def refusal(path: Path, model: nn.Module | None = None) -> str | None:
    """The sentence with which loading refuses a file; None after a clean load."""
    model = base() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = None
    try:
        load_adapter({"unet": model}, path)
    except ValueError as error:
        message = user_message(error) or f"{error} (this message is not ours)"
    after = model.state_dict()
    if message is None:
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
    else:
        assert "not ours" not in message
        assert "\n" not in message
        assert len(message) < 1000
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    return message


def test_the_file_itself_loads(saved):
    assert refusal(saved[1]) is None


@HARD
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(saved, tmp_path, flips):
    content = bytearray(saved[1].read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    refusal(copy_of(saved[1], tmp_path, bytes(content)))


@HARD
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(saved, tmp_path, share):
    content = saved[1].read_bytes()
    message = refusal(copy_of(saved[1], tmp_path, content[: int(share * len(content))]))
    assert message
    assert "cannot be read as a safetensors file" in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, "unet", "0", "lora", "dora"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["unet", "0", "rank", "a"]), inner),
    max_leaves=6,
)


def changed(data: st.DataObject, value: Any) -> Any:
    """A JSON value with some part of it replaced."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(data, value[key])}
    return data.draw(JSON)


@HARD
@given(data=st.data())
def test_other_values_in_the_header(saved, tmp_path, data):
    format, file = saved
    tensors, header = read_tensors(file)
    key = data.draw(st.sampled_from(HEADERS[format]))
    text = header[key]
    value = changed(data, json.loads(text)) if text.startswith(("{", "[")) else data.draw(st.text(max_size=5))
    copy = copy_of(file, tmp_path, b"")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy, {**header, key: json.dumps(value)})
    refusal(copy)


@HARD
@given(data=st.data())
def test_other_values_in_the_config_of_peft(saved, tmp_path, data):
    format, file = saved
    if format != "peft":
        return
    copy = copy_of(file, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(changed(data, config)))
    refusal(copy)


@HARD
@given(data=st.data())
def test_other_shapes_dtypes_and_keys(saved, tmp_path, data):
    _, file = saved
    tensors, header = read_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtypes = [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    tensors[name] = torch.ones(shape, dtype=data.draw(st.sampled_from(dtypes)))
    if data.draw(st.booleans()):
        tensors[data.draw(st.sampled_from(["unet.lora_A.weight", "x", f"{name}.weight", ".", ""]))] = tensors.pop(name)
    copy = copy_of(file, tmp_path, b"")
    save_file(tensors, copy, header)
    refusal(copy)


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", BAD)
def test_values_that_are_not_finite_are_refused_by_name(saved, tmp_path, value):
    tensors, header = read_tensors(saved[1])
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    chosen = max(name for name in tensors if name.endswith(("lora_B.weight", "lora_B")))
    tensors[chosen].view(-1)[-1] = value
    copy = copy_of(saved[1], tmp_path, b"")
    save_file(tensors, copy, header)
    message = refusal(copy)
    assert message == f"{copy} cannot be used: its unet.1.lora_B has values that are NaN or infinite"
    formats.read(copy)  # which `inspect` does: it tells the shapes of such a file, too


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", BAD)
def test_values_that_are_not_finite_are_not_saved(tmp_path, format, value):
    model = base()
    inject(model, ["0"], DoRASpec(rank=2))
    model[0].magnitude.data[1] = value
    with pytest.raises(ValueError, match=r"unet.0.magnitude has values that are NaN or infinite, so .* not saved"):
        save_adapter({"unet": model}, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool, torch.float8_e5m2])
def test_dtypes_that_are_refused(saved, tmp_path, dtype):
    tensors, header = read_tensors(saved[1])
    chosen = next(name for name in tensors if name.endswith(("lora_A.weight", "lora_A")))
    copy = copy_of(saved[1], tmp_path, b"")
    save_file({**{k: t.clone() for k, t in tensors.items()}, chosen: torch.zeros(2, 4).to(dtype)}, copy, header)
    name = str(dtype).removeprefix("torch.")
    assert f"{copy}: {chosen} has values of type {name}: save it in float32" == refusal(copy)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 10**400, "8", None, True])
def test_alphas_that_are_no_positive_numbers(saved, tmp_path, alpha):
    format, file = saved
    tensors, header = read_tensors(file)
    copy = copy_of(file, tmp_path, b"")
    if format == "peft":
        config = json.loads((tmp_path / CONFIG_NAME).read_text())
        (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "lora_alpha": alpha}))
    elif format == "diffusers":
        header[PEFT_METADATA] = json.dumps({**json.loads(header[PEFT_METADATA]), "unet.lora_alpha": alpha})
    else:
        specs = json.loads(header["dora_mm_specs"])
        specs["unet"]["0"]["alpha"] = alpha
        header["dora_mm_specs"] = json.dumps(specs)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy, header)
    message = refusal(copy)
    assert (message is None) == (alpha is None)
    if message is not None:
        assert "alpha" in message


def with_header(path: Path, header: bytes, body: int = 0, size: int | None = None) -> Path:
    """A sparse file, which takes no room on the disk, with a header."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header) if size is None else size) + header)
        file.truncate(8 + len(header) + body)
    return path


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"{}", 2**63 + 5),
        (b"{}", 10**8),
        (b" " * 33 * 2**20, None),
        (DEEP, None),
        (b'{"a":' * 100_000, None),
        (b'{"a":{"dtype":"F32","shape":[1' + b",1" * 100_000 + b'],"data_offsets":[0,4]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', None),
    ],
)
def test_headers_of_absurd_size_or_depth(tmp_path, header, size):
    start = time.monotonic()
    assert refusal(with_header(tmp_path / "trained_weights.safetensors", header, 4, size))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("key", [PEFT_METADATA, OUR_METADATA])
def test_header_values_that_are_nested_too_deeply(saved, tmp_path, key):
    tensors, header = read_tensors(saved[1])
    keys = {"dora_mm_specs": DEEP.decode()} if saved[0] == "native" else {key: DEEP.decode()}
    copy = copy_of(saved[1], tmp_path, b"")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy, {**header, **keys})
    message = refusal(copy)
    assert message is None or "is nested too deeply" in message  # PEFT's files have no PEFT_METADATA
    assert message is not None or (saved[0] == "peft" and key == PEFT_METADATA)


def test_four_gigabytes_that_do_not_fit_are_not_read(tmp_path):
    shapes = {"lora_A": [4, 2**28], "lora_B": [3, 4]}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[f"unet.0.{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    file = with_header(tmp_path / "pytorch_lora_weights.safetensors", json.dumps(header).encode(), offset)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    message = refusal(file)
    assert message
    assert "does not fit this model: at unet.0, its lora_A has shape (4, 268435456) instead of" in message
    assert time.monotonic() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("opened"),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "model.ckpt", "lora.safetensors"])
@pytest.mark.parametrize("old", [True, False])
def test_pickles_are_refused_and_not_opened(tmp_path, monkeypatch, name, old):
    monkeypatch.chdir(tmp_path)
    if old:
        (tmp_path / name).write_bytes(pickle.dumps(Dangerous(), protocol=2))
    else:
        torch.save({"a": Dangerous()}, tmp_path / name)
    for path in (tmp_path / name, tmp_path) if not name.endswith(".safetensors") else (tmp_path / name,):
        message = refusal(path)
        assert message == (
            f"{tmp_path / name} is a pickle, which can run any code when it is opened: save it as safetensors in the "
            "tool that made it"
        )
    assert not (tmp_path / "opened").exists()
