"""The losses and inputs of VL-BART's tasks, its batches, and the vision encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dora_mm.config.models import VisionConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.video import SUBTITLES_END
from dora_mm.eval.vl.metrics import score
from dora_mm.eval.vl.submissions import suffix, write_predictions
from dora_mm.models.vl.vl_bart.family import VLBartModel
from dora_mm.models.vl.vl_bart.text import decode
from dora_mm.models.vl.vl_bart.visual_inputs import VisionEncoder, resize_frames
from dora_mm.registries.vl_tasks import RECORDS, TASKS
from dora_mm.tasks.vl import sample_answer
from tests.shared.vl.small_vl_bart import DIM, small_tokenizer, small_vl_bart

NAMES = ("a.png", "b.png", "c.png")


@pytest.fixture
def clips(tmp_path):
    """Features in VALUE's format: one file per clip."""
    folder = tmp_path / "features"
    folder.mkdir()
    for name, length in (("short", 5), ("long", 200)):
        frames = np.random.default_rng(length).normal(size=(length, DIM)).astype(np.float16)
        np.savez(folder / f"{name}.npz", features=frames)
    return folder


@pytest.fixture
def grids(tmp_path):
    """Features of images, 7 x 7 cells each."""
    folder = tmp_path / "grids"
    folder.mkdir()
    for index, name in enumerate(NAMES):
        cells = np.random.default_rng(index).normal(size=(49, DIM)).astype(np.float32)
        np.savez(folder / f"{name.removesuffix('.png')}.npz", features=cells)
    return folder


@pytest.fixture
def task(grids):
    vision = VisionEncoder(VisionConfig(features=(str(grids),)))
    return VLBartModel(small_vl_bart(), small_tokenizer(), vision)


def example(index: int = 0, **changes) -> Example:
    values = {
        "id": str(index),
        "images": (NAMES[index % 3],),
        "text": "is there a red cat?",
        "answers": ("yes", "no"),
        "scores": (1.0, 0.3),
    }
    return Example(**{**values, **changes})


def stream() -> torch.Generator:
    return torch.Generator()


def batch_of(task, name: str, rows):
    return task.batch(name, rows, None, [sample_answer(row, 0.5) for row in rows])


def reference_losses(task, batch):
    """The losses of each row's tokens, without padding."""
    logits = task.model(*batch.inputs, labels=batch.targets).logits.double()
    for row, targets in zip(logits, batch.targets, strict=True):
        not_padding = targets != 1
        yield F.cross_entropy(row[not_padding], targets[not_padding], reduction="none")


def test_vqa_weights_each_row_by_the_score_of_its_answer(task):
    answers = [("yes", 1.0), ("two dogs", 0.3), ("no", 0.6)]
    rows = [example(i, answers=(a,), scores=(s,)) for i, (a, s) in enumerate(answers)]
    batch = batch_of(task, "vqa", rows)
    expected = sum(row.mean() * s for row, (_, s) in zip(reference_losses(task, batch), answers, strict=True)) / 3
    torch.testing.assert_close(task.loss(batch, stream()).mean.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tvqa", "tvc", "yc2c"])
def test_video_tasks_are_averaged_over_rows(clips, name):
    task = VLBartModel(small_vl_bart("video"), small_tokenizer(), VisionEncoder(VisionConfig(features=(str(clips),))))
    answers = ["yes", "two dogs and a red cat left of the bus"]
    rows = [example(images=("short",), answers=(answer,), scores=(1.0,)) for answer in answers]
    batch = batch_of(task, name, rows)
    means = [row.mean() for row in reference_losses(task, batch)]
    torch.testing.assert_close(task.loss(batch, stream()).mean.double(), sum(means) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["caption", "nlvr2"])
def test_sentences_are_averaged_over_tokens(task, name):
    rows = [example(i, answers=(a,), scores=(1.0,)) for i, a in enumerate(["true", "two dogs and a red cat"])]
    batch = batch_of(task, name, rows)
    expected = torch.cat(list(reference_losses(task, batch))).mean()
    torch.testing.assert_close(task.loss(batch, stream()).mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_answers_has_weight_zero(task):
    rows = [example(0), example(1, answers=(), scores=())]
    alone, both = (batch_of(task, "vqa", part) for part in (rows[:1], rows))
    assert both.weights.tolist()[1] == 0
    torch.testing.assert_close(
        task.loss(both, stream()).mean, task.loss(alone, stream()).mean / 2, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["caption", "nlvr2"])
def test_a_row_without_answers_adds_nothing_to_a_mean_over_tokens(task, name):
    rows = [example(0, answers=("true",), scores=(1.0,)), example(1, answers=(), scores=())]
    alone, both = (batch_of(task, name, part) for part in (rows[:1], rows))
    torch.testing.assert_close(task.loss(both, stream()).mean, task.loss(alone, stream()).mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("visual", "name", "kind"), [("image", "tvqa", "clips"), ("video", "vqa", "images")])
def test_a_model_of_the_other_kind_is_refused(grids, visual, name, kind):
    task = VLBartModel(small_vl_bart(visual), small_tokenizer(), VisionEncoder(VisionConfig(features=(str(grids),))))
    with pytest.raises(ValueError, match=f"model.path.* {name} needs {kind}"):
        task.check([name])


def test_visual_tokens_of_two_images_are_concatenated(task):
    inputs = task.inputs("nlvr2", [example(images=("a.png", "b.png"))], None)
    assert inputs.visual_features.shape == (1, 2, 49, DIM)
    assert inputs.attention_mask.shape[1] == inputs.input_ids.shape[1] + 72


def test_prompts_are_those_of_the_paper(task):
    texts = {name: decode(task.tokenizer, task.inputs(name, [example()], None).input_ids)[0] for name in ("vqa", "gqa")}
    assert texts == {"vqa": "vqa: is there a red cat?", "gqa": "gqa: is there a red cat?"}


def test_a_long_question_is_cut_to_twenty_tokens(task):
    inputs = task.inputs("vqa", [example(text="what color is the bus? " * 20)], None)
    assert inputs.input_ids.shape == (1, 20)
    assert inputs.input_ids[0, -1] == task.tokenizer.eos_token_id


def test_subtitles_are_truncated_and_the_question_never(clips):
    task = VLBartModel(small_vl_bart("video"), small_tokenizer(), VisionEncoder(VisionConfig(features=(str(clips),))))
    question = "[Q] what color is the bus? [Choices] a0: red. a1: two dogs."
    row = example(
        images=("long",), text=f"[Subs] {'a red cat ' * 900}{SUBTITLES_END}{question}", answers=("a1",), scores=(1.0,)
    )
    inputs = task.inputs("tvqa", [row], None)
    assert inputs.input_ids.shape == (1, 600)
    text = decode(task.tokenizer, inputs.input_ids)[0]
    assert text.endswith(f"{question} tvqa:")
    assert text.startswith("[Subs] a red cat")


def test_clips_are_resized_to_64_frames(clips):
    task = VLBartModel(small_vl_bart("video"), small_tokenizer(), VisionEncoder(VisionConfig(features=(str(clips),))))
    rows = [example(images=(name,), text=f"{SUBTITLES_END}[Q] is there?") for name in ("short", "long")]
    inputs = task.inputs("how2qa", rows, None)
    assert inputs.visual_features.shape == (2, 1, 64, DIM)
    assert inputs.attention_mask[:, -64:].sum(1).tolist() == [5, 64]
    assert torch.isfinite(task.loss(batch_of(task, "how2qa", rows), stream()).mean)


def test_long_clips_keep_their_maxima():
    frames = torch.randn(130, 3)
    resized, mask = resize_frames(frames, 64)
    assert mask.all()
    assert torch.equal(resized.max(0).values, frames.max(0).values)


def test_the_tower_encodes_images_without_precomputed_features(tmp_path):
    for index, name in enumerate(NAMES):
        Image.new("RGB", (40, 30), (index * 80, 20, 20)).save(tmp_path / name)
    vision = VisionEncoder(VisionConfig(tower="timm/resnet10t", pretrained=None))
    tokens = vision.encode([("a.png", "b.png"), ("b.png", "c.png")], str(tmp_path))
    assert tokens.shape[:2] == (2, 2)
    assert tokens.shape[3] == vision.feature_dim
    torch.testing.assert_close(tokens[0, 1], tokens[1, 0])
    assert not torch.allclose(tokens[0, 0], tokens[0, 1])
    (tmp_path / "a.png").unlink()  # cached by the first call
    assert torch.equal(vision.encode([("a.png",)], str(tmp_path))[0, 0], tokens[0, 0])


def test_cached_tokens_do_not_depend_on_the_autocast_of_their_first_use(tmp_path):
    Image.new("RGB", (40, 30), (80, 20, 20)).save(tmp_path / "a.png")
    config = VisionConfig(tower="timm/resnet10t", pretrained=None)
    plain, other = VisionEncoder(config), VisionEncoder(config)
    with torch.autocast("cpu", torch.bfloat16):
        first = other.encode([("a.png",)], str(tmp_path))
    assert first.dtype == torch.float32
    assert torch.equal(first, plain.encode([("a.png",)], str(tmp_path)))


def test_random_towers_are_drawn_from_the_seed():
    config = VisionConfig(tower="timm/resnet10t", pretrained=None)
    one, same, other = (VisionEncoder(config, seed=seed).identity for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    for name in NAMES:
        Image.new("RGB", (40, 30), (80, 20, 20)).save(tmp_path / name)
    vision = VisionEncoder(VisionConfig(tower="timm/resnet10t", pretrained=None))
    size = vision.encode([("a.png",)], str(tmp_path)).nbytes
    monkeypatch.setattr("dora_mm.models.vl.vl_bart.visual_inputs.CACHE_BYTES", 2 * size)
    vision.encode([("b.png",)], str(tmp_path))
    vision.encode([("a.png",)], str(tmp_path))  # used again, so b is the least recently used
    vision.encode([("c.png",)], str(tmp_path))
    assert [path.name for path in vision._cache] == ["a.png", "c.png"]


def test_a_trained_tower_caches_nothing_and_gets_gradients(tmp_path):
    Image.new("RGB", (40, 30), (80, 20, 20)).save(tmp_path / "a.png")
    vision = VisionEncoder(VisionConfig(tower="timm/resnet10t", pretrained=None), trained=True).requires_grad_()
    vision.encode([("a.png",)], str(tmp_path)).sum().backward()
    assert any(parameter.grad is not None for parameter in vision.parameters())
    assert not vision._cache


def test_a_row_is_shown_as_the_model_sees_it(task):
    text = task.row_view("vqa", example(answers=("no", "yes"), scores=(0.3, 1.0)), None).text()
    assert text.split("\n")[1:] == ["  │ <s>vqa: is there a red cat?</s><visual> x 36", "  → ⟦<s>yes</s>⟧"]
    assert task.lengths("vqa", None, (), None) is None


def test_one_more_task_is_one_more_record(task, tmp_path, monkeypatch):
    monkeypatch.setitem(RECORDS, "colours", replace(TASKS["gqa"], chosen_from=("red", "green", "blue")))
    rows = [example(i, answers=("red",), scores=(1.0,)) for i in range(3)]
    task.check(["colours"])
    assert task.loss(batch_of(task, "colours", rows), stream()).mean.isfinite()
    answers = task.answerer("colours", DecodeConfig(), ())(rows, None)
    assert set(answers) <= {"red", "green", "blue"}
    predictions = list(zip(rows, answers, strict=True))
    assert score("colours", predictions).metrics["accuracy"] == pytest.approx(100 * answers.count("red") / 3)
    path = tmp_path / f"colours{suffix('colours')}"
    write_predictions("colours", predictions, path)
    assert path.read_text().count("questionId") == 3
