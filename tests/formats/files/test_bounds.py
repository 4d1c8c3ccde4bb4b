"""What a file, whatever it holds, may take of `inspect`, `convert` and `verify`, beyond the program's own start."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, MEGABYTES = 3, 100  # of CPU; measured are 0.1 to 1.3 s on a core of a Xeon
CODE = """
import contextlib, io, json, resource, sys, time
from dora_mm import cli

def run(*arguments):
    text, before = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        cli.main(list(arguments))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.process_time() - before, memory, text.getvalue()[:2000]

fixture, base = "tests/formats/fixtures/lycoris_out.safetensors", ["--base", "samples/tiny-sdxl"]
run("inspect", fixture), run("verify", fixture, *base), run("convert", fixture, "/nowhere/x", "--to", "kohya")
start = run("inspect", fixture)[1]
for file in sys.argv[1:]:
    inspect = ["inspect", file, *([] if "values" in file else ["--header"])]
    more = ["verify", file, *base], ["convert", file, file + "2", "--to", "kohya"]
    for command in (inspect, *(() if "many" in file else more)):
        seconds, memory, text = run(*command)
        if seconds > 1.5 and command[0] != "convert":  # 3.8 s for once, where other programs shared the core
            seconds = min(seconds, run(*command)[0])
        print(json.dumps([command, seconds, memory - start, text]))
"""


def write(path, tensors, text=None):
    """A sparse file, which takes no room on the disk."""
    header, end = {}, 0
    for key, shape in tensors.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    content = text or json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return str(path)


def lora(module, rank, size, ends=("down", "up")):
    shapes = {"down": (rank, size), "up": (size, rank)}
    return {f"{module}.lora_{end}.weight": shapes[end] for end in ends}


@pytest.mark.slow
def test_a_file_takes_bounded_time_and_memory(tmp_path):
    known = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    many = [lora(f"lora_unet_hyper_blocks_{n}_to_q", 4, 8) for n in range(30_000)]
    lists = b'{"a":{"dtype":"F32","shape":[' + b"[]," * 4_000_000 + b'],"data_offsets":[0,0]}}'
    files = {
        "lists": ({}, lists),
        "many": ({key: shape for module in many for key, shape in module.items()},),
        "rank": (lora(known, 5_000_000, 64),),
        "without_B": (lora(known, 2**15, 2**15, ends=("down",)),),
        "alpha": ({**lora(known, 4, 64), f"{known}.alpha": (2**28,)},),
        "values": (lora("lora_unet_hyper", 2**10, 2**14),),
    }
    paths = [write(tmp_path / f"{name}.safetensors", *content) for name, content in files.items()]
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True, check=True)
    texts = {}
    for command, seconds, megabytes, text in map(json.loads, done.stdout.splitlines()):
        assert (seconds < SECONDS, megabytes < MEGABYTES) == (True, True), (command, seconds, megabytes, text)
        texts[command[0], Path(command[1]).stem] = text
    assert len(texts) == 3 * len(paths) - 2
    assert "not an adapter" not in texts["inspect", "many"]
    assert "lora_unet_hyper_blocks_#_to_q" in texts["inspect", "many"]
    assert "its rank 5000000 is that of no adapter of a weight of (64, 64)" in texts["convert", "rank"]
    assert "its low-rank tensor B is missing" in texts["convert", "without_B"]
    assert "its alpha is not one number, but has the shape (268435456,)" in texts["verify", "alpha"]
    assert "values: all are finite" in texts["inspect", "values"]
