"""`dora-mm convert` and `dora-mm verify` on the embedded SDXL."""

import json
import re
import shlex
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from dora_mm import DoRASpec, cli, convert, inject, load_adapter, merge, remove, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.formats.commands.inspection import misreaders
from dora_mm.formats.files.base_weights import BaseWeights
from pipelines.verify import wrong
from tests.shared import reference, toy

BASE = Path("samples/tiny-sdxl")


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(BASE / "unet")


@pytest.fixture(scope="module")
def adapter(unet, tmp_path_factory):
    """The file of a trained adapter with attention, feed-forward layers and convolutions."""
    inject(unet, "sdxl-unet", DoRASpec(rank=2, alpha=3.0), parts=("attn", "cross", "ff", "conv"))
    for seed, layer in enumerate(adapted_layers(unet).values()):
        reference.randomize(layer, seed=seed)
    return save_adapter({"unet": unet}, tmp_path_factory.mktemp("run") / "adapter")


def run(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def merged_unet(path):
    model = UNet2DConditionModel.from_pretrained(BASE / "unet")
    load_adapter({"unet": model}, path)
    merge(model, keep_base=False)
    remove(model)
    return model


SLOW = pytest.mark.slow


def check_same(one, two, tolerance):
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (first - second).norm() <= tolerance * first.norm(), name


@pytest.mark.parametrize("to", ["kohya", *(pytest.param(n, marks=SLOW) for n in ("comfy", "diffusers", "onetrainer"))])
def test_there_and_back(to, unet, adapter, tmp_path, capsys):
    """Out in the form of another tool, back as diffusers', loaded, merged: the weights are those of the original."""
    out = tmp_path / "out.safetensors"
    code, output, errors = run(capsys, "convert", adapter.parent, out, "--to", to, "--base", BASE)
    assert (code, errors) == (0, "")
    number = len(adapted_layers(unet))
    assert f"written  {out}, {number} modules" in output
    assert "strength 0.5" in output or to == "onetrainer"
    assert run(capsys, "convert", out, tmp_path / "back", "--to", "diffusers", "--base", BASE)[0] == 0
    check_same(merged_unet(adapter), merged_unet(tmp_path / "back"), 1e-6)


def test_merged_is_the_merged_model(adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    code, output, _ = run(capsys, "convert", adapter, out, "--to", "merged", "--base", BASE)
    assert code == 0
    assert f"written  {out}" in output
    error = float(re.search(r"rounding to float16 +(\S+)", output).group(1))
    assert 1e-5 < error < 1e-2
    found = UNet2DConditionModel.from_pretrained(out / "unet")
    check_same(merged_unet(adapter), found, 3e-4)  # its files hold fp16
    assert (out / "model_index.json").is_file()


def test_verify_shows_every_tool(adapter, tmp_path, capsys):
    run(capsys, "convert", adapter, tmp_path / "a.safetensors", "--to", "kohya", "--base", BASE)
    code, output, _ = run(capsys, "verify", tmp_path / "a.safetensors", "--base", BASE)
    assert code == 0
    said, ends, _, rows, measure = output.strip().split("\n\n")
    command = ["dora-mm", "convert", str(tmp_path / "a.safetensors"), "OUT", "--to", "comfy", "--base", str(BASE)]
    assert f"Forge: {shlex.join(command)}" in ends
    kinds = [line[:8].strip() for line in said.splitlines()]
    assert kinds == sorted(kinds, key=("right", "wrong", "not read").index)
    assert re.search(r"^right    .*\bSD\.Next.*: loads all 219 modules$", said, re.MULTILINE)
    assert re.search(r"^right    OneTrainer: .*set OneTrainer's option for them", said, re.MULTILINE)
    assert re.search(
        r"^wrong    ComfyUI .*\bForge: off by \S+% of the change, loads all 219 modules$", said, re.MULTILINE
    )
    assert re.search(r"^not read .*\bPEFT, musubi-tuner: does not know these names$", said, re.MULTILINE)
    assert measure.startswith("error: how far the change of the weights is from")
    found = {line.split()[0]: line for line in rows.splitlines()}
    assert "0.42.1" in found["diffusers"]
    assert " right " in found["kohya"]
    assert " right " in found["sdnext"]
    assert "divides by the norm of W0" in found["comfy"]
    assert "wrong axis" in found["a1111"]
    assert "loses the magnitude" in found["diffusers"]
    assert "not known to this tool" in found["peft"]
    code, output, _ = run(capsys, "verify", tmp_path / "a.safetensors", "--tool", "a1111", "--base", BASE, "--json")
    (verdict,) = json.loads(output)
    assert code == 0
    assert verdict["findings"] == {"wrong axis": len(verdict["layers"])}
    code, output, _ = run(capsys, "verify", tmp_path / "a.safetensors", "--tool", "a1111", "--base", BASE)
    assert (code, "lora_unet_" in output, " more " in output) == (0, True, True)


def write_kohya(path, components):
    """A file for the attention of the UNet and of text encoders of the base."""
    weights = BaseWeights.open(BASE)
    names = [name for name in weights if name.component in components and name.path.endswith((".to_q", ".q_proj"))]
    shapes = {name: tuple(weights[name].shape) for name in names}
    toy_base = toy.base(shapes)
    return toy.write_source(path, {name: toy.layer(name, weights=toy_base) for name in names})


def test_the_commands_that_verify_prints_run_as_they_are(tmp_path, capsys):
    file = write_kohya(tmp_path / "my style.safetensors", ("unet", "text_encoder", "text_encoder_2"))
    _, output, _ = run(capsys, "verify", file, "--base", BASE)
    commands = re.findall(r"^(?:to cure|closest)  .*: dora-mm (convert .*)", output, re.MULTILINE)
    assert len(commands) > 1
    for number, command in enumerate(commands):
        words = [str(tmp_path / f"{number}") if word == "OUT" else word for word in shlex.split(command)]
        code, _, errors = run(capsys, *words)
        assert (code, errors) == (0, ""), command


def test_a_base_without_the_text_encoders_has_no_command_that_would_stop(tmp_path, capsys):
    file = write_kohya(tmp_path / "a.safetensors", ("unet", "text_encoder"))
    _, output, _ = run(capsys, "verify", file, "--base", BASE / "unet")
    assert "to cure" not in output
    assert "are not in this base: name one that has them" in output


def test_it_says_who_misreads_a_file_and_what_to_use_instead(tmp_path, capsys):
    """That they do, and read the other one, is what `tests/test_documented_exports.py` finds of the same file."""
    name = toy.UNET[0]
    source = toy.write_source(tmp_path / "a.safetensors", {name: toy.layer(name)})
    _, output, _ = run(capsys, "convert", source, tmp_path / "b.safetensors", "--to", "kohya")
    (line,) = [line for line in output.splitlines() if line.startswith("not for  ")]
    first = "ComfyUI and reForge, Forge (--to comfy); diffusers (--to diffusers)"
    others = "ai-toolkit (--to ai-toolkit); AUTOMATIC1111, InvokeAI (--to diff)"
    assert line == f"not for  {first}; {others}: they load it, and compute something else"
    convert(source, tmp_path / "c.safetensors", to="comfy", base=toy.base())
    assert misreaders(tmp_path / "c.safetensors", "comfy").startswith("diffusers (--to diffusers); ")
    assert "LyCORIS and sd-scripts, SD.Next (--to kohya)" in misreaders(tmp_path / "c.safetensors", "comfy")


def test_differences_and_plain_lora_are_for_all(tmp_path, capsys):
    name = toy.UNET[0]
    plain = toy.write_source(tmp_path / "a.safetensors", {name: toy.layer(name, method="lora")})
    code, output, _ = run(capsys, "convert", plain, tmp_path / "b.safetensors", "--to", "kohya")
    assert (code, "not for" in output) == (0, False)
    (file,) = convert(plain, tmp_path / "c.safetensors", to="diff", base=toy.base()).files
    assert misreaders(file, "diff") == ""


def test_onetrainer_says_which_option_fits(adapter, tmp_path, capsys):
    _, output, _ = run(capsys, "convert", adapter, tmp_path / "a.safetensors", "--to", "onetrainer", "--base", BASE)
    assert "the magnitudes are those of output rows: set OneTrainer's option" in output
    columns = Path("tests/formats/fixtures/lycoris_in.safetensors")
    _, output, _ = run(capsys, "convert", columns, tmp_path / "b.safetensors", "--to", "onetrainer")
    assert "those of input columns, as OneTrainer's default is" in output


MISTAKES = [
    (("convert", "{a}", "{out}", "--to", "comfyui"), "there is no export format 'comfyui'"),
    (("convert", "{a}", "{out}", "--to", "diff"), "--to diff needs the base model"),
    (("convert", "missing.safetensors", "{out}", "--to", "kohya"), "missing.safetensors"),
    (("convert", "{a}", "{out}", "--to", "peft", "--base", "nowhere"), "nowhere"),
    (("verify", "{a}", "--tool", "comfyuj", "--base", "samples/tiny-sdxl"), "there is no tool 'comfyuj'"),
    (("verify", "{a}", "--tool", "vllm", "--base", "samples/tiny-sdxl"), "vLLM loads no DoRA: merge the adapter into"),
    (("convert", "{a}", "{out}", "--to", "SGLang"), "plain LoRA with dora-mm convert IN OUT --to lora --rank"),
    (("verify", "{a}", "--base", "samples/tiny-vlm"), "{a}"),
    (("verify", "{a}"), "names no base model that is on this machine: give it with --base MODEL"),
    (("verify", "samples/SOURCES.md", "--base", "samples/tiny-sdxl"), "SOURCES.md"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0][:4])[:40] for m in MISTAKES])
def test_mistakes(arguments, message, adapter, tmp_path, capsys):
    places = {"a": adapter, "out": tmp_path / "out"}
    code, output, errors = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, output) == (2, "")
    assert message.format(**places) in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.083, "off by 8.3% of the change"),
        (0.98, "off by 98.0% of the change"),
        (1.02, "unusable, as far off as without the adapter"),
        (152.12, "unusable, further off than without the adapter"),
        (float("inf"), "some values are not finite"),
    ],
)
def test_an_error_above_that_of_no_adapter_is_unusable(error, text):
    assert wrong(error) == text
