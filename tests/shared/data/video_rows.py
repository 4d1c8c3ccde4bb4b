"""Rows with videos, with images and with text alone, and what is equal of every class that takes them."""

from pathlib import Path

import torch
from torch import Tensor

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.videos import write_video
from tests.shared.data.vlm_rows import write_images


def write_visuals(folder: Path) -> Path:
    """Images and videos, of two lengths."""
    write_images(folder)
    for name, frames in (("short.mp4", 10), ("long.mp4", 40), ("other.mp4", 40)):
        write_video(folder / name, frames=frames, seed=len(name))
    return folder


def opened(base: Path, **keys) -> VLM:
    return VLM(VLMModelConfig.model_validate({"path": str(base), **keys}))


def row(name: str, *files: str) -> Example:
    """A question about files, and its answer."""
    marks = "".join(VIDEO if file.endswith("mp4") else IMAGE for file in files)
    asked = Turn("user", f"{marks}\nWhat is it?" if marks else "What is it?", False)
    return Example(name, files, "What is it?", ("a dog",), (1.0,), turns=(asked, Turn("assistant", "a dog", True)))


FILES = {"short": ["short.mp4"], "long": ["long.mp4"], "other": ["other.mp4"], "image": ["wide.png"], "text": []}
ROWS = tuple(row(name, *files) for name, files in FILES.items())


@torch.no_grad()
def losses(vlm: VLM, folder: Path, rows) -> Tensor:
    """The loss of each row, in the order of the rows."""
    batch = vlm.batch("chat", rows, str(folder), [("a dog", 1.0)] * len(rows))
    encoded = [vlm.rows.row("chat", each, str(folder), "a dog") for each in rows]
    order = [index for group in vlm.rows.groups(encoded) for index in group]
    found = torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])
    return found[torch.tensor(order).argsort()]


def reads_videos(base: Path, folder: Path) -> bool:
    """Whether a class takes videos, after it has shown that it reads them, and rows of a batch as it does alone."""
    vlm = opened(base)
    if "video" not in vlm.rows.encoder.kinds:
        return False
    together = losses(vlm, folder, ROWS)
    alone = torch.cat([losses(vlm, folder, [each]) for each in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[1] - together[2]).abs() > 1e-5  # of another video
    answer = vlm.answerer("chat", DecodeConfig(max_new_tokens=3), ())
    assert answer(ROWS, str(folder)) == [answer([each], str(folder))[0] for each in ROWS]
    return True
