"""Two processes that accumulate train as one with the larger batch, also when both were killed in between."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.train.checkpoint import last_step
from dora_mm.train.metrics import read_metrics
from dora_mm.train.state_file import read_state
from tests.pipelines.processes import kill_all, launched, wait_for
from tests.pipelines.recorded import in_order, recorded
from tests.shared.data.images_made import write_images as write_noise
from tests.shared.data.vl_files import vqa_annotation, vqa_question, vqa_v2, write_json
from tests.shared.data.vlm_rows import write_conversations, write_images
from tests.shared.images.tiny_flows import FLOWS, NAMES, TinyFlow
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.small_vl_bart import DIM, TEXTS, small_bart, small_tokenizer

STEPS = 8


def write(folder, name: str, **values):
    """A config, whose run directory has its name."""
    shared = {"pipeline": "train_vl", "output": str(folder / name)}
    train = {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 9, "log_every": 1}
    values = {**shared, **values, "train": {**train, **values["train"]}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))  # no part twice: no alias
    return str(folder / f"{name}.yaml")


def chat(folder, name: str, batch_size: int, accumulated: int = 1) -> str:
    """A tiny LLaVA on conversations with no, one and two images, and so steps without gradients for its tower.

    One row has too many images, and is left out: a process may have a batch without rows.
    """
    source = write_conversations(folder, folder / "pictures")["train"]
    rows = json.loads(Path(source["file"]).read_text())
    said = [{"from": "human", "value": "<image>" * 16}, {"from": "gpt", "value": "many"}]
    write_json(Path(source["file"]), [*rows, {"id": "4", "image": ["square.png"] * 16, "conversations": said}])
    return write(
        folder,
        name,
        model={"path": str(folder / "llava"), "max_length": 64},
        adapter={"rank": 2, "parts": ["text.attn", "vision.attn", "connector"]},
        data={"train": source, "on_bad_data": "skip", "tables": str(folder / "tables")},
        optimizer={"lr": 0.02},
        train={"batch_size": batch_size, "gradient_accumulation_steps": accumulated},
    )


def pairs(folder, name: str, batch_size: int, accumulated: int = 1) -> str:
    """A tiny LLaVA on pairs of answers, compared with what it says at the start, which the processes share."""
    names = ["wide.png", "tall.png", "square.png"]
    rows = [
        {"prompt": f"What is {n}?", "chosen": "red " * n + "one", "rejected": "blue " * (3 - n), "images": [names[n]]}
        for n in range(3)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {"format": "preferences", "file": str(folder / "pairs.jsonl"), "images": str(folder / "pictures")}
    return write(
        folder,
        name,
        model={"path": str(folder / "llava")},
        adapter={"rank": 2, "parts": {"text.attn": {}, "connector": {"method": "full"}}},
        data={"task": "preference", "train": source, "tables": str(folder / "tables")},
        optimizer={"lr": 0.02},
        train={"batch_size": batch_size, "gradient_accumulation_steps": accumulated},
    )


def vl_bart(folder, name: str, factor: int, accumulated: int = 1) -> str:
    """Two tasks, with means over rows and over tokens, drawn answers, and validation."""
    questions = vqa_v2(
        folder,
        [vqa_question(n, question=TEXTS[n % 3]) for n in range(13)],
        [vqa_annotation(n, ["yes"] * 5 + ["no"] * 3 + ["two dogs"] * 2) for n in range(13)],
    ).model_dump(exclude_none=True)
    rows = [{"image_id": 42 + n % 5, "id": n, "caption": TEXTS[n % 3]} for n in range(11)]
    images = [{"id": 42 + n, "file_name": f"COCO_val2014_{42 + n:012d}.jpg"} for n in range(5)]
    captions = write_json(folder / "captions.json", {"images": images, "annotations": rows})
    tasks = [
        {"task": "vqa", "batch_size": 3 * factor, "train": questions, "valid": {**questions}},
        {"task": "caption", "batch_size": 2 * factor, "train": {"format": "coco_captions", "file": str(captions)}},
    ]
    return write(
        folder,
        name,
        model={"family": "vl_bart", "path": str(folder / "vl_bart")},
        vision={"features": [str(folder / "features")]},
        adapter={"rank": 2, "extra_trainable": ["visual_embedding", "norms"]},
        data={"tasks": tasks, "tables": str(folder / "tables")},
        optimizer={"lr": 0.01, "eps": 1.0e-6},
        train={"batch_size": 1, "gradient_accumulation_steps": accumulated},
        evaluate={"every": 4, "answers": "rank"},
    )


def images(folder, name: str, model: Path, accumulated: int = 1) -> str:
    """SDXL in float8, with new tokens and text encoders, held at the base model by prompts and outside of masks."""
    return write(
        folder,
        name,
        pipeline="train_diffusion",
        model={"path": str(model), "quantization": "float8"},
        adapter={"rank": 2, "parts": ["unet.cross", "text_encoders.attn"]},
        tokens={"TOK": {"lr": 0.02}},
        data={"folder": str(folder / "noise"), "resolution": 64, "mask": {"outside": "base"}, "caption_dropout": 0.2},
        preserve={"prompt": "an icon"},
        optimizer={"lr": 0.01, "eps": 1.0e-4},
        train={
            "batch_size": 1,
            "gradient_accumulation_steps": accumulated,
            "stop_tokens_after": 6,
            "max_grad_norm": None,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("pictures", "features"):
        (folder / name).mkdir()
    write_images(folder / "pictures")
    (folder / "noise").mkdir()
    write_noise(folder / "noise")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(folder / "noise" / "0.mask.png")
    for number in range(42, 49):
        cells = np.random.default_rng(number).normal(size=(49, DIM)).astype(np.float32)
        np.savez(folder / "features" / f"COCO_val2014_{number:012d}.npz", features=cells)
    tiny.build("llava", folder / "llava")
    torch.manual_seed(0)
    # Dropout differs from process to process, so here is none.
    bart = from_bart(small_bart(dropout=0.0), len(small_tokenizer()), DIM, "image")
    save_vl_bart(bart, small_tokenizer(), folder / "vl_bart")
    return folder


def assert_equal_runs(one, other) -> None:
    """The same losses and weights, up to rounding; and the same scores."""
    rows, others = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, STEPS + 1))
    for key in ("loss", "lr", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=1e-5)
    weights, theirs = (
        load_file(run / f"checkpoints/step-{STEPS:06d}/trained_weights.safetensors") for run in (one, other)
    )
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    if not (one / "validation").exists():
        return
    scores = [read_metrics(run / "validation" / "metrics.jsonl") for run in (one, other)]
    for row, others in zip(
        *scores, strict=True
    ):  # in the batches of a training, which differ, a loss is rounded otherwise
        assert row.pop("vqa/loss", 0) == pytest.approx(others.pop("vqa/loss", 0), rel=1e-5)
    assert scores[0] == scores[1]


def seen_files(run) -> dict[int, bytes]:
    """The digests of the features that the checkpoint of a run has, by their place."""
    state = read_state(run / f"checkpoints/step-{STEPS:06d}" / "state.safetensors")["files"]
    return dict(zip(state["places"].tolist(), map(bytes, state["digests"].numpy()), strict=True))


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(folder, tiny_folder):
    """VL-BART runs to its end, and resumes from a copy without its later files; LLaVA is killed while it trains.

    SDXL runs beside what is resumed.
    """
    one = (chat(folder, "chat_one", 4), vl_bart(folder, "bart_one", 4), images(folder, "sdxl_one", tiny_folder, 2))
    for config in one:
        assert main(["train", config]) == 0
    scores = read_metrics(folder / "bart_one" / "validation" / "metrics.jsonl")
    assert [row["step"] for row in scores] == [4, 8]
    assert scores[-1]["vqa"] > 0

    started = (["train", vl_bart(folder, "bart_two", 1, 2)], ["train", chat(folder, "chat_two", 1, 2)])
    with launched(*started, log=folder / "first.log") as process:
        wait_for(folder / "chat_two" / "checkpoints" / "step-000002", process)
        kill_all(process)
    assert 2 <= last_step(folder / "chat_two" / "checkpoints") < STEPS, (folder / "first.log").read_text()
    assert_equal_runs(folder / "bart_two", folder / "bart_one")
    assert seen_files(folder / "bart_two") == seen_files(folder / "bart_one")  # also of the second process
    kept = shutil.copytree(folder / "bart_two", folder / "bart_kept")
    for left in (
        "checkpoints/step-000004",
        "checkpoints/step-000006",
        "checkpoints/step-000008",
        "validation",
        "adapter",
    ):
        shutil.rmtree(kept / left)
    (kept / "summary.json").unlink()

    resumed = (["train", "--resume", str(folder / name)] for name in ("chat_two", "bart_kept"))
    with launched(*resumed, ["train", images(folder, "sdxl_two", tiny_folder)], log=folder / "second.log") as process:
        assert process.wait(timeout=600) == 0, (folder / "second.log").read_text()
    assert_equal_runs(folder / "chat_two", folder / "chat_one")
    assert_equal_runs(folder / "bart_kept", folder / "bart_one")
    assert_equal_runs(folder / "sdxl_two", folder / "sdxl_one")
    shown = (folder / "second.log").read_text()
    assert shown.count("parameters (") == 3  # three runs: only the main process informs
    assert json.loads((folder / "chat_two" / "summary.json").read_text())["steps"] == STEPS
    longer = ["--set", f"train.steps={STEPS + 1}"]
    with launched(["train", "--resume", str(folder / "bart_one"), *longer], log=folder / "third.log") as process:
        assert process.wait(timeout=300) != 0
    said = (folder / "third.log").read_text()
    assert (
        said.count("bart_one cannot be resumed by 2 processes: the micro-batches of its steps (1) can be divided") == 1
    )
    assert last_step(folder / "bart_one" / "checkpoints") == STEPS


def halfway(run: Path, copy: Path) -> list[str]:
    """The command that goes on with a copy of a run as a kill would have left it after half of its steps."""
    shutil.copytree(run, copy)
    for step in range(STEPS // 2 + 2, STEPS + 1, 2):
        shutil.rmtree(copy / f"checkpoints/step-{step:06d}")
    for result in ("adapter", "summary.json", "gallery"):
        path = copy / result
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return ["train", "--resume", str(copy)]


def assert_same_batches(found: list, expected: list) -> None:
    """The same rows, noise and dropout in the same order; latents up to rounding."""
    assert [(rows, *seeds) for rows, _, *seeds in found] == [(rows, *seeds) for rows, _, *seeds in expected]
    for (_, one, *_), (_, other, *_) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_number_of_processes(folder, tiny_folder, caplog):
    """Both see the batches of the run that was not stopped, and end with its parameters, up to the order of sums.

    Sums of four gradients in two orders differ by at most 3 x 2^-24 (1.8e-7) of the sum g of their sizes. To first
    order a step of AdamW makes of it at most lr / eps times as much: 1.8e-5 g for the images, whose g is below 0.1, so
    that 4 steps stay below 1e-5, the tolerance of `assert_equal_runs`. Found were 2.4e-7, and 4.7e-7 of conversations.
    """
    config = {"chat": lambda name, accumulated: chat(folder, name, 1, accumulated)}
    config["sdxl"] = lambda name, accumulated: images(folder, name, tiny_folder, accumulated)
    for kind, write_config in config.items():
        assert recorded([str(folder / f"{kind}-1"), "train", write_config(f"{kind}-of-1", 4)]) == 0
    commands = [
        command
        for kind, write_config in config.items()
        for command in (
            [str(folder / f"{kind}-2"), "train", write_config(f"{kind}-of-2", 2)],
            [str(folder / f"{kind}-12"), *halfway(folder / f"{kind}-of-1", folder / f"{kind}-of-1-then-2")],
        )
    ]
    log = folder / "others.log"
    with launched(*commands, log=log, module="tests.pipelines.recorded") as process:
        assert process.wait(timeout=600) == 0, log.read_text()
    change = "changes from 1 to 2, and train.gradient_accumulation_steps with it from 4 to 2: every step has the same"
    assert log.read_text().count(change) == 2
    for kind in config:
        command = halfway(folder / f"{kind}-of-2", folder / f"{kind}-of-2-then-1")
        assert recorded([str(folder / f"{kind}-21"), *command]) == 0
        one, two = in_order(folder / f"{kind}-1", 4), in_order(folder / f"{kind}-2", 2)
        assert len(one) == 4 * STEPS
        assert_same_batches(two, one)
        assert_same_batches(in_order(folder / f"{kind}-12", 2), one[2 * STEPS :])
        assert_same_batches(in_order(folder / f"{kind}-21", 4), one[2 * STEPS :])
        summaries = []
        for name in ("of-1", "of-2", "of-1-then-2", "of-2-then-1"):
            assert_equal_runs(folder / f"{kind}-{name}", folder / f"{kind}-of-1")
            summaries.append(json.loads((folder / f"{kind}-{name}" / "summary.json").read_text()))
        assert len({(found.get("rows_cut"), found.get("rows_left_out")) for found in summaries}) == 1
        assert summaries[0].get("rows_left_out") != 0
    assert sum("processes 2 is 1" in message for message in caplog.messages) == 2
    assert json.loads((folder / "sdxl-of-1-then-2" / "circumstances.json").read_text())["4"]["processes"] == 2


@pytest.mark.slow
def test_two_processes_share_the_pairs_that_are_kept(folder):
    assert main(["train", pairs(folder, "pairs_one", 4)]) == 0
    with launched(["train", pairs(folder, "pairs_two", 1, 2)], log=folder / "pairs.log") as process:
        assert process.wait(timeout=600) == 0, (folder / "pairs.log").read_text()
    assert_equal_runs(folder / "pairs_two", folder / "pairs_one")
    states = [
        read_state(folder / name / "checkpoints/step-000002/state.safetensors")["reference"]
        for name in ("pairs_one", "pairs_two")
    ]
    known = [dict(zip(state["keys"].tolist(), state["log_probabilities"].tolist(), strict=True)) for state in states]
    assert known[0].keys() == known[1].keys()
    for key, values in known[0].items():
        assert values == pytest.approx(known[1][key], rel=1e-5)


def flow_images(
    folder,
    name: str,
    flow: TinyFlow,
    accumulated: int = 1,
    *,
    quantization: str | None = None,
    references: Sequence[str] = (),
    **train,
) -> str:
    """A flow model held at the base model by prompts, with an average of its weights."""
    section = {"quantization": quantization, **({flow.name: flow.settings} if flow.settings else {})}
    return write(
        folder,
        name,
        pipeline="train_diffusion",
        model={"path": str(folder / flow.name), **section},
        adapter={"rank": 2, "cache": "norms", "parts": ["transformer.attn", "transformer.ff"]},
        data={
            "folder": str(folder / "noise"),
            "resolution": 64,
            "caption_dropout": 0.2,
            "references": list(references),
        },
        preserve={"prompt": "an icon"},
        ema={"decay": 0.9},
        optimizer={"lr": 0.01, "eps": 1.0e-4},
        train={"batch_size": 1, "gradient_accumulation_steps": accumulated, "max_grad_norm": None, **train},
    )


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS, ids=NAMES)
def test_two_processes_train_a_flow_model_as_one_does_also_divided(folder, flow):
    flow.build(folder / flow.name)
    one, two, divided = (f"{flow.name}_{name}" for name in ("one", "two", "divided"))
    assert main(["train", flow_images(folder, one, flow, 2)]) == 0
    commands = (flow_images(folder, two, flow), flow_images(folder, divided, flow, shard=True))
    log = folder / f"{flow.name}.log"
    with launched(*(["train", command] for command in commands), log=log) as process:
        assert process.wait(timeout=600) == 0, log.read_text()
    assert_equal_runs(folder / two, folder / one)
    assert_equal_runs(folder / divided, folder / one)


@pytest.mark.slow
def test_two_processes_train_on_references_as_one_does(folder, tmp_path):
    flow = next(flow for flow in FLOWS if flow.name == "flux2_klein")
    flow.build(folder / flow.name)
    for number, image in enumerate(sorted((folder / "noise").glob("?.png"))):
        Image.new("RGB", (64, 80), (40 * number % 256, 90, 160)).save(tmp_path / image.name)
    assert main(["train", flow_images(folder, "edit_one", flow, 2, references=[str(tmp_path)])]) == 0
    with launched(
        ["train", flow_images(folder, "edit_two", flow, references=[str(tmp_path)])], log=folder / "edit.log"
    ) as process:
        assert process.wait(timeout=600) == 0, (folder / "edit.log").read_text()
    assert_equal_runs(folder / "edit_two", folder / "edit_one")


@pytest.mark.slow
def test_two_processes_divide_a_quantized_flow_model(folder):
    pytest.importorskip("bitsandbytes")
    flow = next(flow for flow in FLOWS if flow.name == "krea2")
    flow.build(folder / flow.name)
    assert main(["train", flow_images(folder, "nf4_one", flow, 2, quantization="nf4")]) == 0
    divided = flow_images(folder, "nf4_divided", flow, quantization="nf4", shard=True)
    log = folder / "nf4.log"
    with launched(["train", divided], log=log) as process:
        assert process.wait(timeout=600) == 0, log.read_text()
    assert_equal_runs(folder / "nf4_divided", folder / "nf4_one")
