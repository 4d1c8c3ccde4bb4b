"""The doors: every kind of file that a command reads, small and valid, and what reads it."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from dora_mm.config import load_config
from dora_mm.config.loader import saved_values
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.features.folder import FeatureWriter
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.rows import BadRows
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.sampling.answers import read_answers
from dora_mm.sampling.batch.reading import read_prompts_file
from dora_mm.sampling.gallery import write_gallery
from dora_mm.sampling.gallery.training import read_images as read_shown_images
from dora_mm.sampling.manifest import ManifestEntry, write_manifest
from dora_mm.sampling.png import BaseModel, GenerationMetadata, UsedAdapter, read_metadata, save_image
from dora_mm.sampling.replay import check_complete
from dora_mm.studies.campaigns.training_rows import TrainingRow, TrainingRows, packed
from dora_mm.train.checkpoint import damage
from dora_mm.train.metrics import MetricsLog
from dora_mm.utils.lock import only_writer
from dora_mm.utils.partials import machine
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.tables import csv_records
from tests.fuzz.door import Door
from tests.fuzz.model_doors import MODEL_DOORS
from tests.fuzz.run_doors import RUN_DOORS
from tests.fuzz.score_doors import SCORE_DOORS
from tests.shared.data import suite_files

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "formats" / "fixtures"
RECIPE = ROOT / "configs" / "sdxl" / "tiny_3d_icon.yaml"
TYPED = "seed=1\nadapter.rank=4\nadapter.parts=[unet.ff]\n"
ROWS = [
    {"id": n, "messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A dog."}]}
    for n in range(4)
]
IMAGES = ("0.png", "1.jpg", "2.webp")
JOBS = [
    {"prompt": "a bus", "seed": "0-3", "steps": 4, "width": 64, "height": 64, "guidance": 5.5},
    {"prompt": "a cat", "seed": "7", "steps": 8, "width": 64, "height": 96, "guidance": 1.0},
]


# --- adapters and models ----------------------------------------------------------------------------------------------


def copied(name: str) -> Callable[[Path], object]:
    file = FIXTURES / f"{name}.safetensors"
    return lambda folder: shutil.copy(file, folder) if file.exists() else shutil.copytree(FIXTURES / name, folder / "a")


def read_adapter(file: str) -> Callable[[Path], object]:
    """What inspect, convert and a training that goes on from it do."""

    def read(folder: Path) -> None:
        inspect_file(folder / file)
        done = convert(folder / file, folder / "out", to="peft" if file.startswith("a/adapter") else "kohya")
        assert not TensorFile(done.files[0]).not_finite()

    return read


def make_model(folder: Path) -> None:
    block = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
    tensors = {f"{block}.to_{name}.weight": torch.eye(4) for name in "qkv"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def read_model(folder: Path) -> None:
    weights = BaseWeights.open(folder / "model.safetensors")
    assert all(weights[name].numel() for name in weights)


# --- features ---------------------------------------------------------------------------------------------------------


def features_of(count: int = 3) -> dict[str, np.ndarray]:
    return {f"image{n}": np.arange(24, dtype=np.float32).reshape(4, 6) + n for n in range(count)}


def make_features(folder: Path) -> None:
    with FeatureWriter(folder / "own", "identity", (4, 6), torch.float32, "tower") as writer:
        for name, values in features_of().items():
            writer.add(name, "digest", torch.from_numpy(values))


def make_npz(folder: Path) -> None:
    (folder / "own").mkdir()
    for name, values in features_of().items():
        np.savez(folder / "own" / f"{name}.npz", features=values)


def make_h5(folder: Path) -> None:
    with h5py.File(folder / "own.h5", "w") as file:
        for name, values in features_of().items():
            file.create_dataset(f"{name}/features", data=values, compression="gzip")
            file[f"{name}/boxes"] = np.zeros((4, 4), np.float32)


def read_features(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        features = open_features([str(folder / name)])
        for image in features_of():
            if image in features:
                assert features[image].isfinite().all()

    return read


# --- rows -------------------------------------------------------------------------------------------------------------


def make_rows(folder: Path) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode(), mtime=0))
    (folder / "rows.csv").write_text("query,response\nWhat is it?,A dog.\nAnd that?,A cat.\n")
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "rows.parquet")
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_rows(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        list(read_chat(SourceConfig(format="chat", file=str(folder / name)), BadRows("skip")))

    return read


def read_refs(folder: Path) -> None:
    about = {"file": str(folder / "refs(unc).p"), "annotations": str(folder / "instances.json")}
    list(read_source(SourceConfig(format="refcoco_refs", **about), BadRows("skip")))


# --- images ---------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    for number, kind in enumerate(("png", "jpg", "webp")):
        Image.new("RGB", (40, 30), (40 * number, 90, 160)).save(folder / f"{number}.{kind}")
    (folder / "0.txt").write_text("a sks bus")
    rows = [{"file_name": "1.jpg", "text": "a sks cat"}, {"file_name": "2.webp", "text": ["a sks key", "a key"]}]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_images(folder: Path) -> None:
    read_captioned_images(folder, instance_prompt="a sks thing")


def make_job(folder: Path) -> None:
    (folder / "job.csv").write_text(
        "\n".join(",".join(map(str, row)) for row in [JOBS[0], *(j.values() for j in JOBS)])
    )
    (folder / "job.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in JOBS))
    (folder / "job.txt").write_text("# prompts\na bus --d 3 --s 8 --w 64\na cat --l 2.5 --n a dog\n")
    book = openpyxl.Workbook()
    for row in [list(JOBS[0]), *(list(job.values()) for job in JOBS)]:
        book.active.append(row)  # type: ignore[union-attr]
    book.save(folder / "job.xlsx")


def make_image(folder: Path) -> None:
    model = BaseModel("tiny", None, None, "float32", "0" * 64, None)
    environment = {"backend": "torch", "memory": {}, "device": "cpu"}
    settings = {"steps": 4, "guidance": 5.0, "width": 64, "height": 64, "scheduler": "euler"}
    adapters = (UsedAdapter("a.safetensors", 1.0, "0" * 64, "0" * 12),)
    found = GenerationMetadata(model, adapters, settings, (("a bus", None, 0),), 0, environment, {"torch": "2"})
    save_image(folder / "picture.png", Image.new("RGB", (8, 8)), found, "euler")


def read_image(folder: Path) -> None:
    check_complete(read_metadata(folder / "picture.png"), folder / "picture.png")


def make_gallery(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    settings = {"prompt": "a bus", "seed": 0, "model": "tiny", "adapter": None, "strength": None}
    entries = [
        ManifestEntry(1, "1.png", "done", 1, settings, scores={"clip": 0.5}),
        ManifestEntry(2, "2.png", "failed", 1, {}),
    ]
    write_manifest(folder, entries)


def read_gallery(folder: Path) -> None:
    write_gallery({folder: read_shown_images(folder)}, folder / "gallery")


# --- runs -------------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> None:
    run = RunDirectory.create("a", RECIPE.read_text(), str(folder / "run"), {"data": "0" * 64})
    log = MetricsLog(run)
    for step in range(3):
        log.write(step, loss=0.5, seconds=1.0)
    log.sync()
    log.close()
    checkpoint = run.checkpoints / "step-000002"
    checkpoint.mkdir(parents=True)
    for name in ("trained_weights.safetensors", "state.safetensors"):
        (checkpoint / name).write_bytes(b"state")
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 2, "digests": {}}))
    (run.path / ".lock").write_text(
        json.dumps({"host": "a", "machine": machine(), "process": 2**22, "since": "b", "token": "c"})
    )
    (run.path / "circumstances.json").write_text(json.dumps({"1": {"torch": "2.0", "threads": 1}}))
    (run.path / "chat.jsonl").write_text('{"circumstances": {"torch": "2.0"}}\n["a dog", "0", 1]\n')


def read_run(folder: Path) -> None:
    """What a training that is resumed reads before it loads a model."""
    run = RunDirectory.resume(folder / "run", {"data": "0" * 64})
    saved_values(run.path)
    load_config(run.path / "config.yaml")
    with only_writer(run.path):
        run.go_on(2)
        damage(run.checkpoints / "step-000002")
        MetricsLog(run, 2).close()
    read_answers(run.path, "chat")


def make_trainings(folder: Path) -> None:
    measured = ("10", "1.0", "2", "0.1", "", "", "", "")
    row = TrainingRow("dora", "4", "", "0.001", "0", "0.5", *measured, "0" * 16, packed("[0.5]"))
    (folder / "trainings.csv").write_text(csv_records([asdict(row)]))


def read_trainings(folder: Path) -> None:
    rows = TrainingRows(folder / "trainings.csv", lambda _: "").found
    [row.number for row in rows.values() if row.value]


def read_typed(folder: Path) -> None:
    """What a person types behind --set."""
    texts = (folder / "typed.txt").read_bytes().decode("utf-8", "replace").split("\n")
    load_config(RECIPE, [text for text in texts if "=" in text])


def adapter(name: str, file: str, *others: str) -> Door:
    return Door(name, copied(name), (file, *others), read_adapter(file))


DOORS: tuple[Door, ...] = (
    Door("config", lambda folder: shutil.copy(RECIPE, folder), (RECIPE.name,), lambda f: load_config(f / RECIPE.name)),
    Door("typed", lambda f: (f / "typed.txt").write_text(TYPED), ("typed.txt",), read_typed),
    *(Door(f"job {end}", make_job, (f"job.{end}",), lambda f, end=end: read_prompts_file(f / f"job.{end}"))
      for end in ("csv", "jsonl", "txt", "xlsx")),
    Door("gallery", make_gallery, ("manifest.jsonl", "manifest.jsonl", "1.png"), read_gallery),
    Door("picture", make_image, ("picture.png",), read_image),
    Door("images", make_images, ("metadata.jsonl", "0.txt", *IMAGES), read_images),
    Door("image", make_images, IMAGES, lambda f: [load_rgb(f / name) for name in IMAGES]),
    *(Door(f"rows {end}", make_rows, (f"rows.{end}",), read_rows(f"rows.{end}"))
      for end in ("json", "jsonl", "json.gz", "jsonl.gz", "csv", "parquet", "arrow")),
    adapter("lycoris_out", "lycoris_out.safetensors"),
    adapter("lycoris_tucker", "lycoris_tucker.safetensors"),
    adapter("diffusers", "a/pytorch_lora_weights.safetensors"),
    adapter("peft_dora", "a/adapter_model.safetensors", "a/adapter_config.json"),
    Door("refs", suite_files.refs, ("refs(unc).p", "instances.json"), read_refs),
    Door("model", make_model, ("model.safetensors",), read_model),
    Door("features", make_features, ("own/index.json", "own/features-00001.safetensors"), read_features("own")),
    Door("features npz", make_npz, ("own/image0.npz", "own/image1.npz"), read_features("own")),
    Door("features h5", make_h5, ("own.h5",), read_features("own.h5")),
    Door("run", make_run,
         tuple(f"run/{name}" for name in ("config.yaml", "inputs.json", "versions.json", ".lock", "metrics.jsonl",
                                          "metrics.sha256", "checkpoints/step-000002/checkpoint.json", "chat.jsonl")),
         read_run),
    Door("trainings", make_trainings, ("trainings.csv",), read_trainings),
    *RUN_DOORS,
    *MODEL_DOORS,
    *SCORE_DOORS,
)  # fmt: skip


def check_doors(folder: Path) -> dict[str, Any]:
    """Every door reads its own files as they are; returns their contents by door and file."""
    contents: dict[str, Any] = {}
    for door in DOORS:
        place = folder / door.name
        place.mkdir(parents=True)
        door.make(place)
        contents[door.name] = {
            str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()
        }
        door.read(place)
    return contents
