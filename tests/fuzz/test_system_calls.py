"""HDF5, safetensors and av open files behind Python's events: strace sees which, and that there is no socket."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed"),
]
ROOT = Path(__file__).parents[2]
TRACED = "trace=open,openat,openat2,creat,execve,socket,connect"
OPENED = re.compile(r'^\d+ +(?:open|openat|openat2|execve|creat)\((?:AT_FDCWD, |\d+(?:<[^>]*>)?, )?"([^"]*)"')
SCRIPT = """
import json, sys
from pathlib import Path
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.frames import load_video
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.files.base_weights import BaseWeights
import av, h5py, socket

def features(name):
    found = open_features([name])
    [found[each] for each in ("image0", "image1") if each in found]

def weights(name):
    found = BaseWeights.open(Path(name))
    [found[key] for key in found]

READERS = {"features": features, "weights": weights, "adapter": lambda name: inspect_file(Path(name)),
           "video": lambda name: load_video(name, 2.0, 8), "bad": lambda name: (socket.socket(), open(name))}
features(sys.argv[1])  # what is loaded once
for number, (reader, name) in enumerate(json.loads(sys.argv[2])):
    try:
        open(f"/case/{number}")
    except OSError:
        pass
    try:
        READERS[reader](name)
        said = "read"
    except ValueError as error:
        said = f"refused: {error}"
    print(json.dumps(said))
"""


def external_link(file: h5py.File, other: Path) -> None:
    file["image1"] = h5py.ExternalLink(str(other / "secret.h5"), "image1")


def external_storage(file: h5py.File, other: Path) -> None:
    file.create_dataset("image1/features", (4, 6), np.float32, external=[(str(other / "secret"), 0, 96)])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((4, 6), np.float32)
    layout[:] = h5py.VirtualSource(str(other / "secret.h5"), "image1/features", (4, 6))
    file.create_virtual_dataset("image1/features", layout)


def nothing(file: h5py.File, other: Path) -> None:
    file["image1/features"] = np.zeros((4, 6), np.float32)


H5 = {each.__name__: each for each in (nothing, external_link, external_storage, virtual)}
VIDEOS = {
    "a.mp4": "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile://{other}/secret\n#EXTINF:1,\nhttp://127.0.0.1:9/b.ts\n",
    "b.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/b.ts\n#EXT-X-ENDLIST\n",
    "a.mkv": "ffconcat version 1.0\nfile {other}/secret\nfile http://127.0.0.1:9/b.ts\n",
    "b.mkv": "ffconcat version 1.0\nfile ../other/secret\nfile secret\n",
    "a.avi": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "a.webm": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>http://127.0.0.1:9/</BaseURL><SegmentList>'
    '<SegmentURL media="file://{other}/secret"/></SegmentList></Representation></AdaptationSet></Period></MPD>',
    "http:a.mp4": "nothing",
}


def make(folder: Path, other: Path) -> None:
    """Files that lead to those of another folder, or to a server."""
    other.mkdir()
    (other / "secret").write_bytes(np.ones(24, np.float32).tobytes())
    with h5py.File(other / "secret.h5", "w") as file:
        file["image1/features"] = np.ones((4, 6), np.float32)
    for name, leads_out in H5.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["image0/features"] = np.zeros((4, 6), np.float32)
            leads_out(file, other)
    for name, text in VIDEOS.items():
        (folder / name).write_text(text.format(other=other))
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    about = {"ss_sd_model_name": "owner/name", "modelspec.architecture": "../other/secret", "base_model": "/etc/passwd"}
    block = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
    weights = {f"{block}.to_{part}.weight": torch.eye(4) for part in "qkv"}
    save_file(weights, folder / "model.safetensors", about)
    save_file(tensors, folder / "adapter.safetensors", about)


CASES = {
    **{name: ("features", f"{name}.h5") for name in H5},
    **{name: ("video", name) for name in VIDEOS},
    "adapter": ("adapter", "adapter.safetensors"),
    "weights": ("weights", "model.safetensors"),
    "bad": ("bad", "../other/secret"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each reader says, and its lines of strace."""
    folder = tmp_path_factory.mktemp("calls") / "own"
    folder.mkdir()
    make(folder, folder.with_name("other"))
    log, cases = folder.with_name("log"), [(reader, str(folder / name)) for reader, name in CASES.values()]
    watched = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "4096", "-e", TRACED, "-o", str(log)]
    command = [*watched, sys.executable, "-c", SCRIPT, str(folder / "nothing.h5"), json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r'^.*"/case/\d+".*\n', log.read_text(), flags=re.M)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return folder, dict(zip(CASES, zip(said, [part.splitlines() for part in parts], strict=True), strict=True))


def outside(folder: Path, lines: list[str]) -> list[str]:
    """The files that were opened outside of a folder and of what is installed."""
    allowed = tuple(map(str, (folder, ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/usr", "/lib")))
    paths = [str(ROOT / found[1]) for line in lines if (found := OPENED.match(line)) and "ENOENT" not in line]
    return [path for path in paths if not path.startswith(allowed)]


def sockets(lines: list[str]) -> list[str]:
    return [line for line in lines if re.search(r" (socket|connect)\(", line)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "bad"])
def test_nothing_outside_of_the_folder_is_opened(seen, name):
    folder, found = seen
    said, lines = found[name]
    assert said == "read" if name in ("nothing", "adapter", "weights") else said.startswith("refused: ")
    assert outside(folder, lines) == []
    assert sockets(lines) == []


def test_what_opens_a_file_of_another_folder_is_seen(seen):
    folder, found = seen
    said, lines = found["bad"]
    assert said == "read"
    lines = [line.replace("own/../", "") for line in lines]
    assert outside(folder, lines) == [str(folder.with_name("other") / "secret")]
    assert "AF_INET" in sockets(lines)[0]
