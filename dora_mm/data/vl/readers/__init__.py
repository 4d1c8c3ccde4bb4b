"""The readers of vision-language data files, by `format` of a source.

A reader is a function `read(source, bad)` that yields one Example per usable row of the source's files, in file order.
It reads `source.file` and, where the format has them, `source.annotations`, `source.subtitles` and `source.split`;
`skip`, `limit` and `images` are handled by tables.py. It passes every row that it cannot use to `bad`, normally through
`good_rows`, and raises ValueError for a file that cannot be parsed. Its rows must depend only on the content of these
files, the name of `source.file` and the split, since tables are cached by them; if a reader changes, increase LAYOUT in
tables.py. An image that is inside a file is yielded as a data URL (embedded.py); tables.py makes a file of it.

To add a format: write its reader in this folder; add the format to READERS and PUBLISHED below, to `formats` of the
tasks that it serves (dora_mm/config/vl_tasks.py), and to `SourceConfig.format` in dora_mm/config/vl_data.py (also to
OWN_IMAGES, if its rows may contain images or name them by absolute paths); and add its file layout to tests/data/vl and
a row to the table of docs/vl.md. One more shape of `chat` is an entry of SHAPES in
chat_shapes.py, with a function that takes a row apart.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from dora_mm.config import resolve_path
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.chat import files_of, find_shape, read_chat
from dora_mm.data.vl.readers.choices import read_choices
from dora_mm.data.vl.readers.coco_captions import read_coco_captions, read_coco_karpathy
from dora_mm.data.vl.readers.gqa import read_gqa, read_gqa_vlt5
from dora_mm.data.vl.readers.nlvr2 import read_nlvr2, read_nlvr2_vlt5
from dora_mm.data.vl.readers.video import read_video_captions, read_video_qa
from dora_mm.data.vl.readers.vqa import read_easy_vqa, read_vqa_karpathy, read_vqa_v2
from dora_mm.data.vl.rows import BadRows

READERS: dict[str, Callable[[SourceConfig, BadRows], Iterator[Example]]] = {
    "vqa_v2": read_vqa_v2,
    "vqa_karpathy": read_vqa_karpathy,
    "easy_vqa": read_easy_vqa,
    "gqa": read_gqa,
    "gqa_vlt5": read_gqa_vlt5,
    "nlvr2": read_nlvr2,
    "nlvr2_vlt5": read_nlvr2_vlt5,
    "coco_captions": read_coco_captions,
    "coco_karpathy": read_coco_karpathy,
    "video_qa": read_video_qa,
    "video_captions": read_video_captions,
    "chat": read_chat,
    "choices": read_choices,
}
PUBLISHED = {  # data format -> where its files are published; "" where they are not
    "vqa_v2": "visualqa.org",
    "vqa_karpathy": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "easy_vqa": "the package easy-vqa",
    "gqa": "GQA's download page (cs.stanford.edu/people/dorarad/gqa)",
    "gqa_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "nlvr2": "github.com/lil-lab/nlvr",
    "nlvr2_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "coco_captions": "cocodataset.org",
    "coco_karpathy": "Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent)",
    "video_qa": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
    "video_captions": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
    "chat": "",  # the user's own files
    "choices": "VLMEvalKit (github.com/open-compass/VLMEvalKit)",
}
FILES = ("file", "annotations", "subtitles")  # the keys of a source that name files with row content


def format_name(source: SourceConfig) -> str:
    """The format of a source for reports, of conversations with their shape.

    Raises:
        ValueError: A file of conversations cannot be read.
    """
    if READERS[source.format] is not read_chat:
        return source.format
    files = data_files(resolved(source), "file")
    shapes = dict.fromkeys(find_shape(file, source.columns).name for file in files)
    return ", ".join([source.format, *shapes])


def data_files(source: SourceConfig, key: str) -> list[Path]:
    """The files under a key of a source: of conversations also those of folders and patterns.

    Raises:
        ValueError: A folder has no data files.
    """
    paths = [Path(path) for path in paths_under(source, key)]
    return [file for path in paths for file in files_of(path)] if READERS[source.format] is read_chat else paths


def paths_under(source: SourceConfig, key: str) -> tuple[str, ...]:
    """The paths under a key of a source: none, one, or several."""
    value = source.files if key == "file" else getattr(source, key)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with its files and its folder of images as existing paths.

    Raises:
        ValueError: A path does not exist.
    """
    found = {
        key: tuple(str(resolve_path(path)) for path in paths)
        for key in (*FILES, "images")
        if (paths := paths_under(source, key))
    }
    return source.model_copy(update={key: paths[0] if len(paths) == 1 else paths for key, paths in found.items()})
